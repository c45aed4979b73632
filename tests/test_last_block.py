# SPDX-License-Identifier: Apache-2.0
"""The last block of a unit merges what the others left: right on any number of OS threads, and judged when checked."""

from pathlib import Path

import numpy as np
import pytest
from conftest import NumpyArrays

import cupyattn
from cupyattn.runtime import Plan, Specialisation, arch_of, launch, make_args
from cupyattn.runtime.cpu import settings

SOURCE = str(Path(__file__).parent / "kernels" / "last_block.cu")
WAYS = ("all fence", "thread 0 fences", "thread 0 acquires",
        "no fence", "one thread without fence", "fence of the block", "fence before write", "no barrier", "no atomic",
        "plain count", "other counter", "reader passes by", "no acquire", "reset unseen")
LEGAL_WAYS, FAULTS = WAYS[:3], WAYS[3:]
NUMPY = NumpyArrays()
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


class Units:
    """`units` units of `pieces` blocks of 64 threads, counters kept from one launch to the next."""

    def __init__(self, xp, way, pieces=5, units=3, kernel="last_block"):
        spec = Specialisation(SOURCE, kernel, "LastBlockArgs", {"WAY": WAYS.index(way)})
        self._xp = xp
        self._plan = Plan(spec, arch_of(xp.module), (pieces, units), (64,), shared_bytes=64)
        self.x = np.arange(units, dtype=np.float32) * 100
        self.want = (self.x[:, None] + np.arange(64)) * pieces + pieces * (pieces - 1) / 2
        self._arrays = {"x": xp.array(self.x), "counters": xp.array(np.zeros(2 * units, np.int32)),
                        "partials": xp.array(np.full((units, pieces, 64), np.nan, np.float32))}

    def launch(self):
        """(out, counters) of one launch."""
        out = self._xp.array(np.full(self.want.shape, np.nan, np.float32))
        launch(self._plan, make_args(self._plan, out=out, **self._arrays))
        return self._xp.numpy(out), self._xp.numpy(self._arrays["counters"])


@pytest.mark.parametrize("way", LEGAL_WAYS)
def test_last_block_merges(xp, way):
    units = Units(xp, way, pieces=7, units=40)
    for _ in range(20):   # the counters reset themselves
        out, counters = units.launch()
        np.testing.assert_array_equal(out, units.want)
        assert not counters.any()


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_on_several_os_threads(workers, schedule, seed):
    units = Units(NUMPY, "all fence", pieces=11, units=50)
    with settings(workers=workers, schedule=schedule, seed=seed):
        for _ in range(50):
            out, counters = units.launch()
            np.testing.assert_array_equal(out, units.want)
            assert not counters.any()


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize("way", LEGAL_WAYS)
def test_legal_ways_are_clean(way, schedule, seed):
    units = Units(NUMPY, way)
    with settings(check=True, schedule=schedule, seed=seed):
        np.testing.assert_array_equal(units.launch()[0], units.want)


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize("way", FAULTS)
def test_faults_are_reported(way, schedule, seed):
    with settings(check=True, schedule=schedule, seed=seed), pytest.raises(cupyattn.KernelCheckError) as caught:
        Units(NUMPY, way).launch()
    assert caught.value.kind == "global_race", caught.value
    assert caught.value.argument in ("partials", "counters") and caught.value.other_location


def test_knowledge_passes_through_a_third_block():
    with settings(check=True):
        out, _ = Units(NUMPY, "all fence", pieces=3, units=1, kernel="chain").launch()
        assert out[0, 0] == 0
        for way in ("no fence", "no acquire"):
            with pytest.raises(cupyattn.KernelCheckError) as caught:
                Units(NUMPY, way, pieces=3, units=1, kernel="chain").launch()
            assert caught.value.kind == "global_race" and caught.value.block == (2, 0, 0)
