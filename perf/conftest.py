# SPDX-License-Identifier: Apache-2.0
"""The `bench` fixture: correctness first, then time, bytes and flops per second, and share of the measured limit.

``pytest perf`` checks every bench's result once; ``pytest perf --benchmark-enable`` times them and prints the table.
"""

import importlib.util
import json

import ceilings
import numpy as np
import pytest
from timing import DEVICE, seconds_per_call

ROWS = []
_round = {"calls": 1}


def now():
    """The device's clock, slowed down so that a round of several calls reads as one call's time."""
    return DEVICE.now() / _round["calls"]


def on_device(host):
    """Copies of arrays and QMatrix objects on the device."""
    return [a.to(DEVICE.xp) if hasattr(a, "to") else DEVICE.array(a) for a in host]


def baseline_seconds(baseline, sets):
    """Time of the array library's version; on the CPU the better of all BLAS threads and, with threadpoolctl, one.

    On busy cores the threads of a small product wait for each other a hundred times longer than they compute.
    """
    seconds = seconds_per_call(baseline, sets)
    if not DEVICE.is_gpu and importlib.util.find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            seconds = min(seconds, seconds_per_call(baseline, sets))
    return seconds


class Bench:
    """Measures one call; see `__call__`."""

    def __init__(self, benchmark, op, rows_file):
        self._benchmark = benchmark
        self._op = op
        self._rows_file = rows_file

    def __call__(self, shape, make, call, expected, *, tolerance, nbytes, flops=0, baseline=None, checked=None,
                 matmul=False):
        """Check `call` against `expected`, then time it.

        Parameters
        ----------
        shape : str
            Row label: model, batch, dtype.
        make : callable
            ``make(rng)`` returns a tuple of NumPy arrays and QMatrix objects in host memory, outputs included.
        call : callable
            ``call(*arrays)`` runs the op without allocating and returns the array to check.
        expected : callable
            ``expected(*numpy arrays)``: the reference result.
        tolerance : (float, float)
            atol and rtol of the check.
        nbytes, flops : int
            What one call must move and compute.
        baseline : callable, optional
            ``baseline(*arrays)``: the same result by the array library alone.
        checked : callable, optional
            The part of `call`'s result, as a NumPy array, that `expected` gives; default all of it.
        matmul : bool
            The row also says what share of a large plain product's rate was reached.
        """
        host = make(np.random.default_rng(1))
        arrays = on_device(host)
        result = DEVICE.numpy(call(*arrays))
        result = (result if checked is None else checked(result)).astype(np.float64)
        np.testing.assert_allclose(result, np.asarray(expected(*host)).astype(np.float64), atol=tolerance[0],
                                   rtol=tolerance[1], err_msg=f"{self._op} {shape}: nothing is timed that is wrong")
        if self._benchmark.disabled:
            self._benchmark(lambda: None)
            return
        copies = DEVICE.copies(sum(a.nbytes for a in arrays))
        sets = [arrays, *(on_device(host) for _ in range(copies - 1))]
        calls = _round["calls"] = DEVICE.calls_for(seconds_per_call(call, sets, rounds=1))
        self._benchmark.pedantic(DEVICE.repeated(call, sets, calls), rounds=20, warmup_rounds=2)
        seconds = self._benchmark.stats.stats.median
        row = {"op": self._op, "shape": shape, "device": DEVICE.name, "nbytes": nbytes, "flops": flops,
               "calls_per_round": calls, "seconds": seconds,
               "share_of_read_bandwidth": nbytes / seconds / ceilings.read_bandwidth()}
        if matmul:
            row["share_of_matmul_rate"] = flops / seconds / ceilings.matmul_rate()
        try:
            if baseline is not None:
                row["baseline_seconds"] = baseline_seconds(baseline, sets)
        finally:
            self._keep(row)

    def _keep(self, row):
        self._benchmark.extra_info.update(row)
        ROWS.append(row)
        if self._rows_file:  # at once: a run stopped by a time limit keeps what it measured
            with open(self._rows_file, "a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture
def bench(benchmark, request):
    """A `Bench` for the op the file is named after."""
    return Bench(benchmark, request.path.stem.removeprefix("bench_"), request.config.getoption("--rows"))


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="FILE", help="append one JSON line per timed bench to FILE")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith("bench_"):
            item.add_marker(pytest.mark.benchmark(timer=now, group=item.path.stem.removeprefix("bench_")))


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        from table import markdown

        terminalreporter.write_line(markdown(ROWS))
