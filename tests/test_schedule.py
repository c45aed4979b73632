# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from compare import assert_same_bits
from conftest import NumpyArrays
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from standin import install

import cupyattn
from cupyattn.attn.plans import Tiling
from cupyattn.attn.scheduling import Lengths, Limits, Policy, empty_lists, fill_lists, host_lists, list_ranges
from cupyattn.attn.shared_prefix import shared_prefixes
from cupyattn.attn.work_list import WorkList, make_work
from cupyattn.devices import to_host
from cupyattn.paging.table import PageTable
from cupyattn.reference import schedule as reference
from cupyattn.runtime import env
from cupyattn.runtime.cpu import settings

WORKERS = (1, 7, 16, 264)
LENGTHS = st.integers(0, 300) | st.integers(0, 5000) | st.sampled_from([63, 64, 65, 1023, 1024, 1025, 4096])


def assert_same_work(got, want):
    for name in WorkList.ARRAYS:
        assert_same_bits(getattr(got, name), getattr(want, name))
    assert (got.rows, got.workers, got.num_slots) == (want.rows, want.workers, want.num_slots)


@st.composite
def cases(draw, most_queries=40):
    """Arguments of make_work: ragged lengths, and every rule of what a query sees."""
    batch = draw(st.integers(0, 6))

    def per_sequence(values):
        return np.array(draw(st.lists(values, min_size=batch, max_size=batch)), np.int32)

    kwargs = {"num_kv_heads": draw(st.integers(1, 3)), "heads_per_kv": draw(st.sampled_from([1, 2, 3, 4, 8])),
              "rows": draw(st.sampled_from([1, 2, 8, 16, 64])), "workers": draw(st.sampled_from(WORKERS)),
              "causal": draw(st.booleans()), "window_size": draw(st.sampled_from([0, 0, 1, 64, 1000]))}
    every, rows = 2**31 - 1, kwargs["rows"]
    kwargs["packed_rows"] = draw(st.sampled_from([(1, every), (1, rows), (rows + 1, every)]))
    policy = draw(st.sampled_from(["balanced", "balanced", "invariant", "splits"]))
    if policy == "invariant":
        kwargs["invariant"] = True
    elif policy == "splits":
        kwargs["num_splits"] = draw(st.integers(1, 64))
    if draw(st.booleans()):
        kwargs["cache_starts"] = per_sequence(st.integers(0, 3000))
    if draw(st.booleans()):
        kwargs["finished"] = per_sequence(st.booleans()).astype(bool)
    shards = draw(st.sampled_from(["none", "none", "round robin", "contiguous"]))
    if shards == "round robin":
        kwargs["key_stride"] = draw(st.integers(2, 8))
        kwargs["key_offset"] = draw(st.integers(0, kwargs["key_stride"] - 1))
    elif shards == "contiguous":
        kwargs["key_offsets"], kwargs["key_counts"] = per_sequence(st.integers(0, 2000)), per_sequence(LENGTHS)
    q_lens = per_sequence(st.integers(0, most_queries))
    return per_sequence(LENGTHS), q_lens, kwargs


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_make_work(case):
    """Array by array what plain loops over units and key tiles give."""
    seqlens, q_lens, kwargs = case
    got = make_work(seqlens, q_lens, **kwargs)
    assert_same_work(got, reference.make_work(seqlens, q_lens, **kwargs))
    check_list(got, "invariant" not in kwargs and "num_splits" not in kwargs)


def check_list(work, balanced):
    """Promises of any list: one owner per item, slots and units used once, few partial items per block."""
    items, splits = work.items, work.splits()
    assert (np.diff(work.worker_items) >= 0).all()
    assert (work.worker_items[0], work.worker_items[-1]) == (0, len(items))
    partial = items[:, 5] >= 0
    slots = items[partial, 5]
    if len(slots) <= work.num_slots:
        assert (slots == np.arange(work.num_slots)).all()
    else:   # only a block's own units have the same slots
        worker = np.searchsorted(work.worker_items, np.flatnonzero(partial), side="right")
        unit = items[partial, 6]
        for slot in np.flatnonzero(np.bincount(slots) > 1):
            assert len(set(worker[slots == slot])) == 1
            assert len({w for u in unit[slots == slot] for w in worker[unit == u]}) == 1
        assert slots.max() < work.num_slots
    assert sorted(work.pieces // work.rows) == sorted(slots) or len(work.members)
    assert len(work.units) == len(work.counters) == (splits > 1).sum() or len(work.members)
    if len(work.units):
        assert (work.units[:, 0] == np.cumsum(work.units[:, 1]) - work.units[:, 1]).all()
    if balanced:
        for w in range(work.workers):
            assert partial[work.worker_items[w]:work.worker_items[w + 1]].sum() <= 2
        assert work.num_slots <= 2 * work.workers


def test_balance():
    """Costs of key tiles and item starts differ by at most what starting the items of one block costs."""
    rng = np.random.default_rng(3)
    work = make_work(rng.integers(1, 30000, 12), 1, num_kv_heads=8, heads_per_kv=4, rows=16, workers=264)
    assert work.imbalance < 0.2
    tiles = (work.items[:, 4] - work.items[:, 3]) // 64
    sums = [tiles[a:b].sum() for a, b in zip(work.worker_items, work.worker_items[1:], strict=False)]
    assert max(sums) <= -(-(tiles.sum() + 2 * 96) // 264)


@pytest.mark.parametrize("tiles, num_splits, real", [(17, 16, 9), (100, 64, 50), (10, 4, 4), (5, 64, 5), (1, 64, 1)])
def test_turbomind_splits(tiles, num_splits, real):
    """TurboMind's rule: ceil(tiles / splits) tiles each, so fewer splits than asked for may be real."""
    for seqlen in (64 * tiles, 64 * tiles - 63):
        work = make_work([seqlen], 1, num_kv_heads=2, heads_per_kv=4, rows=16, workers=16, num_splits=num_splits)
        assert work.splits().tolist() == [real, real]
        each = -(-tiles // num_splits) * 64
        assert work.items[:real, 3].tolist() == list(range(0, 64 * tiles, each))


def test_window_counts_tiles_from_its_first():
    work = make_work([10000], 1, num_kv_heads=1, heads_per_kv=1, rows=1, workers=1, window_size=1000, num_splits=4)
    assert work.items[:, 3].tolist() == [64 * (140 + t) for t in (0, 5, 10, 15)]   # token 9000 is in tile 140


def test_invariant_cuts_depend_on_the_sequence_alone():
    """Alone or among others, with 1, 7 or 132 blocks: cut at the same keys."""
    rng = np.random.default_rng(5)
    seqlens, q_lens = rng.integers(0, 9000, 8), rng.integers(0, 50, 8)
    cuts = []
    for workers in (1, 7, 132):
        work = make_work(seqlens, q_lens, num_kv_heads=2, heads_per_kv=4, rows=16, workers=workers, invariant=True)
        cuts.append(work.items[:, :5].tolist())
    assert cuts[0] == cuts[1] == cuts[2]
    for b in range(8):
        alone = make_work(seqlens[b:b + 1], q_lens[b:b + 1], num_kv_heads=2, heads_per_kv=4, rows=16, workers=132,
                          invariant=True)
        among = work.items[work.items[:, 0] == b]
        assert (alone.items[:, 1:5] == among[:, 1:5]).all() and len(alone.items) == len(among)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_shared_prefix_work(data):
    """Prefix items and the units after them, against plain loops."""
    q_len, heads_per_kv = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 4), (1, 3)]))
    invariant = data.draw(st.booleans())
    unit = 1024 if invariant else 64
    order = data.draw(st.permutations(range(9)))
    prefixes, at = [], 0
    for size in data.draw(st.lists(st.integers(2, 6), max_size=3)):
        if at + size <= 9:
            prefixes.append((unit * data.draw(st.integers(1, 4)), np.sort(order[at:at + size])))
            at += size
    seqlens = np.array(data.draw(st.lists(st.integers(0, 300), min_size=9, max_size=9)))
    for keys, group in prefixes:
        seqlens[group] += keys + q_len
    kwargs = {"num_kv_heads": data.draw(st.integers(1, 3)), "heads_per_kv": heads_per_kv, "rows": 16,
              "workers": data.draw(st.sampled_from(WORKERS)), "invariant": invariant, "prefixes": prefixes}
    got = make_work(seqlens, q_len, **kwargs)
    assert_same_work(got, reference.make_work(seqlens, q_len, **kwargs))
    check_list(got, False)
    check_coverage(got, seqlens, q_len * heads_per_kv)


def check_coverage(work, seqlens, each):
    """Every key tile of every row of every (sequence, KV head) is in exactly one piece of its unit, in order."""
    of_slot = {item[5]: item for item in work.items.tolist() if item[5] >= 0}
    whole = {(item[0], item[1]): item for item in work.items.tolist() if item[5] < 0}
    heads = int(work.items[:, 1].max()) + 1 if len(work.items) else 0
    units = {(item[0], item[1]): item[6] for item in work.items.tolist() if item[5] >= 0 and not item[7]}
    for b, seqlen in enumerate(seqlens):
        for head in range(heads):
            if (b, head) in whole:
                assert whole[b, head][3:5] == [0, -(-seqlen // 64) * 64]
                continue
            first, count = work.units[units[b, head]]
            at = 0
            for piece in work.pieces[first:first + count]:
                slot, row = divmod(int(piece), work.rows)
                seq, kv_head, first_row, begin, end, _, _, members = of_slot[slot]
                assert kv_head == head and begin == at
                if members:
                    assert members * each <= work.rows and row % each == 0
                    member = work.members[first_row + row // each]
                    assert member.tolist() == [b, units[b, 0]] and row // each < members
                else:
                    assert (seq, first_row, row) == (b, 0, 0)
                at = end
            assert at == -(-seqlen // 64) * 64


def test_invariant_prefix_changes_no_piece():
    """With and without a shared prefix, a unit is merged from the same ranges of keys."""
    seqlens = [5000, 2100, 7000, 300, 2049]
    kwargs = {"num_kv_heads": 2, "heads_per_kv": 4, "rows": 16, "workers": 16, "invariant": True}

    def ranges(work):
        of_slot = {item[5]: (item[3], item[4]) for item in work.items.tolist() if item[5] >= 0}
        return {(item[0], item[1]): [of_slot[p // 16] for p in work.pieces[slice(*np.cumsum(work.units[item[6]]))]]
                for item in work.items.tolist() if item[6] >= 0 and not item[7]}

    shared = make_work(seqlens, 1, prefixes=[(2048, [0, 1, 2, 4])], **kwargs)
    assert (shared.items[:, 7] > 0).any()
    assert ranges(shared) == ranges(make_work(seqlens, 1, **kwargs))


# ---- the planner on the device, and the public function ----------------------------------------------------


def lengths_of(seqlens, q_lens, kwargs, array=np.asarray):
    """Lengths and Policy of a case, its arrays made by `array`."""
    rules = {name: array(value) if isinstance(value, np.ndarray) else value for name, value in kwargs.items()
             if name in Lengths._fields}
    cu_seqlens_q = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    return (Lengths(cache_seqlens=array(seqlens), cu_seqlens_q=array(cu_seqlens_q), **rules),
            Policy(kwargs.get("num_splits"), kwargs.get("invariant", False)))


def same_as_on_host(seqlens, q_lens, kwargs, arrays, slack=0):
    """Both lists of the planner `cuda_src/schedule.cu`, unused entries poisoned, have the host's bits."""
    host, policy = lengths_of(seqlens, q_lens, kwargs)
    rows, workers = kwargs["rows"], kwargs["workers"]
    tiles = Tiling(rows, 4 * rows, workers, max(1, workers // 2))
    ranges = list_ranges(tiles, 0, 10**6)
    wanted = host_lists(host, tiles, policy, ranges)
    lengths, _ = lengths_of(seqlens, q_lens, kwargs, arrays.array)
    limits = Limits(int(q_lens.max(initial=0)) + slack, int(seqlens.max(initial=0)) + slack, int(q_lens.sum()) + slack,
                    None if slack else int(seqlens.sum()))
    lists = empty_lists(arrays.module, lengths, limits, tiles, policy, ranges)
    for work in lists:
        for array in (work.items, work.worker_items, work.units, work.pieces):
            poison = np.full(array.shape, 0x7F7F7F7F, np.int32)
            array[...] = poison if arrays.module is np else arrays.array(poison)
    fill_lists(arrays.module, lengths, limits, policy, ranges, lists)
    for work, want in zip(lists, wanted, strict=True):
        assert work.num_slots >= want.num_slots and (work.rows, work.workers) == (want.rows, want.workers)
        assert_same_bits(arrays.numpy(work.worker_items), want.worker_items)
        for name in ("items", "units", "pieces"):
            used, values = len(getattr(want, name)), arrays.numpy(getattr(work, name))
            assert used <= len(values)
            assert_same_bits(values[:used], getattr(want, name))
            assert (values[used:] == 0x7F7F7F7F).all(), f"{name}: entries nobody asked for"
        assert (arrays.numpy(work.counters) == 0).all()


@hypothesis_settings(max_examples=120, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([0, 0, 100]))
def test_device_planner(case, slack):
    """The bits of the NumPy planner, inside the capacity worked out from the limits."""
    same_as_on_host(*case, NumpyArrays(), slack)


@pytest.mark.parametrize("policy", [{}, {"invariant": True}, {"num_splits": 5}], ids=str)
def test_device_planner_large(xp, policy):
    """More sequences, units and items than threads."""
    rng = np.random.default_rng(7)
    kwargs = {"num_kv_heads": 2, "heads_per_kv": 4, "rows": 16, "workers": 132, **policy}
    same_as_on_host(rng.integers(0, 9000, 700).astype(np.int32), rng.integers(0, 60, 700), kwargs, xp)
    same_as_on_host(np.int32([131072]), np.array([1]), kwargs, xp)
    same_as_on_host(np.zeros(0, np.int32), np.zeros(0, np.int64), kwargs, xp)


def test_schedule_checked():
    rng = np.random.default_rng(11)
    kwargs = {"num_kv_heads": 2, "heads_per_kv": 2, "rows": 2, "workers": 7, "window_size": 500}
    seqlens, q_lens = rng.integers(0, 3000, 70).astype(np.int32), rng.integers(0, 12, 70)
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            for policy in ({}, {"invariant": True}):
                same_as_on_host(seqlens, q_lens, {**kwargs, **policy}, NumpyArrays())


def test_device_planner_stays_inside_its_arrays():
    """Lengths past the limits are cut down to them; nothing is written past the capacity (checked build)."""
    lengths = Lengths(2, 4, np.int32([100, 90000, -5, 700]), cu_seqlens_q=np.int32([0, 500, 400, 10**6, 10**6 + 3]))
    tiles, limits = Tiling(4, 16, 7, 7), Limits(10, 1000, 20)
    for policy in (Policy(), Policy(invariant=True), Policy(num_splits=3)):
        ranges = list_ranges(tiles, 0, 100)
        lists = empty_lists(np, lengths, limits, tiles, policy, ranges)
        with settings(check=True):
            fill_lists(np, lengths, limits, policy, ranges, lists)
        for work in lists:
            items = work.items[:work.worker_items[-1]]
            assert items[:, 5].max(initial=-1) < work.num_slots and items[:, 4].max(initial=0) <= 1024
    lengths = Lengths(2, 4, np.full(5, 3000, np.int32))
    ranges = list_ranges(tiles, 4, 4)
    for total, planned in ((15000, True), (14000, False)):   # a total that is not kept to: nothing is planned
        work, _ = lists = empty_lists(np, lengths, Limits(1, 4000, 5, total), tiles, Policy(num_splits=47), ranges)
        with settings(check=True):
            fill_lists(np, lengths, Limits(1, 4000, 5, total), Policy(num_splits=47), ranges, lists)
        assert (work.worker_items[-1] > 0) == planned and work.worker_items[0] == 0


def assert_filled(got, want):
    """What a schedule with room for more holds is the exact lists `want` of the same lengths."""
    for name in ("decode", "prefill"):
        work, exact = getattr(got, name), getattr(want, name)
        assert (work is None) == (exact is None), name
        if exact is not None:
            assert_same_bits(to_host(work.worker_items), to_host(exact.worker_items))
            for array in ("items", "units", "pieces"):
                values = getattr(exact.host, array)
                assert_same_bits(to_host(getattr(work, array))[:len(values)], values)


@pytest.mark.parametrize("q_lens", [None, [1, 1, 1, 1], [1, 200, 3, 33], [64, 200, 100, 33]], ids=str)
@pytest.mark.parametrize("options", [{}, {"invariant": True}, {"num_splits": 3, "window_size": 300},
                                     {"causal": False}, {"key_stride": 2, "key_offset": 1}], ids=str)
def test_schedule(xp, q_lens, options):
    """Lists from lengths here or there are the same, and are filled again for other lengths at the same addresses."""
    kwargs = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "num_workers": 7, **options}
    room = {"max_k_len": 4000, **({"max_q_len": 200, "num_tokens": 500} if q_lens else {})}
    first, second = np.int32([40, 3000, 0, 1025]), np.int32([2000, 300, 4000, 1])
    cu_seqlens_q = q_lens and np.cumsum([0, *q_lens]).astype(np.int32)
    there = q_lens and xp.array(cu_seqlens_q)
    here = cupyattn.schedule(first, cu_seqlens_q=cu_seqlens_q, xp=xp.module, **kwargs, **room)
    made = cupyattn.schedule(xp.array(first), cu_seqlens_q=there, **kwargs, **room)
    assert here.device == made.device == xp.module.__name__
    assert_filled(made, here)
    here = cupyattn.schedule(second, cu_seqlens_q=cu_seqlens_q, out=here, xp=xp.module, **kwargs)
    again = cupyattn.schedule(xp.array(second), cu_seqlens_q=there, out=made, **kwargs)
    assert_filled(again, here)
    for name in ("decode", "prefill"):
        if getattr(made, name) is not None:
            assert getattr(again, name).items is getattr(made, name).items
    exact = cupyattn.schedule(second, cu_seqlens_q=cu_seqlens_q, xp=xp.module, **kwargs)
    assert exact.limits is None and "blocks" in repr(exact) and repr(here).startswith("Schedule(4 sequences")


def test_errors():
    lengths, kwargs = np.int32([5, 6]), {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(TypeError, match="cache_seqlens must be int32, got int64"):
        cupyattn.schedule(lengths.astype(np.int64), **kwargs)
    with pytest.raises(ValueError, match=r"schedule: cu_seqlens_q must be \[batch \+ 1\] = \[3\], got \[2\]"):
        cupyattn.schedule(lengths, cu_seqlens_q=lengths, **kwargs)
    with pytest.raises(ValueError, match="cu_seqlens_q must not decrease, got"):
        cupyattn.schedule(lengths, cu_seqlens_q=np.int32([0, 2, 1]), **kwargs)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads 4, got 3"):
        cupyattn.schedule(lengths, **{**kwargs, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="num_splits must be None with invariant=True, got 2"):
        cupyattn.schedule(lengths, num_splits=2, invariant=True, **kwargs)
    with pytest.raises(ValueError, match="num_splits must be an int32 of at least 1, got 0"):
        cupyattn.schedule(lengths, num_splits=0, **kwargs)
    with pytest.raises(ValueError, match="kv_format must be float16, .*hadamard4, got 'int3'"):
        cupyattn.schedule(lengths, kv_format="int3", **kwargs)
    with pytest.raises(ValueError, match="page_size must be given with block_table"):
        cupyattn.schedule(lengths, block_table=np.zeros((2, 1), np.int32), **kwargs)
    with pytest.raises(ValueError, match="block_table must have 2 sequences like cache_seqlens, got 3"):
        cupyattn.schedule(lengths, block_table=np.zeros((3, 1), np.int32), page_size=16, **kwargs)
    made = cupyattn.schedule(lengths, **kwargs)
    with pytest.raises(ValueError, match="out must be a schedule made with max_k_len, got one without"):
        cupyattn.schedule(lengths, out=made, **kwargs)
    room = cupyattn.schedule(lengths, max_k_len=100, num_splits=2, **kwargs)
    with pytest.raises(ValueError, match="out must be made for num_splits 3, got one for 2"):
        cupyattn.schedule(lengths, out=room, num_splits=3, **kwargs)
    room = cupyattn.schedule(lengths, max_k_len=64, **kwargs)
    with pytest.raises(ValueError, match="out must have room for .* units in its decode list, got 0; make it with"):
        cupyattn.schedule(np.int32([5000, 6]), out=room, **kwargs)
    with pytest.raises(ValueError, match="paged_decode: schedule must be made for batch 3, got one for 2"):
        made.check("paged_decode", num_heads=4, batch=3)


@pytest.mark.parametrize("options, error, message", [
    ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'"),
    ({"share_prefix": 3}, TypeError, "share_prefix must be True or False, got 3"),
    ({"one_list": "x"}, TypeError, "one_list must be True or False, got 'x'"),
    ({"invariant": 1}, TypeError, "invariant must be True or False, got 1"),
    ({"tree_mask": None}, TypeError, "tree_mask must be True or False, got None"),
    ({"window_size": None}, TypeError, "window_size must be an integer, got NoneType"),
    ({"head_dim": 7}, ValueError, "head_dim must be a multiple of 8 up to 256, got 7"),
    ({"head_dim": 264}, ValueError, "head_dim must be a multiple of 8 up to 256, got 264"),
    ({"key_offset": 5}, ValueError, "key_offset must be below key_stride 1, got 5"),
    ({"key_stride": 2, "key_offset": 2}, ValueError, "key_offset must be below key_stride 2, got 2"),
    ({"key_offsets": np.int32([0, 0])}, ValueError, "key_offsets and key_counts must come together .* key_counts None"),
    ({"key_offsets": np.int32([0, -3]), "key_counts": np.int32([5, 5])}, ValueError, "key_offsets must be ≥ 0, got -3"),
    ({"cache_starts": np.int32([-1, 0])}, ValueError, "cache_starts must be ≥ 0, got -1"),
    ({"cache_seqlens": np.int32([-5, 6])}, ValueError, "cache_seqlens must be ≥ 0, got -5 to 6"),
    ({"cache_seqlens": np.int32([5, 33]), "block_table": np.zeros((2, 2), np.int32), "page_size": 16}, ValueError,
     r"cache_seqlens must be from 0 to 32 \(max_pages \* page_size\), got 5 to 33"),
    ({"cache_seqlens": np.int32([33, 5]), "page_size": 16,
      "block_table": PageTable.csr(np.int32([0, 1, 2]), np.int32([0, 2, 3]))}, ValueError,
     "cache_seqlens must be at most 32, what block_table holds of sequence 0, got 33"),
    ({"block_table": np.zeros((2, 1), np.int32)}, ValueError, "page_size must be given with block_table, got None"),
    ({"cache_seqlens": None}, TypeError, "cache_seqlens must be a NumPy or CuPy array, got NoneType"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_options_in_range(options, error, message):
    options = {"cache_seqlens": np.int32([5, 6]), "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **options}
    with pytest.raises(error, match=f"^schedule: {message}"):
        cupyattn.schedule(options.pop("cache_seqlens"), **options)


def test_tree_mask_takes_all_new_keys():
    """Every query tile of a tree reaches to the end, where a causal one stops at its last query."""
    kwargs = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "q_len": 200}
    causal, tree = (cupyattn.schedule(np.int32([200]), tree_mask=tree, **kwargs) for tree in (False, True))
    ends = [{row: end for _, _, row, _, end, *_ in made.prefill.items.tolist()} for made in (causal, tree)]
    assert ends[0][0] == 64 and set(ends[1].values()) == {256} and tree.tree_mask and not causal.tree_mask


def test_errors_of_device_lengths():
    with install() as xp:
        kwargs = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        lengths = xp.array(np.int32([5, 6]))
        with pytest.raises(ValueError, match="max_k_len must be given for CuPy lengths"):
            cupyattn.schedule(lengths, **kwargs)
        with pytest.raises(ValueError, match="max_q_len must be given for a CuPy cu_seqlens_q"):
            cupyattn.schedule(lengths, cu_seqlens_q=xp.array(np.int32([0, 1, 2])), max_k_len=9, **kwargs)
        with pytest.raises(ValueError, match="xp must be cupy for CuPy lengths, got numpy"):
            cupyattn.schedule(lengths, xp=np, max_k_len=9, **kwargs)
        table = xp.array(np.zeros((2, 3), np.int32))
        assert cupyattn.schedule(lengths, block_table=table, page_size=16, **kwargs).limits.max_k_len == 48


# ---- schedules of something else ---------------------------------------------------------------------------


@pytest.fixture(params=["numpy", "checked stand-in", "stand-in"])
def place(request, monkeypatch):
    """Where arrays are; on a stand-in for a GPU nobody reads them unless they are checked."""
    if request.param == "numpy":
        yield NumpyArrays()
        return
    if request.param == "checked stand-in":
        monkeypatch.setenv("CUPYATTN_CHECK", "1")
    with install() as xp:
        yield xp


def attend(xp, made, q_len=None, **changes):
    """`attention` of two sequences, or with `q_len` paged_decode, some arrays replaced; True when it is refused."""
    options = {"cache_seqlens": np.int32([300, 200]), "block_table": np.arange(20, dtype=np.int32).reshape(2, 10),
               **({} if q_len else {"cu_seqlens_q": np.int32([0, 1, 3])}), **changes}
    options = {name: xp.array(a) for name, a in options.items() if a is not None}
    if options.get("cu_seqlens_k") is not None:
        del options["cache_seqlens"], options["block_table"]
    k = np.zeros((20, 64, 2, 8), np.float32)
    k = xp.array(k.reshape(-1, 2, 8) if "cu_seqlens_k" in options else k)
    if q_len:
        return cupyattn.paged_decode(xp.array(np.zeros((2, q_len, 4, 8), np.float32)), k, k, schedule=made, **options)
    return cupyattn.attention(xp.array(np.zeros((3, 4, 8), np.float32)), k, k, schedule=made, max_q_len=2, **options)


SHARD = {"key_offsets": np.int32([64, 0]), "key_counts": np.int32([100, 150])}


@pytest.mark.parametrize("name, then, given, now, found", [
    ("cache_seqlens", [64, 200], {}, [300, 200], r"cache_seqlens, got one for \[64, 200\]"),
    ("cu_seqlens_q", [0, 2, 3], {}, [0, 1, 3], r"query lengths, got one for \[2, 1\]"),
    ("cu_seqlens_k", None, {}, [0, 200, 500], r"cache_seqlens, got one for \[300, 200\]"),
    ("cache_starts", [64, 0], {}, [0, 0], r"cache_starts, got one for \[64, 0\]"),
    ("finished", [True, False], {}, [False, False], r"finished, got one for \[True, False\]"),
    ("key_offsets", [64, 0], SHARD, [0, 0], r"key_offsets, got one for \[64, 0\]"),
    ("key_counts", [100, 150], SHARD, [100, 160], r"key_counts, got one for \[100, 150\]"),
], ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "")
def test_schedule_of_other_lengths(place, name, then, given, now, found):
    """Refused where lengths may be read, and a schedule of the right ones is taken."""
    xp = place
    dtype = bool if name == "finished" else np.int32
    arrays = {"cache_seqlens": np.int32([300, 200]), "cu_seqlens_q": np.int32([0, 1, 3]), **given}
    made_of = {**arrays, **({} if then is None else {name: np.array(then, dtype)})}
    made = cupyattn.schedule(made_of.pop("cache_seqlens"), **made_of, num_heads=4, num_kv_heads=2, head_dim=8,
                             dtype="float32", xp=xp.module)
    changed = {**given, name: np.array(now, dtype)}
    if xp.name == "standin" and not env.check():
        attend(xp, made, **changed)
    else:
        with pytest.raises(ValueError, match=f"attention: schedule must be made for these {found}"):
            attend(xp, made, **changed)
    if then is not None:
        attend(xp, made, **{**given, name: np.array(then, dtype)})


def test_schedule_of_other_arguments(place):
    """Which arrays are given is no content: refused everywhere, also by schedules made on the device."""
    xp, sizes = place, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"}
    host = np.int32([300, 200])
    starts, off = np.int32([0, 1, 3]), np.array([False, False])
    for lengths, room in ((host, {"xp": xp.module}), (xp.array(host), {"max_k_len": 640, "max_q_len": 2})):
        array = np.asarray if isinstance(lengths, np.ndarray) else xp.array
        ragged = cupyattn.schedule(lengths, cu_seqlens_q=array(starts), **sizes, **room)
        attend(xp, ragged)
        with pytest.raises(ValueError, match="paged_decode: schedule must be made for q_len 2, got one for cu_seq"):
            attend(xp, ragged, 2)
        for name, value in (("finished", off), ("cache_starts", np.int32([0, 0]))):
            with pytest.raises(ValueError, match=f"schedule must be made with {name}, got one made without"):
                attend(xp, ragged, **{name: value})
        room.pop("max_q_len", None)
        made = cupyattn.schedule(lengths, q_len=2, finished=array(off), **sizes, **room)
        with pytest.raises(ValueError, match="schedule must be made for q_len 1, got one for q_len 2"):
            attend(xp, made, 1)
        with pytest.raises(ValueError, match="schedule must be made without finished, got one made with"):
            attend(xp, made, 2)


def test_schedule_filled_again():
    """It is that of the lengths it was filled from last, whichever of its names a call uses."""
    first = np.int32([300, 200])
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"}
    made = cupyattn.schedule(first, max_k_len=640, **sizes)
    attend(NumpyArrays(), made, 1)
    again = cupyattn.schedule(np.int32([500, 100]), out=made, **sizes)
    for either in (made, again):
        attend(NumpyArrays(), either, 1, cache_seqlens=np.int32([500, 100]))
        with pytest.raises(ValueError, match=r"these cache_seqlens, got one for \[500, 100\]"):
            attend(NumpyArrays(), either, 1)


# ---- shared prefixes ---------------------------------------------------------------------------------------


def groups_of(rows, seqlens, page_size=16, unit=64, q_lens=1, **kwargs):
    table = PageTable(np.array(rows, np.int32))
    batch = len(rows)
    found = shared_prefixes(table, page_size, np.broadcast_to(seqlens, batch), np.broadcast_to(q_lens, batch), unit,
                            kwargs.get("eligible", np.ones(batch, bool)))
    return sorted((keys, group.tolist()) for keys, group in found)


def pages(*runs):
    """A row of a page table: runs of ids (first, count)."""
    return [first + i for first, count in runs for i in range(count)]


def test_prefix_of_all():
    rows = [pages((0, 40), (100 * b, 20)) for b in range(1, 6)]
    assert groups_of(rows, 900) == [(640, [0, 1, 2, 3, 4])]
    assert groups_of(rows, [900, 900, 600, 900, 900]) == [(576, [0, 1, 2, 3, 4])]     # 599 old tokens: 37 full pages
    assert groups_of(rows, [900, 900, 300, 900, 900]) == [(640, [0, 1, 3, 4])]        # one that would hold back four
    assert groups_of(rows, 900, unit=1024) == []
    assert groups_of(rows, 900, page_size=64, unit=1024) == []                        # 899 old tokens
    assert groups_of(rows, 3000, page_size=64, unit=1024) == [(2048, [0, 1, 2, 3, 4])]
    assert groups_of(rows, 640 + 3, q_lens=3) == [(640, [0, 1, 2, 3, 4])]
    assert groups_of(rows, 640 + 2, q_lens=3) == [(576, [0, 1, 2, 3, 4])]             # token 639 is a query's own
    assert groups_of(rows, 900, q_lens=np.array([1, 2, 1, 2, 3])) == [(640, [0, 2]), (640, [1, 3])]
    assert groups_of(rows, 900, eligible=np.array([1, 0, 1, 0, 1], bool)) == [(640, [0, 2, 4])]


def test_nested_prefixes():
    """One group each: the longer prefix where that saves more."""
    common, more = (0, 8), (50, 40)
    rows = [pages(common, more, (1000 * b, 12)) for b in (1, 2, 3)]
    rows += [pages(common, (1000 * b, 52)) for b in (4, 5, 6, 7)]
    rows += [pages((9999, 60))]
    assert groups_of(rows, 960) == [(768, [0, 1, 2])]                                 # 2 tiles do not pay for 4 merges
    rows = [pages((0, 32), (50, 8), (1000 * b, 20)) for b in (1, 2)]
    rows += [pages((0, 32), (1000 * b, 28)) for b in (3, 4, 5)]
    assert groups_of(rows, 960) == [(512, [0, 1, 2, 3, 4])]


@hypothesis_settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_prefixes_save_what_they_can(data):
    """Random tries: groups are valid, and no partition into groups saves more."""
    batch, page_size, ids = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([16, 32, 100])), itertools.count()
    rows = [[] for _ in range(batch)]

    def grow(members):
        run = [next(ids) for _ in range(data.draw(st.integers(1, 20)))]
        for b in members:
            rows[b] += run
        if len(rows[members[0]]) < 40:
            for _, branch in itertools.groupby(sorted((data.draw(st.integers(0, 2)), b) for b in members),
                                               key=lambda pair: pair[0]):
                grow([b for _, b in branch])

    grow(list(range(batch)))
    table = np.array([row[:40] for row in rows], np.int32)
    seqlens = np.array(data.draw(st.lists(st.integers(1, 40 * page_size), min_size=batch, max_size=batch)))
    found = groups_of(table, seqlens, page_size)

    def saved(keys, group):
        return keys // 64 * (len(group) - 1) - 2 - len(group)

    def keys_of(group):
        whole = (seqlens[group].min() - 1) // page_size
        same = (table[group, :whole] == table[group[0], :whole]).all(axis=0)
        return (whole if same.all() else int(same.argmin())) * page_size // 64 * 64

    def best(left):
        if not left:
            return 0
        return max(max(0, saved(keys_of(group), group)) * (len(group) > 1) + best([b for b in left if b not in group])
                   for size in range(len(left)) for rest in itertools.combinations(left[1:], size)
                   for group in [[left[0], *rest]])

    assert all(0 < keys <= keys_of(group) and saved(keys, group) > 0 for keys, group in found)
    assert len({b for _, group in found for b in group}) == sum(len(group) for _, group in found)
    assert sum(saved(*group) for group in found) == best(list(range(batch)))


@pytest.mark.parametrize("form", ["dense", "csr", "pointers"])
def test_schedule_shares_prefixes(form):
    rows = np.array([pages((0, 70), (100 * b, 30)) for b in range(1, 4)] + [pages((900, 100))], np.int32)
    indptr = np.arange(5, dtype=np.int32) * 100
    table = {"dense": rows, "csr": PageTable.csr(rows.reshape(-1), indptr),
             "pointers": PageTable.pointers(rows.reshape(-1).astype(np.uint64) * 4096 + 4096, indptr,
                                            trusted_pointers=True)}[form]
    lengths = np.int32([1500, 1600, 1300, 1100])
    kwargs = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    made = cupyattn.schedule(lengths, block_table=table, page_size=16, **kwargs)
    items = made.decode.items
    assert made.decode.members[:, 0].tolist() == [0, 1, 2] and made.decode.rows == 8
    assert items[items[:, 7] > 0, 7].tolist() and items[items[:, 7] > 0, 4].max() == 1088
    assert_same_work(made.decode, reference.make_work(
        lengths, 1, num_kv_heads=2, heads_per_kv=2, rows=8, workers=16, prefixes=[(1088, [0, 1, 2])]))
    check_coverage(made.decode, lengths, 2)
    assert "share" in repr(made)
    invariant = cupyattn.schedule(lengths, block_table=table, page_size=16, invariant=True, one_list=True, **kwargs)
    assert invariant.decode is None and invariant.prefill.items[invariant.prefill.items[:, 7] > 0, 4].max() == 1024
    plain = cupyattn.schedule(lengths, **kwargs)
    for options in ({"share_prefix": False}, {"window_size": 5000}, {"cache_starts": np.zeros(4, np.int32)},
                    {"max_k_len": 1600}, {"num_splits": 4}):
        options = {"block_table": table, "page_size": 16, **kwargs, **options}
        assert len(cupyattn.schedule(lengths, **options).decode.members) == 0
    assert_same_work(cupyattn.schedule(lengths, block_table=table, page_size=16, share_prefix=False, **kwargs).decode,
                     plain.decode)
