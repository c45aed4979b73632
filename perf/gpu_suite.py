# SPDX-License-Identifier: Apache-2.0
"""Everything worth knowing on a machine with a GPU, in one command and a time budget.

    python perf/gpu_suite.py --budget-s 480 --out DIR

Runs from a checkout without being installed and without a network; needs numpy, ml_dtypes, cupy, pytest,
pytest-benchmark, hypothesis and onnxruntime; with pytest-xdist the tests run in several processes, without it they take
longer than the default budget. Steps, most important first: the executor's instruction models against
the hardware, the tests marked gpu, the ceilings (read bandwidth, launch overhead), a whole model (tokens per second,
then against the CPU executor, which needs a host C++ compiler), the benches. A step that runs out of its share of the
budget is interrupted and keeps what it has. Writes ``DIR/<gpu>.json`` (to be kept as ``perf/results/<gpu>.json``), one
log per step and the kernel caches; prints the tables.
Exit code 0: every step passed; 1: one failed or ran out of time; 2: no GPU.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "ml_dtypes", "cupy-cuda13x", "cupy-cuda12x", "pytest", "pytest-benchmark", "hypothesis",
            "onnxruntime")
# the step's name and the share of what is left of the budget that it may use
STEPS = (("conformance", 0.3), ("gpu_tests", 0.5), ("ceilings", 0.3), ("model", 0.5), ("benches", 1.0))
GRACE = 20   # seconds that a step has for its report when its time is over
# benches in order of importance; files not named come last
BENCH_ORDER = ("paged_decode", "attention", "quant_gemm", "kv_append", "schedule", "kv_flatten", "split_reduce", "rope",
               "rms_norm")


def bench_files():
    """Bench files of the ops, the important ones first; bench_generate is about NumPy on the CPU."""
    rank = {f"bench_{stem}.py": i for i, stem in enumerate(BENCH_ORDER)}
    files = set((ROOT / "perf").glob("bench_*.py")) - {ROOT / "perf" / "bench_generate.py"}
    return sorted(files, key=lambda f: (rank.get(f.name, len(rank)), f.name))


def command(step, out):
    """Command line of a step."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / step}.xml",
              "-o", "faulthandler_timeout=60"]   # says where a kernel that does not end was waited for
    tests = [*pytest, "-m", "gpu and not full"]
    if importlib.util.find_spec("xdist") and step != "benches":   # compiling takes most of the time
        tests += ["-n", str(max(1, min(12, len(os.sched_getaffinity(0)) - 2))), "--dist", "worksteal"]
    if step == "conformance":
        return [*tests, "tests/test_instructions.py"]
    if step == "gpu_tests":
        return [*tests, "--continue-on-collection-errors", "--deselect", "tests/test_instructions.py", "tests"]
    if step == "benches":
        rows = out / "benches.jsonl"
        return [*pytest, "--benchmark-enable", "--benchmark-columns=median,iqr,rounds", f"--rows={rows}",
                *map(str, bench_files())]
    return [sys.executable, str(ROOT / "perf" / "gpu_suite.py"), "--step", step, "--out", str(out)]


def run_step(step, out, seconds):
    """Run one step for at most `seconds`; its record for the JSON file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "CUPYATTN_CACHE_DIR": str(out / "cache"), "CUPY_CACHE_DIR": str(out / "cupy-cache")}
    started = time.monotonic()
    with open(out / f"{step}.log", "w") as log:
        # a job in the background begins with Ctrl-C ignored, and so would what it starts
        process = subprocess.Popen(command(step, out), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        code = _wait(process, seconds)
    record = {"step": step, "status": {0: "passed", None: "out of time"}.get(code, "failed"),
              "seconds": round(time.monotonic() - started, 1)}
    record.update(test_counts(out / f"{step}.xml"))
    record.update(_lines_as_dict(out / f"{step}.jsonl") if step in ("ceilings", "model") else {})
    if record["status"] != "passed":
        record["log_tail"] = (out / f"{step}.log").read_text(errors="replace")[-1500:]
    return record


def _wait(process, seconds):
    """Exit code; None when `seconds` were not enough. Then Ctrl-C first: pytest writes its report."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        process.kill()
        process.wait()


def test_counts(report):
    """Numbers of passed, failed and skipped tests, and the names of the failed ones, from a JUnit file."""
    if not report.is_file():
        return {}
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ET.parse(report).iter("testcase"):
        outcome = {child.tag for child in case}
        if outcome & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in outcome else "passed"] += 1
    return {**counts, **({"failed_tests": failed[:50]} if failed else {})}


def _json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _lines_as_dict(file):
    return {key: value for line in _json_lines(file) for key, value in line.items()}


def measure(step, out):
    """The steps that are no pytest run; writes one JSON line per result, so a time limit keeps the earlier ones."""
    def keep(**result):
        print(result)
        with open(out / f"{step}.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")

    sys.path.insert(0, str(ROOT / "perf"))
    if step == "ceilings":
        import bench_q_attn
        import ceilings
        import launch_cost

        keep(launch_seconds=ceilings.launch_overhead())
        keep(python_seconds=launch_cost.measure(ceilings.DEVICE.xp, ceilings.DEVICE.array))
        keep(q_attn_seconds=bench_q_attn.python_cost(ceilings.DEVICE.xp, ceilings.DEVICE.array)[0])
        keep(read_bytes_per_second=ceilings.read_bandwidth())
        return 0
    import model_path

    from cupyattn import CompileError
    from cupyattn.runtime import host_compiler

    for batch in (1, 8, 64):
        keep(**{f"decode_tokens_per_second_batch_{batch}": model_path.tokens_per_second(batch)})
    try:
        host_compiler.compiler()
    except CompileError as error:
        keep(against_cpu_executor=f"no host compiler: {error}")
        return 1   # the speeds are kept, but nothing says that the tokens are right
    passed = True
    for dtype in model_path.BOUNDS:
        result = model_path.compare_with_cpu(dtype)
        keep(**{f"against_cpu_executor_{dtype}": result})
        passed &= result["passed"]
    return 0 if passed else 1


def environment_record(gpu):
    """What the numbers depend on."""
    import cupy

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    runtime = cupy.cuda.runtime
    return {"gpu": gpu, "date": datetime.date.today().isoformat(), "commit": git.stdout.strip() or None,
            "driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion(),
            "versions": {name: found for name in PACKAGES if (found := version(name))}}


def summary(results):
    """The printed report of a results file."""
    from table import markdown

    lines = [f"{results['gpu']}, {results['date']}, commit {results['commit']}", "",
             "| step | status | seconds | passed | failed | skipped |", "|---|---|---:|---:|---:|---:|"]
    for step in results["steps"]:
        counts = " | ".join(str(step.get(key, "")) for key in ("passed", "failed", "skipped"))
        lines.append(f"| {step['step']} | {step['status']} | {step['seconds']} | {counts} |")
        lines += [f"| | failed: `{name}` | | | | |" for name in step.get("failed_tests", ())]
    for step in results["steps"]:
        if step["step"] in ("ceilings", "model"):
            known = ("step", "status", "seconds", "log_tail")
            lines += ["", *(f"{key}: {value}" for key, value in step.items() if key not in known)]
    if results["benches"]:
        lines += ["", markdown(results["benches"])]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for everything (default 480)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results, logs and kernel caches")
    parser.add_argument("--step", choices=("ceilings", "model"), help="run one measuring step in this process")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.step:
        return measure(options.step, out)
    sys.path[:0] = [str(ROOT), str(ROOT / "perf")]
    from timing import DEVICE

    if not DEVICE.is_gpu:
        print("gpu_suite: no NVIDIA GPU that CuPy can use; nothing was measured", file=sys.stderr)
        return 2
    end = time.monotonic() + options.budget_s
    results = {**environment_record(DEVICE.name), "budget_s": options.budget_s, "steps": [], "benches": []}
    target = out / f"{re.sub('[^a-z0-9]+', '-', DEVICE.name.lower()).strip('-')}.json"
    for step, share in STEPS:
        for old in (f"{step}.jsonl", f"{step}.xml"):
            (out / old).unlink(missing_ok=True)
        record = run_step(step, out, max(1.0, share * (end - time.monotonic() - 5)))
        results["steps"].append(record)
        results["benches"] = _json_lines(out / "benches.jsonl")
        target.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{step}: {record['status']}, {record['seconds']} s", flush=True)
    print(summary(results))
    print(f"written to {target}")
    return 0 if all(step["status"] == "passed" for step in results["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
