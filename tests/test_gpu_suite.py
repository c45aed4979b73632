# SPDX-License-Identifier: Apache-2.0
"""perf/ without a GPU: its GPU code runs on the stand-in, its steps with commands that only pretend."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cupy
import gpu_suite
import numpy as np
import pytest
import standin
import table
import timing

import cupyattn
from cupyattn.models import SMOLLM2_135M
from cupyattn.runtime.cpu import counters, settings

ROOT = Path(__file__).parent.parent
ROW = {"op": "rope", "shape": "llama3-8b tokens 1", "device": "Pretend GPU 9000", "nbytes": 10**6, "flops": 10**6,
       "seconds": 1e-6, "share_of_read_bandwidth": 0.5, "baseline_seconds": 4e-6}


def run(*arguments, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


@pytest.mark.parametrize("script", ["gpu_suite.py", "compare.py"])
def test_help(script):
    done = run(ROOT / "perf" / script, "--help")
    assert done.returncode == 0 and "usage" in done.stdout


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run(ROOT / "perf" / "gpu_suite.py", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu_suite: no NVIDIA GPU that CuPy can use; nothing was measured\n"


def pretended(step, out):
    """Commands that leave what the real steps leave: one fails, one never ends."""
    code = {
        "conformance": "import sys; open(sys.argv[1] + '/conformance.xml', 'w').write('<s><testcase classname=\"t\" "
                       "name=\"a\"/><testcase classname=\"t\" name=\"b\"><failure/></testcase></s>'); sys.exit(1)",
        "gpu_tests": "import time\nprint('started', flush=True)\ntry: time.sleep(60)\nfinally: print('report')",
        "ceilings": "import sys; open(sys.argv[1] + '/ceilings.jsonl', 'w').write('{\"read_bytes_per_second\": 1.0}')",
        "model": "print('fine')",
        "benches": f"import json, sys; open(sys.argv[1] + '/benches.jsonl', 'w').write(json.dumps({ROW!r}))",
    }[step]
    return [sys.executable, "-c", code, str(out)]


def test_results_file_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "command", pretended)
    shares = {"conformance": 0.5, "gpu_tests": 0.1, "ceilings": 0.5, "model": 0.5, "benches": 1.0}
    monkeypatch.setattr(gpu_suite, "STEPS", tuple(shares.items()))
    monkeypatch.setattr(gpu_suite, "environment_record", lambda gpu: {"gpu": gpu, "date": "today", "commit": "abc"})
    monkeypatch.setattr(timing, "DEVICE", SimpleNamespace(is_gpu=True, name="Pretend GPU 9000"))
    assert gpu_suite.main(["--budget-s", "25", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "pretend-gpu-9000.json").read_text())
    status = {step["step"]: step["status"] for step in results["steps"]}
    assert status == {"conformance": "failed", "gpu_tests": "out of time", "ceilings": "passed", "model": "passed",
                      "benches": "passed"}
    conformance, gpu_tests, ceilings = results["steps"][:3]
    assert (conformance["passed"], conformance["failed"], conformance["failed_tests"]) == (1, 1, ["t::b"])
    assert "started\nreport" in gpu_tests["log_tail"] and ceilings["read_bytes_per_second"] == 1.0
    assert results["benches"] == [ROW]
    printed = capsys.readouterr().out
    assert "| conformance | failed |" in printed and "`t::b`" in printed
    assert "| rope | llama3-8b tokens 1 | 1.0 | 1000.0 GB/s | 50% | 4.00x |" in printed


def test_every_step_names_files_that_exist(tmp_path):
    for step, share in gpu_suite.STEPS:
        assert 0 < share <= 1
        for argument in gpu_suite.command(step, tmp_path):
            if argument.endswith(".py"):
                assert (ROOT / argument).is_file(), argument
    order = [f.stem.removeprefix("bench_") for f in gpu_suite.bench_files()]
    assert order[:len(gpu_suite.BENCH_ORDER)] == list(gpu_suite.BENCH_ORDER)


@pytest.mark.parametrize("folder", ["tests", "perf"])
def test_gpu_machine_needs_no_more_than_promised(folder):
    """Everything collects without the packages that gpu_suite does not list."""
    code = f"""
import sys
import pytest
class Hide:
    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self):
        for name in ("platformdirs", "typer", "rich", "gguf", "tokenizers", "onnx", "safetensors", "cuda.bindings",
                     "ziglang"):
            sys.modules[name] = None   # as if it were not installed
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", {folder!r}], plugins=[Hide()]))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_table_of_a_results_file(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"benches": [ROW, {**ROW, "flops": 10**9, "device": "other"}]}))
    table.main([file])
    printed = capsys.readouterr().out
    assert printed.startswith("Measured on: Pretend GPU 9000\n") and "\n\nMeasured on: other\n" in printed
    assert printed.count("1000.0 GB/s") == 2 and printed.count("1000.0 GB/s, 1000.00 TFLOP/s") == 1


def test_comparison_of_two_runs():
    spec = importlib.util.spec_from_file_location("perf_compare", ROOT / "perf" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    before = compare.lower({("rope", "a"): 4e-6, ("rope", "b"): 1e-6}, {("rope", "a"): 3e-6})
    text = compare.comparison("main", before, {("rope", "a"): 1.5e-6, ("new", "c"): 1e-6})
    assert "| rope | a | 3.0 | 1.5 | 2.00x |" in text and "new" not in text


@pytest.fixture
def pretended_gpu(monkeypatch):
    """`timing.Gpu` over the stand-in, in place of the device of the perf modules."""
    with standin.install():
        properties = {**cupy.cuda.runtime.getDeviceProperties(0), "l2CacheSize": 4096}
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda device: properties)
        monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (2**20, 2**21))
        gpu = timing.Gpu(cupy)
        import ceilings

        for module in (timing, ceilings):
            monkeypatch.setattr(module, "DEVICE", gpu)
        yield gpu


def perf_conftest():
    spec = importlib.util.spec_from_file_location("perf_conftest", ROOT / "perf" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bench_on_a_gpu(pretended_gpu, tmp_path, monkeypatch):
    """Correctness gate, capture over rotating copies, rows on disk."""
    monkeypatch.setattr(type(pretended_gpu), "calls_for", lambda self, seconds: 5)
    perf = perf_conftest()
    monkeypatch.setattr(perf.ceilings, "read_bandwidth", lambda: 1e9)
    timed = []
    stats = SimpleNamespace(stats=SimpleNamespace(median=1e-3))
    benchmark = SimpleNamespace(disabled=False, extra_info={}, stats=stats,
                                pedantic=lambda run, rounds, warmup_rounds: timed.extend(run() for _ in range(2)))
    seen = set()

    def call(x, weight, out):
        seen.add(x.data.ptr)
        return cupyattn.rms_norm(x, weight, out=out)

    bench = perf.Bench(benchmark, "rms_norm", tmp_path / "rows.jsonl")
    x = np.ones((2, 64), np.float16)
    arguments = {"make": lambda rng: (x, np.ones(64, np.float32), np.zeros_like(x)), "call": call,
                 "tolerance": (1e-3, 0), "nbytes": 512}
    def baseline(x, weight, out):
        if cupy.cuda.get_current_stream().is_capturing():   # as CuPy's matmul does
            raise NotImplementedError

    bench("small", expected=lambda x, weight, out: x, baseline=baseline, **arguments)
    assert len(timed) == 2 and len(seen) == 5            # 5 calls over 4 * L2 / 768 bytes = 22 copies
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row == benchmark.extra_info and row["device"] == "stand-in" and row["calls_per_round"] == 5
    assert row["share_of_read_bandwidth"] == pytest.approx(512 / 1e-3 / 1e9) and row["baseline_seconds"] >= 0
    with pytest.raises(AssertionError, match="nothing is timed that is wrong"):
        bench("small", expected=lambda x, weight, out: x + 1, **arguments)


def test_read_bandwidth_of_the_cpu(monkeypatch):
    import ceilings

    monkeypatch.setattr(ceilings, "DEVICE", timing.CpuExecutor())
    ceilings.read_bandwidth.cache_clear()
    assert 1e8 < ceilings.read_bandwidth(2**24) < 1e13
    ceilings.read_bandwidth.cache_clear()


def test_ceilings_on_a_gpu(pretended_gpu):
    import ceilings

    launches = ceilings.launch_overhead()
    assert set(launches) == {"rms_norm call, host", "rms_norm in a graph"} and min(launches.values()) > 0
    ceilings.read_bandwidth.cache_clear()
    assert ceilings.read_bandwidth(2**16) > 0
    ceilings.read_bandwidth.cache_clear()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_model_path(monkeypatch, dtype):
    import model_path

    monkeypatch.setattr(model_path, "DEVICE", timing.CpuExecutor())
    small = replace(SMOLLM2_135M, num_layers=2, vocab_size=512)
    result = model_path.compare_with_cpu(dtype, config=small, tokens=9)
    assert result["passed"] and result["tokens"] == 9
    if dtype == "float16":
        assert model_path.tokens_per_second(2, config=small, new_tokens=3) > 0
        monkeypatch.setitem(model_path.BOUNDS, dtype, {"max": -1.0, "median": 1.0})
        assert not model_path.compare_with_cpu(dtype, config=small, tokens=3)["passed"]


def test_model_step_without_a_host_compiler(monkeypatch, tmp_path):
    """The GPU's speed is kept, the reason why nothing was compared too, and the step has not passed."""
    import model_path

    monkeypatch.setattr(model_path, "tokens_per_second", lambda batch: 100.0 * batch)
    monkeypatch.setattr(model_path, "compare_with_cpu", lambda dtype: {"passed": True})
    assert gpu_suite.measure("model", tmp_path) == 0
    (tmp_path / "model.jsonl").unlink()
    monkeypatch.setenv("CUPYATTN_CXX", "no-such-compiler")
    assert gpu_suite.measure("model", tmp_path) == 1
    *speeds, reason = map(json.loads, (tmp_path / "model.jsonl").read_text().splitlines())
    assert speeds == [{f"decode_tokens_per_second_batch_{batch}": 100.0 * batch} for batch in (1, 8, 64)]
    assert reason["against_cpu_executor"].startswith("no host compiler: ")


@pytest.mark.parametrize("pieces", [1, 1000, 4096])
def test_read_bandwidth_reads_everything_once(pieces):
    import ceilings

    x, out = np.zeros((pieces, 4), np.uint32), np.zeros(1, np.uint32)
    with settings(check=True), counters() as launches:
        ceilings.read_all(x, out)
    read = launches[0].buffers["x"]["bytes_read"]
    assert x.nbytes <= read <= x.nbytes + 16 * 8 * 8   # the last round reads some pieces twice
    assert launches[0].buffers["out"]["bytes_written"] == 0
    x[...] = 2**32 - 1
    ceilings.read_all(x, out)
    assert out[0] == 2**32 - 1


def test_clock_follows_the_device(pretended_gpu):
    first = pretended_gpu.now()
    assert 0 <= first < pretended_gpu.now()
