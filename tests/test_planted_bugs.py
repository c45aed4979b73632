# SPDX-License-Identifier: Apache-2.0
"""The checking mode catches every planted fault, with every compiler found, and lets the clean twins pass."""

import re
from pathlib import Path

import numpy as np
import pytest

import cupyattn
from cupyattn.runtime import Plan, Specialisation, host_compiler, launch, make_args
from cupyattn.runtime.cpu import counters, settings

SOURCE = Path(__file__).parent / "kernels" / "planted.cu"
FAULTS = {
    "read_past_end": {"out_of_bounds"}, "write_past_end": {"out_of_bounds"}, "write_to_input": {"read_only_write"},
    "shared_overrun": {"out_of_bounds", "race"}, "uninitialised_shared": {"uninitialised_shared"},
    "uninitialised_static": {"uninitialised_shared"}, "missing_barrier": {"race", "uninitialised_shared"},
    "missing_second_barrier": {"race"}, "missing_syncwarp": {"race", "uninitialised_shared"},
    "divergent_barrier": {"divergent_barrier"}, "barrier_after_exit": {"divergent_barrier"},
    "divergent_shuffle": {"collective_mismatch"}, "different_collectives": {"collective_mismatch"},
    "early_async_read": {"uninitialised_shared"}, "misaligned_async": {"misaligned"}, "deadlock": {"deadlock"},
    "producer_consumer": {"race", "uninitialised_shared"}, "blocks_collide": {"global_race"},
    "reads_other_block": {"global_race"}, "global_race_in_block": {"race"}, "last_block_reduces": {"global_race"},
    "shared_atomics": {"race"}, "misaligned_vector": {"misaligned"}, "overwritten_while_read": {"race"},
    "announced_too_early": {"global_race"}, "shuffle_in_two_branches": {"collective_mismatch"},
    "deep_recursion": {"stack_overflow"},
}
MANY_BLOCKS = {"blocks_collide", "reads_other_block", "last_block_reduces", "announced_too_early"}
COMPILERS = [pytest.param(c, id=c.family, marks=[pytest.mark.full] if i else [])
             for i, c in enumerate(host_compiler.available())]


def _sector_aligned(n):
    """float32 [n] starting at a multiple of 32 bytes, as every GPU allocation does."""
    raw = np.empty(n + 8, np.float32)
    start = -raw.__array_interface__["data"][0] % 32 // 4
    return raw[start:start + n]


def _launch(kernel, bug):
    blocks = 4 if kernel in MANY_BLOCKS else 1
    n = 64 * blocks
    spec = Specialisation(str(SOURCE), kernel, "PlantedArgs", {"BUG": bug})
    plan = Plan(spec, "cpu", (blocks,), (64,), shared_bytes=512 if kernel == "early_async_read" else 256)
    x, out, counter = _sector_aligned(n), _sector_aligned(n), np.zeros(1, np.int32)
    x[:], out[:] = np.arange(n), 0
    launch(plan, make_args(plan, x=x, out=out, counter=counter, n=n, reserved=0))
    return out


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("kernel", FAULTS)
def test_fault_is_caught_and_twin_passes(kernel, compiler):
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 3)):
        with settings(check=True, schedule=schedule, seed=seed, cxx=" ".join(compiler.command)):
            with pytest.raises(cupyattn.KernelCheckError) as caught:
                _launch(kernel, 1)
            _launch(kernel, 0)
        error = caught.value
        assert error.kind in FAULTS[kernel], error
        assert error.kernel == kernel and max(error.thread) < 64
        # the line named is one of the kernel's own, or of the function it calls
        text = SOURCE.read_text()
        name, line = re.fullmatch(r"(.*\.cu|.*\.cuh):(\d+)", error.location).groups()
        start = "float nested(" if kernel == "deep_recursion" else f"void {kernel}("
        first = text[:text.index(start)].count("\n") + 1
        last = first + text[text.index(start):].split("\n}")[0].count("\n")
        assert Path(name).suffix == ".cuh" or first <= int(line) <= last, error


def test_message_names_argument_line_block_and_thread():
    with settings(check=True), pytest.raises(cupyattn.KernelCheckError) as caught:
        _launch("read_past_end", 1)
    message = str(caught.value)
    assert re.search(r"read_past_end: out of bounds at \S*planted\.cu:\d+, block \(0, 0, 0\), thread \(63, 0, 0\): "
                     r"4-byte read 0 bytes past the end of a buffer of 256 bytes \(argument x\)", message), message
    with settings(check=True), pytest.raises(cupyattn.KernelCheckError) as caught:
        _launch("missing_second_barrier", 1)
    assert caught.value.other_location and "the other access" in str(caught.value)


def test_an_unchecked_launch_does_not_notice():
    assert _launch("divergent_barrier", 1).any()   # both barriers open together: right values, undefined on a GPU


def test_executor_works_after_every_kind_of_failure():
    for kernel in FAULTS:
        with settings(check=True), pytest.raises(cupyattn.KernelCheckError):
            _launch(kernel, 1)
    assert _launch("shared_atomics", 0).tolist() == [64.0] * 64


def test_deadlock_is_reported_without_checking_too():
    with pytest.raises(cupyattn.KernelCheckError, match="deadlock") as caught:
        _launch("deadlock", 1)
    assert caught.value.kind == "deadlock"


def test_counters():
    with settings(check=True), counters() as launches:
        _launch("missing_barrier", 0)
    counts, buffers = launches[0].counts, launches[0].buffers
    assert launches[0].kernel == "missing_barrier"
    assert counts["blocks"] == 1 and counts["threads"] == 64 and counts["barriers"] == 64
    assert buffers["x"] == {"bytes_read": 256, "bytes_written": 0, "sectors_read": 8, "sectors_written": 0}
    assert buffers["out"] == {"bytes_read": 0, "bytes_written": 256, "sectors_read": 0, "sectors_written": 8}
    assert launches[0].shared == {"read": {"requests": 2, "conflicts": 0, "max_ways": 1},
                                  "write": {"requests": 2, "conflicts": 0, "max_ways": 1},
                                  "ldmatrix": {"requests": 0, "conflicts": 0, "max_ways": 0},
                                  "cp_async": {"requests": 0, "conflicts": 0, "max_ways": 0}}
    assert launches[0].conflicts == {}
