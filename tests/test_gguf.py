# SPDX-License-Identifier: Apache-2.0
"""The GGUF header reader against the gguf package's own reader and writer."""

import struct
import time

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_float64 import reader, smollm2_path

from cupyattn.models.gguf import GGUF, ModelError, field


@pytest.fixture
def small_file(tmp_path):
    """A file with every kind of metadata and three tensors; returns (path, {tensor name: array})."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"uint8": 200, "int8": -7, "uint16": 65000, "int16": -30000, "uint32": 1 << 31,
                        "int32": -5, "float32": 0.1, "uint64": 1 << 60, "int64": -(1 << 60), "float64": 0.1,
                        "bool": True, "string": "Größe ✓"}.items():
        getattr(writer, "add_" + name)("test." + name, value)
    writer.add_array("test.words", ["", "a", "Ġbœuf"])
    writer.add_array("test.numbers", [3, -1, 7])
    writer.add_array("test.flags", [True, False])
    tensors = {"a.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
               "b.weight": np.arange(5, dtype=np.float16),
               "c.weight": gguf.quantize(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64),
                                         gguf.GGMLQuantizationType.Q4_1)}
    for name, data in tensors.items():
        raw_dtype = gguf.GGMLQuantizationType.Q4_1 if data.dtype == np.uint8 else None
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


def test_metadata_of_every_kind(small_file):
    metadata = GGUF(small_file[0]).metadata
    assert {key.removeprefix("test."): value for key, value in metadata.items()
            if key.startswith("test.") and not isinstance(value, np.ndarray)} == {
        "uint8": 200, "int8": -7, "uint16": 65000, "int16": -30000, "uint32": 1 << 31, "int32": -5,
        "float32": float(np.float32(0.1)), "uint64": 1 << 60, "int64": -(1 << 60), "float64": 0.1, "bool": True,
        "string": "Größe ✓", "words": ["", "a", "Ġbœuf"]}
    assert metadata["test.numbers"].tolist() == [3, -1, 7]
    assert metadata["test.flags"].tolist() == [True, False]
    assert metadata["general.architecture"] == "llama"


def test_typed_fields(small_file):
    metadata = GGUF(small_file[0]).metadata
    for key, kind in {"uint8": int, "float32": float, "uint32": float, "bool": bool, "string": str,
                      "words": list}.items():
        assert field(metadata, "test." + key, kind) is metadata["test." + key]
    assert field(metadata, "test.none", int, 7) == 7
    for key, kind, message in (("none", int, "is missing"), ("bool", int, "an integer, got True"),
                               ("float64", int, "an integer, got 0.1"), ("uint8", bool, "true or false, got 200"),
                               ("numbers", int, "an integer, got an array of numbers"),
                               ("words", str, "a string, got \\["), ("string", list, "a list of strings")):
        with pytest.raises(ModelError, match=f"metadata test.{key} .*{message}"):
            field(metadata, "test." + key, kind)


def test_tensors_and_their_shapes(small_file):
    path, expected = small_file
    tensors = GGUF(path).tensors
    assert {name: (tensor.type, tensor.shape) for name, tensor in tensors.items()} == {
        "a.weight": ("F32", (3, 32)), "b.weight": ("F16", (5,)), "c.weight": ("Q4_1", (2, 64))}
    for name, array in expected.items():
        assert tensors[name].data.tobytes() == array.tobytes()
        assert not tensors[name].data.flags.writeable


def test_smollm2_equals_the_gguf_package():
    theirs, start = reader(), time.perf_counter()
    ours = GGUF(smollm2_path())
    assert time.perf_counter() - start < 0.5
    fields = {name: entry for name, entry in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for name, entry in fields.items():
        assert np.array_equal(ours.metadata[name], entry.contents()), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.type, found.shape) == (tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]))
        assert found.data.tobytes() == tensor.data.tobytes()


def test_truncation_anywhere_is_one_clear_error(small_file, tmp_path):
    whole, cut = small_file[0].read_bytes(), tmp_path / "cut.gguf"
    for size in (*range(4, 1000, 3), len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="truncated"):
            GGUF(cut)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a GGUF file"),
    (b"PK\3\4 a zip file", "not a GGUF file"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3, got 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "value type 99"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 62), "truncated"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 10, 1 << 62), "truncated"),
    (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "numbers or strings"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 4242, 0), "tensor t has unknown type 4242"),
    (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 2, 0), "Q4_0 blocks of 32"),
    (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9), "9 dimensions"),
])
def test_wrong_files(content, message, tmp_path):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GGUF(path)


@settings(max_examples=300, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, 900), value=st.binary(min_size=1, max_size=8))
def test_damaged_headers_never_crash(small_file, tmp_path, at, value):
    data = bytearray(small_file[0].read_bytes())
    data[at:at + len(value)] = value
    (tmp_path / "damaged.gguf").write_bytes(data)
    try:
        GGUF(tmp_path / "damaged.gguf")
    except ModelError as error:
        assert "\n" not in str(error)
