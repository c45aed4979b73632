# SPDX-License-Identifier: Apache-2.0
"""Sequences that share pages: a model with a memory of tokens that watches every history, then each promise alone."""

import gc
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cupyattn.paging import pages as pages_module
from cupyattn.paging import prefix_index
from cupyattn.paging.defragmentation import layout, rounds
from cupyattn.paging.pages import PageManager


def fill(manager, tokens, **options):
    """A new sequence of `tokens`, as a prefill leaves it."""
    sequence = manager.sequence(tokens, **options)
    sequence.reserve(len(tokens) - sequence.num_tokens)
    sequence.append(tokens[sequence.num_tokens:])
    return sequence


class SequencesMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork, are taken back and go beside plain lists of pages, and everything moves about.

    `memory` is what a cache would hold: of each slot the salt and all tokens up to its own. A sequence whose slots say
    anything else than its own tokens has been given a wrong page, or somebody has written to one it holds.
    """

    sequences = Bundle("sequences")
    lists = Bundle("lists")
    tokens = st.lists(st.integers(0, 1), max_size=14)   # two tokens only: much is shared
    num_pages, page_size = 9, 3
    finds_all = True

    def __init__(self):
        super().__init__()
        self.manager = PageManager(self.num_pages, self.page_size, reserved=[4])
        self.memory = {}
        self.live = {}    # sequence -> (salt, its tokens)
        self.held = []    # plain lists

    def _start(self, sequence, salt, tokens):
        self.live[sequence] = salt, tokens
        return sequence

    @rule(target=sequences, tokens=tokens, salt=st.sampled_from(["", "adapter"]), share=st.booleans())
    def sequence(self, tokens, salt, share):
        made = self.manager.sequence(tokens, salt=salt, share_prefix=share)
        assert share or made.num_tokens == 0
        return self._start(made, salt if share else None, tokens[:made.num_tokens])

    @rule(sequence=sequences, count=st.integers(0, 8))
    def reserve(self, sequence, count):
        before, free = (list(sequence.pages), sequence.num_tokens, sequence.room), self.manager.num_free
        try:
            copies = sequence.reserve(count)
        except MemoryError:
            assert before == (sequence.pages, sequence.num_tokens, sequence.room) and free == self.manager.num_free
            assert free <= self.manager.pages_for(sequence.num_tokens + count) - len(sequence.pages)
            return
        assert sequence.room >= count and len(copies) <= 1
        for (source, destination), tokens in copies.items():
            assert source in before[0] and destination in sequence.pages
            for slot in range(tokens):
                self.memory[destination, slot] = self.memory[source, slot]

    @rule(sequence=sequences, tokens=tokens)
    def append(self, sequence, tokens):
        tokens, (salt, known) = tokens[:sequence.room], self.live[sequence]
        for token in tokens:
            page, slot = divmod(len(known), self.page_size)
            known = [*known, token]
            self.memory[sequence.pages[page], slot] = salt, known
        sequence.append(tokens)
        self.live[sequence] = salt, known

    @rule(together=st.lists(st.tuples(sequences, st.lists(st.integers(0, 1), min_size=1, max_size=4)), max_size=3))
    def step(self, together):
        for sequence, tokens in together:
            self.reserve(sequence, len(tokens))
        for sequence, tokens in together:
            self.append(sequence, tokens)

    @rule(target=sequences, sequence=sequences, tokens=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def fork_and_step(self, sequence, tokens):
        made = self.fork(sequence)
        self.step([(sequence, tokens[:1]), (made, tokens[1:])])
        return made

    @rule(sequence=sequences, tokens=tokens.filter(bool))
    def append_without_room_is_refused(self, sequence, tokens):
        with pytest.raises(ValueError, match=f"tokens must be at most {sequence.room}, the room reserved, got "):
            sequence.append([*tokens, *[0] * sequence.room])

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence, data):
        salt, known = self.live[sequence]
        count = data.draw(st.integers(0, len(known)))
        sequence.truncate(count)
        assert sequence.room == 0
        self.live[sequence] = salt, known[:count]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence):
        return self._start(sequence.fork(), *self.live[sequence])

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        sequence.free()
        del self.live[sequence]

    @rule(tokens=tokens)
    def drop(self, tokens):
        """One that nobody frees gives up its pages all the same, also those without tokens yet."""
        sequence = self.sequence(tokens, "", True)
        self.reserve(sequence, 4)
        self.append(sequence, tokens[sequence.num_tokens:])
        before, kept = Counter(sequence.pages), Counter({p: self.manager.ref_count(p) for p in sequence.pages})
        del self.live[sequence], sequence
        assert all(self.manager.ref_count(page) == kept[page] - count for page, count in before.items())

    @rule(target=lists, count=st.integers(1, 4))
    def allocate(self, count):
        free, empty, remembered = self.manager.num_free, len(self.manager._free), self.manager.num_remembered
        pages = self.manager.allocate(count)
        assert bool(pages) == (count <= free)
        if pages and not any(page in self.manager._index for held in self.held for page in held):
            assert self.manager.num_remembered == remembered - max(0, count - empty)   # no more than that is forgotten
        for page in pages:
            self.memory |= {(page, slot): "of a list" for slot in range(self.page_size)}
        self.held += [pages] * bool(pages)
        return pages if pages else multiple()

    @rule(target=lists, sequence=sequences)
    def share_as_a_list(self, sequence):
        pages = self.manager.share(sequence.pages)
        self.held.append(pages)
        return pages

    @rule(pages=consumes(lists))
    def free_a_list(self, pages):
        self.manager.free(pages)
        self.held.remove(pages)

    @rule()
    def defragment(self):
        lists = [list(pages) for pages in self.held]
        for moves in self.manager.defragment():
            assert not set(moves) & set(moves.values()) and len(set(moves.values())) == len(moves)
            moved = {(moves[page], slot): content for (page, slot), content in self.memory.items() if page in moves}
            self.memory |= moved
        assert lists == self.held
        if self.manager.num_free:
            assert self.manager.defragment() == []   # once is enough

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, (salt, known) in self.live.items():
            assert sequence.num_tokens == len(known)
            assert len(sequence.pages) * self.page_size >= len(known) + sequence.room
            for position in range(len(known)):
                page, slot = divmod(position, self.page_size)
                assert self.memory[sequence.pages[page], slot] == (salt, known[:position + 1])

    @invariant()
    def what_is_found_is_there(self):
        """All that is remembered of a text reads back, so no page of a chain was granted to somebody else."""
        for salt in ("", "adapter"):
            for tokens in ([0] * 14, [1] * 14, [0, 1] * 7, [1, 0, 0] * 5):
                pages, count = self.manager._index.match(salt, tokens)
                for position in range(count):
                    page, slot = divmod(position, self.page_size)
                    assert self.memory[pages[page], slot] == (salt, tokens[:position + 1])

    @invariant()
    def what_is_held_is_found(self):
        """No page of a live text is forgotten: a new sequence of the same tokens finds all that are full."""
        for salt, known in self.live.values():
            if salt is not None and self.finds_all:
                assert self.manager._index.match(salt, known)[1] >= len(known) // self.page_size * self.page_size

    @invariant()
    def holders_are_counted_and_pages_conserved(self):
        held = Counter(page for pages in (*self.held, *(sequence.pages for sequence in self.live)) for page in pages)
        assert all(self.manager.ref_count(page) == held[page] for page in range(self.num_pages))
        assert len(held) + self.manager.num_free == self.manager.capacity == self.num_pages - 1
        assert not held[4]
        free = [*self.manager._free, *self.manager._remembered]
        assert sorted([4, *held, *free]) == list(range(self.num_pages))   # none twice

    def teardown(self):
        for sequence in self.live:
            sequence.free()
        for pages in self.held:
            self.manager.free(pages)
        assert self.manager.num_free == self.manager.capacity
        assert sorted(self.manager.allocate(self.num_pages - 1)) == [0, 1, 2, 3, 5, 6, 7, 8]
        assert self.manager.num_remembered == 0
        assert not (self.manager._index._contents or self.manager._index._children or self.manager._index._by_hash)


class CollisionsMachine(SequencesMachine):
    """The same, where all pages have one of two hashes: those that are equal and of other tokens share nothing."""

    finds_all = False

    def __init__(self):
        super().__init__()
        self.chained_hash = prefix_index.chained_hash
        prefix_index.chained_hash = lambda previous, tokens: bytes([tokens[0]])

    def teardown(self):
        prefix_index.chained_hash = self.chained_hash
        super().teardown()


SequencesMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None, derandomize=True)
CollisionsMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None, derandomize=True)
TestEveryHistory = SequencesMachine.TestCase
TestEveryHistoryWithCollisions = CollisionsMachine.TestCase


def test_a_beginning_is_found_page_by_page_and_the_rest_of_it_in_part():
    manager = PageManager(10, 4)
    first = fill(manager, range(10))
    assert first.pages == [0, 1, 2]
    for tokens, pages, found in ((range(10), [0, 1, 2], 10), (range(9), [0, 1], 8), ([0, 1, 2, 9], [0], 3),
                                 ([*range(7), 0], [0, 1], 7), ([0, 5], [], 0), ([5], [], 0), ([], [], 0),
                                 (np.arange(40), [0, 1, 2], 10)):
        sequence = manager.sequence(tokens)
        assert (sequence.pages, sequence.num_tokens, sequence.room) == (pages, found, 0), tokens
        sequence.free()
    assert manager.sequence(range(10), salt="adapter").num_tokens == 0
    assert manager.sequence(range(10), share_prefix=False).num_tokens == 0
    alone = fill(manager, range(20, 24), share_prefix=False)
    assert manager.sequence(range(20, 24)).num_tokens == 0 and alone.pages == [3]


def test_the_longest_part_wins():
    manager = PageManager(10, 8)
    for tokens in ([1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4]):
        fill(manager, tokens, salt="")
    assert manager.sequence([1, 2, 3, 4, 5, 9]).num_tokens == 5


def test_a_page_that_becomes_full_gives_way_to_one_with_the_same():
    manager = PageManager(10, 4)
    first, second = fill(manager, [1, 2]), manager.sequence([1])
    for sequence in (first, second):
        sequence.reserve(4)
    second.append([1, 2])
    assert (first.pages, second.pages, manager.num_free) == ([0, 1], [2], 7)
    first.append([3, 4])
    second.append([3, 4])
    assert second.pages == [0] and manager.ref_count(0) == 2 and manager.num_free == 8
    first.free()
    second.free()
    again = manager.sequence()                    # what nobody holds is taken up again likewise
    again.reserve(4)
    again.append([1, 2, 3, 4])
    assert again.pages == [0] and manager.ref_count(0) == 1 and manager.num_remembered == 0


def test_two_pages_with_the_same_hash(monkeypatch):
    """Other tokens, the same hash: neither is found for the other, replaces it, or takes its place in the index."""
    monkeypatch.setattr(prefix_index, "chained_hash", lambda previous, tokens: b"the same")
    manager = PageManager(8, 2)
    first, second = fill(manager, [1, 2]), fill(manager, [3, 4])
    assert first.pages == [0] and second.pages == [1]             # not deduplicated
    for tokens, page in (([1, 2], 0), ([3, 4], 1)):
        with manager.sequence(tokens) as found:
            assert (found.pages, found.num_tokens) == ([page], 2)
    below = fill(manager, [1, 2, 1, 2])                           # the same tokens after others are another page
    assert below.pages == [0, 2] and manager.sequence([3, 4, 1, 2]).num_tokens == 2
    second.truncate(0)                                            # forgets its own page only
    assert manager.sequence([1, 2, 1, 2]).num_tokens == 4 and manager.sequence([3, 4]).num_tokens == 0
    first.free()
    below.truncate(0)
    assert manager.num_free == 8 and manager.num_remembered == 0 and not manager._index._by_hash


def test_a_sequence_that_is_gone_holds_no_pages():
    """Dropped, dropped in a circle of references, left behind by an exception or by the end of a `with` block."""
    manager = PageManager(4, 2)
    sequence = fill(manager, [1, 2, 3])
    sequence.reserve(4)
    assert manager.num_free == 0
    del sequence
    assert manager.num_free == 4 and manager.num_remembered == 2   # as after free
    sequence = fill(manager, [1, 2, 3])
    sequence.itself = sequence
    del sequence
    gc.collect()
    assert len(manager.allocate(4)) == 4                           # whatever is asked first
    manager.free(range(4))
    with pytest.raises(KeyError), manager.sequence() as sequence:
        sequence.reserve(5)
        raise KeyError
    assert sequence.pages == [] and manager.num_free == 4
    sequence.free()                                                # again, for nothing
    del sequence
    fill(manager, [1, 2]).free()
    with pytest.raises(ValueError, match="page 0, which is already free"):
        manager.free([0])


def test_a_sequence_that_goes_while_pages_move_gives_up_the_right_ones(monkeypatch):
    manager = PageManager(4, 1)
    fill(manager, [9]).free()
    sequences = [fill(manager, [n]) for n in (1, 2)]
    assert [sequence.pages for sequence in sequences] == [[1], [2]]

    def drop_one(*arguments):
        sequences.clear()
        return layout(*arguments)

    monkeypatch.setattr(pages_module, "layout", drop_one)
    assert manager.defragment()
    assert manager.num_free == 4 and manager.num_remembered == 3
    assert manager.sequence([1]).pages == [0] and manager.sequence([2]).pages == [1]


def test_the_end_of_the_oldest_text_is_forgotten_first():
    manager = PageManager(6, 2)
    old, new = fill(manager, [1, 2, 3, 4, 5, 6]), fill(manager, [1, 2, 7, 8])
    old.free()
    new.free()
    assert manager.num_free == 6 and manager.num_remembered == 4
    taken = manager.allocate(2)                   # those that are empty
    assert sorted(taken) == [4, 5] and manager.num_remembered == 4
    manager.allocate(1)
    found = manager.sequence([1, 2, 3, 4, 5, 6])
    assert found.num_tokens == 4
    found.free()                                  # and is now the newest
    manager.allocate(1)
    assert manager.sequence([1, 2, 7, 8]).num_tokens == 2
    assert manager.sequence([1, 2, 3, 4]).num_tokens == 4


def test_drafts_are_taken_back():
    """As if they had never been: pages, queue and what can be found."""
    manager = PageManager(8, 4)
    sequence = fill(manager, range(6))
    before = str(manager), list(sequence.pages), list(manager._free)
    sequence.reserve(9)
    sequence.append(range(100, 109))
    assert manager.sequence([*range(6), *range(100, 109)]).num_tokens == 15
    sequence = fill(PageManager(8, 4), range(6))
    manager = sequence._manager
    sequence.reserve(9)
    sequence.append(range(100, 109))
    sequence.truncate(6)
    assert (str(manager), sequence.pages, list(manager._free)) == before and sequence.room == 0
    with pytest.raises(ValueError, match="PageSequence.truncate: num_tokens must be from 0 to 6, got 7"):
        sequence.truncate(7)


def test_what_others_hold_is_not_taken_back_from_them():
    manager = PageManager(8, 4)
    first = fill(manager, range(8))
    second = first.fork()
    second.truncate(3)
    assert second.reserve(2) == {(0, 2): 3} and second.pages == [2, 3]
    second.append([50, 51])
    assert first.pages == [0, 1] and manager.sequence(range(8)).num_tokens == 8


def test_forks_copy_the_page_they_go_on_in():
    manager = PageManager(8, 4)
    first = fill(manager, range(6))
    forks = [first.fork(), first.fork()]
    assert manager.ref_count(0) == manager.ref_count(1) == 3
    assert forks[0].reserve(1) == {(1, 2): 2} and forks[1].reserve(1) == {(1, 3): 2} and first.reserve(1) == {}
    assert [sequence.pages for sequence in (first, *forks)] == [[0, 1], [0, 2], [0, 3]]


def test_without_an_empty_page_the_found_one_is_taken_over():
    manager = PageManager(1, 4)
    fill(manager, [1, 2, 3, 4]).free()
    sequence = manager.sequence([1, 2, 5])
    assert sequence.num_tokens == 2 and sequence.reserve(2) == {} and sequence.pages == [0]
    sequence.append([5, 6])
    assert manager.sequence([1, 2, 3, 4]).num_tokens == 2


@pytest.mark.parametrize(("tokens", "message"), [
    (257 * 4, "1028 tokens need 257 pages of 4, more than the 256 of the cache"),
    (256 * 4, "1024 tokens after 0 need 256 more pages of 4, got 254 free of 256"),
    (254 * 4 + 1, "1017 tokens after 0 need 255 more pages of 4, got 254 free of 256")])
def test_shortage_names_the_numbers(tokens, message):
    manager = PageManager(257, 4, reserved=[0])
    held = fill(manager, range(8))
    sequence = manager.sequence()
    with pytest.raises(MemoryError, match=f"^PageSequence.reserve: {message}$"):
        sequence.reserve(tokens)
    assert sequence.pages == [] and manager.num_free == 254
    sequence.reserve(254 * 4)                     # to the last token
    assert manager.num_free == 0 and len(held.pages) == 2
    sequence.append(range(1000, 1000 + 254 * 4))
    fork = sequence.fork()
    fork.truncate(254 * 4 - 1)
    with pytest.raises(MemoryError, match="1 tokens after 1015 need 1 more pages of 4, 1 of them for a copy of a "
                                          "shared one, got 0 free of 256"):
        fork.reserve(1)
    with pytest.raises(ValueError, match="PageSequence.reserve: count must be an int32 of at least 0, got -1"):
        fork.reserve(-1)
    for call, name in ((fork.reserve, "reserve: count"), (fork.truncate, "truncate: num_tokens")):
        for bad in (1.5, True, "a"):
            with pytest.raises(TypeError, match=f"PageSequence.{name} must be an integer, got {type(bad).__name__}"):
                call(bad)


@pytest.mark.parametrize(("token", "error"), [(2**63, OverflowError), (1.5, TypeError), ("a", TypeError)])
def test_what_is_no_token_changes_nothing(token, error):
    manager = PageManager(4, 2)
    sequence = fill(manager, [1])
    sequence.reserve(3)
    before = str(manager), repr(sequence)
    with pytest.raises(error):
        sequence.append([2, token])
    with pytest.raises(error):
        manager.sequence([1, 2, token])
    assert (str(manager), repr(sequence)) == before


@pytest.mark.parametrize("salt", [None, 0, b"adapter"])
@pytest.mark.parametrize("share", [True, False])
def test_a_salt_is_a_text(salt, share):
    """A number would be taken for a page."""
    message = f"PageManager.sequence: salt must be a str, got {type(salt).__name__}"
    with pytest.raises(TypeError, match=message):
        PageManager(4, 2).sequence([1, 2], salt=salt, share_prefix=share)


def test_state_that_can_be_printed():
    manager = PageManager(8, 4)
    fill(manager, range(7)).free()
    sequence = fill(manager, [*range(4), 9], salt="")
    assert repr(sequence) == "PageSequence(5 tokens on pages [0, 2], room for 3 more)"
    assert str(manager).splitlines() == [
        "PageManager(num_pages=8, page_size=4, reserved=[], num_free=6): 2 held, 6 free, 1 of these remembered",
        "  page 0: 1 holder, 4 tokens: 0 1 2 3",
        "    page 1: no holders, 3 tokens: 4 5 6",
        "    page 2: 1 holder, 1 token: 9"]


def test_long_texts_need_no_stack():
    manager = PageManager(5000, 1)
    fill(manager, range(5000)).free()
    again = manager.sequence(range(5000))
    assert again.num_tokens == 5000
    again.truncate(0)
    assert manager.num_remembered == 0 and manager.num_free == 5000 and not manager._index._by_hash
    fill(manager, range(5000)).free()
    manager.sequence(range(1)).reserve(1)


def test_hashes_are_of_the_whole_text():
    """blake2b-128 of the hash before (of the salt, for the first page) and the tokens as int64."""
    import hashlib

    root = hashlib.blake2b(b"", digest_size=16).digest()
    first = hashlib.blake2b(root + np.arange(4).astype("=i8").tobytes(), digest_size=16).digest()
    assert prefix_index.chained_hash(root, list(range(4))) == first
    manager = PageManager(8, 4)
    fill(manager, range(4))
    assert list(manager._index._by_hash) == [first]


def test_rounds_move_everything_without_overwriting():
    rng = np.random.default_rng(0)
    for _ in range(200):
        staying, moving, _ = np.split(rng.permutation(12), np.sort(rng.integers(0, 13, 2)))
        places = rng.permutation(np.setdiff1d(np.arange(12), staying))
        wanted = {a: b for a, b in zip(moving.tolist(), places[:len(moving)].tolist(), strict=True) if a != b}
        pages = {*staying.tolist(), *moving.tolist()}
        memory = {page: page for page in pages}
        for moves in rounds(wanted, set(range(12)) - pages):
            assert not set(moves) & set(moves.values())
            memory |= {b: memory[a] for a, b in moves.items()}
        assert len(pages) == 12 or all(memory[b] == a for a, b in wanted.items())
        assert all(memory[page] == page for page in staying.tolist())


def test_layout_moves_only_what_is_in_the_way():
    assert layout([[5, 3], [5, 7]], [0, 6], list(range(8))) == {5: 0, 3: 1, 7: 2, 0: 4}
    assert layout([[5, 0]], [1], [0, 1, 5]) == {5: 0, 0: 1, 1: 5}
    assert layout([[0, 1]], [2], [0, 1, 2]) == {}
    assert layout([[4, 5]], [], [1, 4, 5]) == {4: 1, 5: 4}    # 2 and 3 are somebody's


def test_defragmentation_of_a_full_cache():
    """Circles need room: a remembered page makes way; where all are held those in circles stay."""
    manager = PageManager(4, 1)
    sequences = [fill(manager, [n]) for n in range(4)]
    sequences[1].free()
    sequences[3].free()
    longer = fill(manager, [10, 11])          # on 1 and 3
    assert longer.pages == [1, 3] and manager.num_free == 0
    assert manager.defragment() == []
    sequences[2].free()
    assert manager.num_remembered == 1
    assert manager.defragment() == [{3: 2}] and longer.pages == [1, 2]
    assert manager.num_remembered == 0 and manager.allocate(1) == [3]
