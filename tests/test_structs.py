# SPDX-License-Identifier: Apache-2.0
"""The NumPy layout of every argument struct is the compilers' layout."""

import ctypes
import subprocess

import cupy
import nvrtc
import pytest

from cupyattn.runtime import host_compiler, source
from cupyattn.runtime.structs import Args, load


def _assertions():
    lines = ['#include "params.h"']
    for struct in load().values():
        lines.append(f'static_assert(sizeof({struct.name}) == {struct.dtype.itemsize}, "{struct.name}");')
        for field, (_, offset, *_) in struct.dtype.fields.items():
            lines.append(f'static_assert(__builtin_offsetof({struct.name}, {field}) == {offset}, '
                         f'"{struct.name}.{field}");')
    return lines


def _options():
    return tuple(f"-I{folder}" for folder in source.include_dirs(cpu=False))


def test_layout_under_nvrtc():
    nvrtc.compile_code("\n".join(_assertions()), ("-std=c++17", *_options()), "sm_80")
    wrong = [*_assertions(), "static_assert(sizeof(RowView) == 17);"]
    with pytest.raises(cupy.cuda.compiler.CompileException, match="static assertion failed"):
        nvrtc.compile_code("\n".join(wrong), ("-std=c++17", *_options()), "sm_80")


def test_layout_under_the_host_compiler(tmp_path):
    file = tmp_path / "layout.cpp"
    file.write_text("\n".join(_assertions()) + "\n")
    command = [*host_compiler.compiler().command, "-std=c++17", "-fsyntax-only", *_options(), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_hidden_padding():
    for struct in load().values():
        members = sum(dtype.itemsize for dtype, *_ in struct.dtype.fields.values())
        assert members == struct.dtype.itemsize, f"{struct.name}: order its fields from largest to smallest"
        assert struct.dtype.itemsize <= 4096, f"{struct.name} does not fit the parameter space"


def test_a_record_is_bytes_without_fields():
    """CuPy asks every argument of a launch for its ``__array_interface__``, which names all fields there are."""
    struct = load()["AttentionArgs"]
    data = bytes(n % 256 for n in range(struct.dtype.itemsize))
    record = Args(struct, data, []).record()
    interface = record.__array_interface__
    assert record.size == 1 and interface["descr"] == [("", f"|V{len(data)}")]
    assert ctypes.string_at(interface["data"][0], len(data)) == data
