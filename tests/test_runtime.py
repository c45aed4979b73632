# SPDX-License-Identifier: Apache-2.0
"""Compiling, caching and launching on the CPU: what can go wrong and what is said then."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cupyattn
from cupyattn.runtime import (
    Plan,
    Specialisation,
    arch_of,
    compile_all,
    cpu,
    host_compiler,
    launch,
    make_args,
    recording,
    source,
)
from cupyattn.runtime.structs import layout

KERNELS = Path(__file__).parent / "kernels"
ROOT = Path(__file__).parent.parent


def _scale(kernel="scale", grid=1):
    spec = Specialisation(str(KERNELS / "scale.cu"), kernel, "ScaleArgs", {})
    return Plan(spec, "cpu", (grid,), (64,))


def _run_scale(n=100, factor=3.0):
    plan = _scale(grid=-(-n // 64))
    x, out = np.arange(n, dtype=np.float32), np.full(n, np.nan, np.float32)
    launch(plan, make_args(plan, x=x, out=out, n=n, factor=factor))
    np.testing.assert_array_equal(out, x * np.float32(factor))


def test_launch_and_zero_grid():
    _run_scale()
    plan = _scale(grid=0)
    launch(plan, make_args(plan, x=None, out=None, n=0, factor=1.0))


def test_make_args_names_fields():
    plan = _scale()
    x = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match=r"ScaleArgs: missing fields \['factor'\].*the fields are x, out, n, factor"):
        make_args(plan, x=x, out=x, n=4)
    with pytest.raises(TypeError, match=r"unknown fields \['y'\]"):
        make_args(plan, x=x, out=x, n=4, factor=1.0, y=2)
    norm = Plan(Specialisation("rms_norm", "rms_norm", "RmsNormArgs", {}), "cpu", (1,), (1,))
    with pytest.raises(TypeError, match=r"RowView: missing fields \['stride_row'\], unknown fields \['stride'\]"):
        make_args(norm, x={"data": x, "stride": 1}, weight=x, residual=None, out=None, rows=1, hidden=4, eps=0.0,
                  reserved=0)
    with pytest.raises(TypeError, match="ScaleArgs.x: must be float32, got float64"):
        make_args(plan, x=np.zeros(4), out=x, n=4, factor=1.0)
    with pytest.raises(ValueError, match=r"ScaleArgs.n: 4294967296 does not fit the field \(elements\)"):
        make_args(plan, x=x, out=x, n=2**32, factor=1.0)


def test_kernel_signature_is_compared_before_launch():
    x = np.zeros(4, np.float32)
    for kernel, found in (("scale_two_arguments", "ptr:8,int:4"), ("scale_other_struct", "struct:8")):
        plan = _scale(kernel)
        with pytest.raises(TypeError, match=rf"{kernel}: the kernel takes \({found}\), the launcher passes "
                                            r"\(struct:24\)"):
            launch(plan, make_args(plan, x=x, out=x, n=4, factor=1.0))


def test_struct_layout_of_nested_views():
    struct = layout("RmsNormArgs")
    assert [leaf.path for leaf in struct.leaves][:3] == ["x.data", "x.stride_row", "weight"]
    assert [leaf.read_only for leaf in struct.leaves if leaf.is_pointer] == [True, True, False, False]
    assert struct.packer.size == struct.dtype.itemsize
    with pytest.raises(KeyError, match="no struct NoArgs in params.h"):
        layout("NoArgs")


def _type_constants(format):
    return Specialisation(str(KERNELS / "type_constants.cu"), "type_constants", "TypeConstantsArgs", {"FORMAT": format})


@pytest.mark.parametrize("format, want", [
    ("formats::Int8<__half>", (8, 2, 1)), ("formats::Int8<float32, 32>", (8, 4, 32)), ("Plain<bfloat16>", (1, 2, 0)),
    ("Plain<formats::Int8<float16>>", (1, 1, 0)), ("Plain<const float *>", (1, 8, 0)),
    ("Plain<unsigned long long>", (1, 8, 0))])
def test_types_as_constants(xp, format, want):
    plan = Plan(_type_constants(format), arch_of(xp.module), (1,), (1,))
    out = xp.array(np.zeros(3, np.int32))
    launch(plan, make_args(plan, out=out))
    assert tuple(xp.numpy(out).tolist()) == want


@pytest.mark.full
@pytest.mark.parametrize("compiler", host_compiler.available()[1:], ids=lambda c: c.family)
def test_types_as_constants_with_every_compiler(compiler):
    with cpu.settings(cxx=" ".join(compiler.command)):
        compile_all([_type_constants("Plain<formats::Int8<float16, 4>>")], "cpu")


def test_types_in_messages_can_be_pasted():
    with pytest.raises(cupyattn.CompileError, match=r"'-DCA_FORMAT=Absent<__half, 3>'"):
        compile_all([_type_constants("Absent<float16, 3>")], "cpu")


def test_constants_that_an_option_cannot_hold_are_refused():
    for name, value in (("T", "float; int x"), ("T", 'A<"x">'), ("T", "-O0"), ("T", 1.5), ("T", None), ("t", 1),
                        ("A B", 1), ("T", "f()"), ("T", "")):
        with pytest.raises(ValueError, match="scale: constants must be UPPER_CASE names of integers, dtype names or"):
            Specialisation("scale", "scale", "ScaleArgs", {name: value})


def test_plan_prints_on_one_line():
    text = repr(_scale())
    assert "\n" not in text and "grid=(1, 1, 1)" in text and "scale" in text


def test_compile_error_shows_command_and_first_error():
    spec = Specialisation(str(KERNELS / "broken.cu"), "broken", "RmsNormArgs", {})
    with pytest.raises(cupyattn.CompileError) as caught:
        compile_all([spec], "cpu")
    message = str(caught.value)
    assert "undeclared_name" in message and "broken.cu" in message and "command: " in message
    assert host_compiler.compiler().command[0] in message


def test_recording_compiles_and_runs_nothing():
    spec = Specialisation(str(KERNELS / "broken.cu"), "broken", "RmsNormArgs", {})
    plan = Plan(spec, "cpu", (1,), (1,))
    with recording() as wanted:
        launch(plan, None)
    assert wanted == {spec: "cpu"}


def test_compile_all_reports_progress():
    seen = []
    compile_all([_scale().spec] * 2, "cpu", lambda done, total, spec: seen.append((done, total, spec.kernel)))
    assert seen == [(1, 1, "scale")]


def test_edited_header_is_a_new_kernel(tmp_path):
    (tmp_path / "part.h").write_text("constexpr int A = 1;")
    kernel = tmp_path / "k.cu"
    kernel.write_text('#include "part.h"\n')
    before = source.digest(kernel, True)
    assert [p.name for p in source.closure(kernel, True)] == ["k.cu", "part.h"]
    (tmp_path / "part.h").write_text("constexpr int A = 2;")
    source.closure.cache_clear()
    source.digest.cache_clear()
    assert source.digest(kernel, True) != before


SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_runtime import _run_scale
_run_scale()
from cupyattn.runtime import cpu
print("hits and builds", *cpu.cache_hits())
"""


def _python(code=SCRIPT, **env):
    return subprocess.run([sys.executable, "-W", "always", "-c", code], env={**os.environ, **env},
                          capture_output=True, text=True)


def test_cache_is_shared_and_survives_a_race(tmp_path):
    env = {**os.environ, "CUPYATTN_CACHE_DIR": str(tmp_path)}
    racers = [subprocess.Popen([sys.executable, "-c", SCRIPT], env=env, stdout=subprocess.PIPE, text=True)
              for _ in range(3)]
    assert [r.communicate()[0].split()[:3] for r in racers] == [["hits", "and", "builds"]] * 3
    again = _python(CUPYATTN_CACHE_DIR=str(tmp_path), CUPYATTN_FORBID_COMPILE="1")
    assert again.stdout.strip() == "hits and builds 1 0", again.stderr
    assert not [p for p in (tmp_path / "cpu").iterdir() if p.name.startswith(".")], "a temporary folder was left"


def test_forbid_compile(tmp_path):
    done = _python(CUPYATTN_CACHE_DIR=str(tmp_path), CUPYATTN_FORBID_COMPILE="1")
    assert "CompileError" in done.stderr and "CUPYATTN_FORBID_COMPILE=1 forbids" in done.stderr


def test_unwritable_cache_falls_back_with_one_warning(tmp_path):
    target = tmp_path / "file"
    target.write_text("a file where a folder should be")
    target.chmod(stat.S_IRUSR)
    done = _python(CUPYATTN_CACHE_DIR=str(target / "cache"))
    assert done.stdout.strip() == "hits and builds 0 1", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "cannot be written" in done.stderr


def test_unwritable_cache_and_several_compiling_threads(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from cupyattn.ops import rms_norm, silu_mul
from cupyattn.runtime import compile_all, cpu
compile_all(rms_norm.CORE[:3] + silu_mul.CORE[:3], "cpu")
print(*cpu.cache_hits())
"""
    done = _python(code, CUPYATTN_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.stdout.strip() == "0 6" and done.stderr.count("Warning") == 1, done.stderr


def test_moved_cache_is_still_good(tmp_path):
    _python(CUPYATTN_CACHE_DIR=str(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    done = _python(CUPYATTN_CACHE_DIR=str(tmp_path / "after"), CUPYATTN_FORBID_COMPILE="1")
    assert done.stdout.strip() == "hits and builds 1 0", done.stderr


def test_failing_copy_into_a_full_cache_falls_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "full"))

    def no_space(*args, **options):
        raise OSError(28, "No space left on device")

    whole_copy = host_compiler.shutil.copytree
    monkeypatch.setattr(host_compiler.shutil, "copytree",
                        lambda a, b, **o: no_space() if str(tmp_path) in str(b) else whole_copy(a, b, **o))
    spec = Specialisation(str(KERNELS / "scale.cu"), "scale", "ScaleArgs", {"UNUSED": 1})
    with pytest.warns(RuntimeWarning, match=r"cannot be written \(No space left on device\)"):
        compile_all([spec], "cpu")


def test_foreign_byte_order_is_refused():
    with pytest.raises(TypeError, match="rms_norm: x must be float16 .*, got float16 of foreign byte order"):
        cupyattn.rms_norm(np.ones((1, 8), ">f2"), np.ones(8, np.float32))


def test_no_compiler_says_what_to_install(tmp_path):
    code = SCRIPT.replace("from test_runtime", "from cupyattn.runtime import host_compiler\n"
                          "host_compiler.available = lambda: ()\nfrom test_runtime")
    done = _python(code, CUPYATTN_CACHE_DIR=str(tmp_path))
    assert "CompileError: no C++ compiler found" in done.stderr
    assert "apt install g++" in done.stderr and "pip install 'cupyattn[cpu]'" in done.stderr
    done = _python(CUPYATTN_CACHE_DIR=str(tmp_path), CUPYATTN_CXX="no-such-compiler")
    assert "CompileError: CUPYATTN_CXX=no-such-compiler does not run" in done.stderr


def test_debug_prints_compile_and_launch(tmp_path):
    done = _python(CUPYATTN_CACHE_DIR=str(tmp_path), CUPYATTN_DEBUG="2")
    assert "compiled scale in" in done.stderr and "launch Plan(" in done.stderr


def test_import_is_light():
    """Beside NumPy's own import in the same process, since the machine may be busy."""
    code = ("import sys, time; start = time.perf_counter(); import numpy; middle = time.perf_counter(); "
            "import cupyattn; print((time.perf_counter() - middle) / (middle - start)); "
            "print([m for m in ('cupy', 'ml_dtypes', 'typer', 'platformdirs', 'tokenizers', 'gguf') "
            "if m in sys.modules])")
    ratio, modules = min((_python(code).stdout.splitlines() for _ in range(5)), key=lambda lines: float(lines[0]))
    assert float(ratio) < 3 and modules == "[]"


def test_interrupt_stops_a_long_kernel_and_leaves_the_executor_usable(interrupts):
    plan = _scale("scale_slowly", grid=100000)
    x, out = np.ones(8, np.float32), np.zeros(1, np.float32)
    args = make_args(plan, x=x, out=out, n=8, factor=2e5)
    launch(_scale(), make_args(_scale(), x=x, out=np.zeros(8, np.float32), n=8, factor=1.0))
    compile_all([plan.spec], "cpu")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        launch(plan, args)
    assert time.perf_counter() - start < 5
    _run_scale()


def test_launches_from_several_threads():
    failures = []

    def work():
        try:
            for _ in range(50):
                _run_scale(1000)
        except Exception as error:   # reported below, in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_fork_after_launch():
    _run_scale()
    pid = os.fork()
    if pid == 0:
        try:
            _run_scale(1000)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_sanitize_finds_undefined_behaviour_flags():
    with cpu.settings(sanitize="undefined"):
        _run_scale()


def test_sanitize_address_says_what_it_needs():
    with cpu.settings(sanitize="address"), pytest.raises(cupyattn.CompileError, match="run Python with LD_PRELOAD="):
        _run_scale()
    with pytest.raises(ValueError, match="sanitize must be 'undefined' or 'address', got 'memory'"):
        with cpu.settings(sanitize="memory"):
            pass


ASAN_SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np
import cupyattn
from cupyattn.runtime import Plan, Specialisation, cpu, launch, make_args
from test_runtime import _run_scale
x, out = np.ones(4096, np.float32), np.zeros(4096, np.float32)   # NumPy keeps small ones from malloc
with cpu.settings(sanitize="address", cxx="g++"):
    _run_scale()
    cupyattn.rms_norm(x.reshape(8, 512), np.ones(512, np.float32), out=out.reshape(8, 512))
    cache = np.ones((4, 16, 2, 64), np.float16)
    cupyattn.paged_decode(np.ones((2, 4, 64), np.float16), cache, cache, cache_seqlens=np.int32([20, 32]),
                          block_table=np.int32([[0, 1], [2, 3]]))
    print("clean", flush=True)
    plan = Plan(Specialisation({str(KERNELS / "planted.cu")!r}, "read_past_end", "PlantedArgs", {{"BUG": 1}}), "cpu",
                (64,), (64,))
    launch(plan, make_args(plan, x=x, out=out, counter=np.zeros(1, np.int32), n=4096, reserved=0))
"""


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="libasan comes with g++")
def test_sanitize_address_finds_a_read_past_the_end():
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    assert os.path.isabs(library), "g++ came without libasan"
    done = _python(ASAN_SCRIPT, LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0")
    assert done.stdout == "clean\n" and done.returncode != 0, done.stderr[-2000:]
    line = (KERNELS / "planted.cu").read_text().split("args.x[i + 1]")[0].count("\n") + 1
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and f"planted.cu:{line}" in done.stderr, done.stderr


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_worker_counts(workers):
    with cpu.settings(workers=workers):
        _run_scale(100_000)


def test_settings_refuse_unknown_schedule():
    with pytest.raises(ValueError, match="schedule must be one of forward, reverse, random, got 'sideways'"):
        with cpu.settings(schedule="sideways"):
            pass
