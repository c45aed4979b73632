# SPDX-License-Identifier: Apache-2.0
"""`attention` through its tensor-core kernel on the CPU executor, which by itself would take CUDA cores."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import test_attention
from compare import assert_close, sparse_array
from test_attention import (
    FORMS,
    OPTIONS,
    SINKS,
    SLOPES,
    TOLERANCE,
    WILD,
    assert_all_same,
    attend,
    make,
    quantized,
    several,
)

import cupyattn
from cupyattn.attn import attend as road
from cupyattn.attn import plans as attention_plans
from cupyattn.kv.quantized import FORMATS, QuantizedKV
from cupyattn.runtime.cpu import counters, settings

rng = np.random.default_rng(29)
check = functools.partial(test_attention.check, rounded_probs=True)


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Every launch takes the kernel here, for sequences of any length; a list of one: its number of blocks."""
    workers, tiling = [3], attention_plans.tiling
    monkeypatch.setattr(attention_plans, "version", lambda facts: ("mma", "tensor cores"))
    monkeypatch.setattr(road, "tiling", lambda *of: tiling(*of)._replace(prefill_workers=workers[0]))
    monkeypatch.setattr(road, "list_ranges", lambda *of: (None, (1, 2**31 - 1)))
    return workers


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_ragged_batch(fused):
    """Whole prompts, chunks, single tokens and nothing, over more than one tile of rows."""
    with settings(fused=fused):
        check(make([300, 70, 70, 700, 0, 9, 3], [1, 4, 70, 33, 0, 0, 9], heads=6, dtype="float16"))


def test_forms_agree():
    """However keys are found: the same bits."""
    case = make([80, 1, 200], [7, 1, 100], page_size=7, dtype="float16")
    check(case)
    assert_all_same([attend(case, form=form) for form in FORMS])


def test_pages_that_do_not_exist(monkeypatch):
    """Their tokens are invisible, in tiles that are otherwise seen whole too."""
    monkeypatch.setattr(road, "_check_content", lambda *of: None)
    case = make([700, 64], [90, 64], page_size=16, dtype="float16")
    case.table[0, [3, 20]] = -5, WILD
    check(case)
    check(case, causal=False)


@pytest.mark.parametrize("head_dim, head_dim_v, dtype, heads", [
    (80, 128, "bfloat16", 6), (72, 8, "bfloat16", 2), (200, 256, "float16", 4)])
def test_head_dims(head_dim, head_dim_v, dtype, heads):
    check(make([200, 65, 10], [70, 65, 1], heads=heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(several("float16"), **options)


def test_scales_of_any_sign():
    for scale in (0.0, -0.3):
        check(several("float16"), softmax_scale=scale)


def test_masks():
    for shape in ((5, 4, 20, 1060), (40,), (5, 1, 20, 100)):
        check(several("float16"), mask=rng.random(shape) < 0.7)
    check(several("float16"), mask=rng.standard_normal((5, 4, 20, 60)).astype(np.float32), causal=False)
    tree = np.tril(rng.random((43, 64)) < 0.5)
    words = np.packbits(tree, axis=1, bitorder="little").view(np.uint32)
    check(several("float16"), tree_mask=words, window_size=30)


def test_starts_and_finished():
    unread = [3, 1030, 20, 0, 64]
    case = make([45, 1060, 20, 0, 130], [3, 17, 20, 2, 1], unread=unread, dtype="float16")
    check(case, cache_starts=np.int32(unread), window_size=9)
    finished = np.array([False, False, True, False, True])
    check(case, cache_starts=np.int32(unread), finished=finished)
    check(make([3, 0, 20], [9, 70, 21], dtype="float16"))   # more queries than keys


def test_huge_scores():
    case = make([50, 300], [50, 9], dtype="bfloat16", head_dim=80)
    case.q *= case.q.dtype.type(1e4)
    want, want_lse = case.expected()
    out, lse = attend(case)
    assert_close(out, want, *TOLERANCE["bfloat16"])
    assert_close(lse, want_lse, 1e-2, 1e-5)


# ---- work ------------------------------------------------------------------------------------------------


def test_splits(blocks):
    """Partial results merged in the kernel by the last to arrive, and by split_reduce."""
    case = make([45, 900, 0, 130], [3, 5, 1, 130], dtype="float16")
    for blocks[0] in (1, 7, 40):
        check(case, sinks=SINKS)
    check(case, sinks=SINKS, how={"num_splits": 5})
    parts = np.full((5, 139, 4, 64), np.nan, np.float32), np.full((5, 139, 4), np.nan, np.float32)
    cupyattn.attention(case.q, case.k, case.v, cu_seqlens_q=case.cu, block_table=case.table,
                       cache_seqlens=case.lengths, num_splits=5, partials=parts)
    out, lse = cupyattn.split_reduce(*parts, sinks=SINKS, return_lse=True)
    want, want_lse = case.expected(sinks=SINKS)
    assert_close(out, want, *TOLERANCE["float16"])
    assert_close(lse, want_lse, 1e-5, 1e-6)


@pytest.mark.parametrize("formats, head_dim, cuts", [
    (None, 64, [0, 1, 65, 700, 1299, 1300]), (None, 128, [0, 20, 300, 1290, 1300]),
    (("int8", "int4"), 64, [0, 40, 105, 700, 1250, 1300]), (("hadamard8", "hadamard4"), 64, [0, 30, 400, 1280, 1300]),
    (("int8_channel", "int8_channel"), 128, [0, 30, 400, 1280, 1300])], ids=str)
def test_chunked_prefill_is_whole_prefill(formats, head_dim, cuts, blocks):
    """With invariant=True: the same bits, whatever the chunks, their tiles of rows and the number of blocks."""
    case = make([1300], [1300], heads=2, kv_heads=1, head_dim=head_dim, dtype="float16")
    if formats:
        case = stored(case, *formats)
    results = []
    for blocks[0], ends in ((1, [0, 1300]), (5, cuts)):
        parts = []
        for first, last in itertools.pairwise(ends):
            chunk = replace(case, q=case.q[first:last], q_lens=np.int32([last - first]), lengths=np.int32([last]))
            parts.append(attend_stored(chunk, invariant=True, window_size=600, sinks=SINKS[:2]))
        results.append(tuple(np.concatenate(a) for a in zip(*parts, strict=True)))
    assert_all_same(results)


def test_a_sequence_does_not_see_its_batch(blocks):
    case = make([20, 1100, 0, 300], [20, 3, 1, 200], dtype="float16")
    out, lse = attend(case, invariant=True)
    blocks[0] = 1
    for b in range(4):
        rows = slice(case.cu[b], case.cu[b + 1])
        assert_all_same([attend(case.alone(b), invariant=True), (out[rows], lse[rows])])


# ---- caches ----------------------------------------------------------------------------------------------


def stored(case, k_format, v_format):
    """`case` with its caches in these formats, what no sequence uses the worst there is."""
    used = np.zeros(case.k.shape[:2], bool)
    for b in range(len(case.lengths)):
        used[case.tokens(b)] = True
    k, v = (quantized(a, f, case.q.dtype.name, used) for a, f in ((case.k, k_format), (case.v, v_format)))
    return replace(case, k=k, v=v)


def attend_stored(case, **options):
    return cupyattn.attention(case.q, case.k, case.v, cu_seqlens_q=case.cu, block_table=case.table,
                              cache_seqlens=case.lengths, return_lse=True, **options)


def check_formats(k_format, v_format, dtype, head_dim, group=2, **options):
    case = make([45, 200, 300, 0], [1, 70, 9, 1], heads=2 * group, head_dim=head_dim, dtype=dtype, kv_dtype="float32")
    case = stored(case, k_format, v_format)
    out, lse = attend_stored(case, window_size=250, **options)
    want, want_lse = case.expected(window_size=250, **options)
    atol, rtol = TOLERANCE[dtype]
    # queries that are rotated, or scaled per channel, are rounded once more
    once_more = 1.5 if "hadamard" in k_format or "channel" in k_format else 1.0
    assert_close(out, want, once_more * atol, once_more * rtol)
    assert_close(lse, want_lse, once_more * 1e-3, 0)


@pytest.mark.parametrize("k_format, v_format, dtype, head_dim", [
    ("int8", "int4", "float16", 64), ("int4", "int8", "bfloat16", 64), ("hadamard6", "hadamard8", "float16", 64),
    ("int8_channel", "fp8_e4m3", "bfloat16", 96), ("fp8_e5m2", "hadamard4", "float16", 192)])
def test_formats(k_format, v_format, dtype, head_dim):
    """Attention over what the codes stand for, at the bounds of the activations."""
    check_formats(k_format, v_format, dtype, head_dim)


@pytest.mark.full
@pytest.mark.parametrize("k_format, v_format", [*zip(FORMATS, FORMATS, strict=True), ("hadamard8", "hadamard4"),
                                                ("int8_symmetric", "int8_channel")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_all_formats(k_format, v_format, dtype, head_dim):
    if head_dim == 32 and "hadamard6" in (k_format, v_format):
        head_dim = 64   # rows of 24 bytes are for CUDA cores
    for group in (1, 5):
        check_formats(k_format, v_format, dtype, head_dim, group)
        check_formats(k_format, v_format, dtype, head_dim, group, alibi_slopes=SLOPES[:1].repeat(2 * group))


# ---- the executor's checks -------------------------------------------------------------------------------


@pytest.mark.parametrize("formats, options", [
    (None, {}), (None, {"alibi_slopes": SLOPES, "mask": rng.random((40, 30)) < 0.7}),
    (None, {"tree_mask": rng.integers(0, 2**32, (51, 2), np.uint32)}), (("hadamard4", "int8"), {})],
    ids=["plain", "biases", "tree", "quantized"])
def test_checked(formats, options, blocks):
    """The checker finds nothing, and every order of threads gives the same bits."""
    case = make([40, 0, 330], [9, 2, 40], dtype="bfloat16", kv_dtype="float32" if formats else None)
    if formats:
        case = stored(case, *formats)
    results = []
    for schedule, blocks[0] in (("forward", 1), ("reverse", 3), ("random", 5)):
        with settings(check=True, schedule=schedule, seed=blocks[0]):
            results.append(attend_stored(case, window_size=300, invariant=True, **options))
    assert_all_same(results)


def page_aligned(array):
    """A copy at the start of a page of memory, so of a sector."""
    if array is None:
        return None
    copy = sparse_array(array.shape, array.dtype.name)
    copy[...] = array
    return copy


@pytest.mark.parametrize("formats", [None, ("hadamard4", "int8"), ("int8", "int4"), ("int4", "hadamard4")], ids=str)
def test_traffic(formats, blocks):
    """Codes and scales are read once per tile of rows, and no tile is written or read with bank conflicts."""
    blocks[0], tokens = 2, 256
    case = make([tokens], [1], heads=128, kv_heads=1, dtype="bfloat16", kv_dtype="float32" if formats else None)
    if formats:
        case = stored(case, *formats)
    arrays = {}
    for side in "kv":
        cache = getattr(case, side)
        if formats:
            cache = QuantizedKV(*map(page_aligned, (cache.codes, cache.scale, cache.zero)), format=cache.format)
            arrays |= {f"{side}_scale.scale": cache.scale, f"{side}_scale.zero": cache.zero}
        setattr(case, side, cache if formats else page_aligned(cache))
        arrays[f"{side}.data"] = cache.codes if formats else cache
    with settings(check=True), counters() as launches:
        attend_stored(case)
    moved = wanted = 0
    for name, array in arrays.items():
        if array is not None:
            traffic, size = launches[-1].buffers[name], tokens * array[0, 0].nbytes
            assert traffic["bytes_read"] == size, name
            # the scales of a token's groups are loaded one by one, and counted as if no cache held their sector
            by_group = array.ndim == 4 and name.endswith("scale")
            moved += size if by_group else 32 * traffic["sectors_read"]
            wanted += size
    assert moved <= 1.05 * wanted
    shared = launches[-1].shared
    assert shared["cp_async"]["max_ways"] == shared["ldmatrix"]["max_ways"] == 1
