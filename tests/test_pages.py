# SPDX-License-Identifier: Apache-2.0
"""PageManager: examples, errors, threads, and a model that watches every page."""

import threading
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from cupyattn.paging.pages import PageManager


def test_first_in_first_out_with_a_dummy_page():
    manager = PageManager(10, 4, reserved=[0])
    assert manager.allocate(3) == [1, 2, 3]
    assert manager.allocate(0) == []
    assert manager.allocate(-1) == []
    assert manager.allocate(7) == []  # six are free
    assert manager.allocate_tokens(9) == [4, 5, 6]
    assert manager.allocate_tokens(8) == [7, 8]
    assert manager.allocate_tokens(0) == []
    assert manager.num_free == 1
    manager.free([2, 1])
    assert manager.allocate(3) == [9, 2, 1]


def test_capacity():
    assert PageManager(10, 4).capacity == 10
    assert PageManager(10, 4, reserved=[0]).capacity == 9
    assert PageManager(1, 4, reserved=[0]).allocate(1) == []
    assert PageManager(0, 4).allocate(1) == []
    assert repr(PageManager(3, 4, reserved=[2])) == "PageManager(num_pages=3, page_size=4, reserved=[2], num_free=2)"


def test_grow():
    manager = PageManager(4, 16)
    pages = manager.allocate_tokens(16)
    assert manager.grow(pages, 16) and pages == [0]
    assert manager.grow(pages, 17) and pages == [0, 1]
    assert manager.grow(pages, 5) and pages == [0, 1]
    assert not manager.grow(pages, 65)
    assert pages == [0, 1] and manager.num_free == 2
    assert manager.grow(pages, 64) and pages == [0, 1, 2, 3]


def test_a_tuple_does_not_grow_and_costs_no_page():
    manager = PageManager(4, 16)
    with pytest.raises(TypeError, match=r"^PageManager.grow: pages must be a list, to be extended, got tuple"):
        manager.grow(tuple(manager.allocate(1)), 40)
    assert manager.num_free == 3


def test_share():
    manager = PageManager(4, 16)
    first = manager.allocate(2)
    second = manager.share(first)
    assert second == first and second is not first
    assert manager.ref_count(0) == 2
    manager.free(first)
    assert manager.num_free == 2 and manager.ref_count(0) == 1
    manager.free(second)
    assert manager.num_free == 4 and manager.ref_count(0) == 0


@pytest.mark.parametrize(("pages", "message"), [
    ([5], "page 5, which is already free"),
    ([0], "page 0, which is reserved"),
    ([10], r"10, which is no page id in \[0, 10\)"),
    ([-1], "-1, which is no page id"),
    (["a"], "'a', which is no page id"),
    ([2, 1, 1], "page 1 2 times with 1 holder$"),
    ([1, 5], "page 5"),
])
def test_bad_frees_are_refused_and_change_nothing(pages, message):
    manager = PageManager(10, 4, reserved=[0])
    manager.allocate(3)
    with pytest.raises(ValueError, match=rf"^PageManager.free: pages must .*{message}"):
        manager.free(pages)
    assert manager.num_free == 6
    assert [manager.ref_count(page) for page in range(5)] == [0, 1, 1, 1, 0]
    manager.free([1, 2, 3])
    with pytest.raises(ValueError, match="page 1, which is already free"):
        manager.free([1])


def test_sharing_a_free_page_is_refused_and_changes_nothing():
    manager = PageManager(10, 4)
    manager.allocate(1)
    with pytest.raises(ValueError, match=r"^PageManager.share: pages must be in use, got page 4, which is already"):
        manager.share([0, 4])
    assert manager.ref_count(0) == 1


def test_slots_for():
    manager = PageManager(10, 4)
    slots = manager.slots_for([7, 3], [0, 3, 4, 7])
    assert slots.dtype == np.int64
    assert slots.tolist() == [28, 31, 12, 15]
    assert manager.slots_for([], []).tolist() == []
    huge = PageManager(2**10, 2**30).slots_for([2**10 - 1], [5])
    assert huge.tolist() == [(2**10 - 1) * 2**30 + 5]
    with pytest.raises(TypeError, match="slots_for: positions must be integers, got float64"):
        manager.slots_for([7, 3], [0.5])
    for bad in ([8], [-1]):
        with pytest.raises(ValueError, match=r"slots_for: positions must be in \[0, 8\)"):
            manager.slots_for([7, 3], bad)


def test_block_table():
    manager = PageManager(10, 4)
    table = manager.block_table([[7, 3], [], [1]])
    assert table.dtype == np.int32
    assert table.tolist() == [[7, 3], [-1, -1], [1, -1]]
    assert manager.block_table([[1]], max_pages=3).tolist() == [[1, -1, -1]]
    assert manager.block_table([[], []]).shape == (2, 1)
    with pytest.raises(ValueError, match="max_pages must be at least 2, the longest sequence, got 1"):
        manager.block_table([[7, 3]], max_pages=1)


@pytest.mark.parametrize(("error", "argument", "call"), [
    (ValueError, "num_pages", lambda: PageManager(-1, 4)),
    (TypeError, "num_pages", lambda: PageManager(2.0, 4)),
    (ValueError, "page_size", lambda: PageManager(4, 0)),
    (TypeError, "page_size", lambda: PageManager(4, True)),
    (ValueError, "reserved", lambda: PageManager(4, 4, reserved=[4])),
    (ValueError, "reserved", lambda: PageManager(4, 4, reserved=[-1])),
    (ValueError, "num_tokens", lambda: PageManager(4, 4).allocate_tokens(-1)),
    (TypeError, "num_tokens", lambda: PageManager(4, 4).grow([], 1.5)),
    (TypeError, "count", lambda: PageManager(4, 4).allocate(1.0)),
    (TypeError, "count", lambda: PageManager(4, 4).allocate("1")),
])
def test_bad_arguments_are_named(error, argument, call):
    with pytest.raises(error, match=rf"^PageManager: {argument} must"):
        call()


def test_threads_share_a_manager():
    manager = PageManager(64, 1)
    clashes = []
    owned = Counter()
    owned_lock = threading.Lock()

    def worker(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            pages = manager.allocate(int(rng.integers(1, 9)))
            with owned_lock:
                owned.update(pages)
                clashes.extend(page for page in pages if owned[page] != 1)
            with owned_lock:
                owned.subtract(pages)
            manager.free(pages)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert sorted(manager.allocate(64)) == list(range(64))


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork and go; the model is the free queue and a count of holders."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.manager = PageManager(12, 4, reserved=[0, 5])
        self.queue = [page for page in range(12) if page not in (0, 5)]
        self.holders = Counter()

    def _take(self, count):
        """What the model grants."""
        if count <= 0 or count > len(self.queue):
            return []
        pages, self.queue = self.queue[:count], self.queue[count:]
        self.holders.update(pages)
        return pages

    @rule(target=sequences, count=st.integers(-1, 12))
    def allocate(self, count):
        pages = self.manager.allocate(count)
        assert pages == self._take(count)
        return pages if pages else multiple()

    @rule(target=sequences, num_tokens=st.integers(0, 50))
    def allocate_tokens(self, num_tokens):
        pages = self.manager.allocate_tokens(num_tokens)
        assert pages == self._take((num_tokens + 3) // 4)
        return pages if pages else multiple()

    @rule(pages=sequences, num_tokens=st.integers(0, 50))
    def grow(self, pages, num_tokens):
        before = list(pages)
        missing = max((num_tokens + 3) // 4 - len(pages), 0)
        granted = self._take(missing)
        assert self.manager.grow(pages, num_tokens) == (len(granted) == missing)
        assert pages == before + granted

    @rule(target=sequences, pages=sequences)
    def share(self, pages):
        self.holders.update(pages)
        return self.manager.share(pages)

    @rule(pages=consumes(sequences))
    def free(self, pages):
        self.manager.free(pages)
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.queue.append(page)

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def free_of_a_free_page_is_refused(self, data):
        page = data.draw(st.sampled_from(self.queue))
        with pytest.raises(ValueError, match="already free"):
            self.manager.free([page])

    @invariant()
    def pages_are_conserved(self):
        held = {page: count for page, count in self.holders.items() if count}
        assert self.manager.num_free == len(self.queue)
        assert len(held) + self.manager.num_free == self.manager.capacity == 10
        assert all(self.manager.ref_count(page) == held.get(page, 0) for page in range(12))
        assert not {0, 5} & held.keys()

    def teardown(self):
        """The pages that come back are those that were granted, each as often as it had holders."""
        for page, count in self.holders.items():
            self.manager.free([page] * count)
        assert sorted(self.manager.allocate(10)) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        assert self.manager.num_free == 0


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestEveryHistory = PagesMachine.TestCase
