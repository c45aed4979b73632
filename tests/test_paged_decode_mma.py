# SPDX-License-Identifier: Apache-2.0
"""The tensor-core version of paged_decode on the CPU executor, in every cache format, launched without the op."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, dtype_of, poison

import cupyattn
from cupyattn import BlockKV, PageTable
from cupyattn.attn import plans as attention_plans
from cupyattn.attn.plans import Facts
from cupyattn.attn.work_list import make_work
from cupyattn.kv.quantized import FORMATS, QuantizedKV, kv_side
from cupyattn.reference.kv_codec import quantize
from cupyattn.runtime import launch, make_args
from cupyattn.runtime.cpu import counters, settings

TOLERANCE = {"float16": (1e-3, 2.0**-10), "bfloat16": (4e-3, 2.0**-8)}
WILD = 2_147_480_000   # an id that would lead far out of any cache
NO_MASK = {"data": None, "stride_seq": 0, "stride_head": 0, "stride_query": 0, "stride_key": 0, "queries": 0,
           "keys": 0, "kind": 0}
rng = np.random.default_rng(23)

# (dtype, K, V, padded head_dim, with biases) of the versions CI compiles; the other tests take theirs from here
VERSIONS = [("float16", "plain", "plain", 128, False), ("bfloat16", "plain", "plain", 64, True),
            ("bfloat16", "plain", "plain", 256, False), ("float16", "int8", "int4", 128, False),
            ("bfloat16", "int4", "int8", 64, False), ("bfloat16", "int8_symmetric", "int8_channel", 128, True),
            ("float16", "int8_channel", "int8_symmetric", 256, False), ("float16", "fp8_e4m3", "fp8_e5m2", 64, True),
            ("bfloat16", "fp8_e5m2", "fp8_e4m3", 128, False), ("float16", "hadamard8", "hadamard4", 128, True),
            ("bfloat16", "hadamard4", "hadamard8", 256, False), ("float16", "hadamard6", "hadamard6", 128, False)]
PLAIN, TOKEN, FOUR, TENSOR, CHANNEL, BIASED, GROUP = (VERSIONS[i] for i in (0, 3, 4, 5, 6, 7, 11))


# ---- cases -----------------------------------------------------------------------------------------------

@dataclass
class Case:
    """Inputs of one call. Slots without a visible token are NaN or garbage, unread table entries wild."""

    version: tuple           # of VERSIONS
    q: np.ndarray            # [batch, q_len, heads, head_dim]
    k: object                # array or QuantizedKV
    v: object
    table: np.ndarray
    lengths: np.ndarray
    k_numbers: np.ndarray    # the caches as float64
    v_numbers: np.ndarray
    unused: list             # arrays [pages, page_size, ...] of the caches, and where they hold no token

    def alone(self, b):
        return Case(self.version, self.q[b:b + 1], self.k, self.v, self.table[b:b + 1], self.lengths[b:b + 1],
                    self.k_numbers, self.v_numbers, self.unused)

    def expected(self, *, mask=None, alibi=None, causal=True, softcap=0.0, window=0, sinks=None, starts=None,
                 scale=None):
        """(out, lse) in float64."""
        batch, q_len, heads, head_dim = self.q.shape
        page_size, kv_heads = self.k_numbers.shape[1:3]
        out = np.zeros((batch, q_len, heads, self.v_numbers.shape[3]))
        lse = np.full((batch, q_len, heads), -np.inf)
        for b, i, h in np.ndindex(lse.shape):
            at = int(self.lengths[b]) - q_len + i
            t = np.arange(int(self.lengths[b]))
            visible = t >= (0 if starts is None else starts[b])
            if causal:
                visible &= t <= at
            if window:
                visible &= (t > at - window) & (t < at + window)
            pages = self.table[b, t // page_size]
            visible &= (pages >= 0) & (pages < len(self.k_numbers))
            t, pages = t[visible], pages[visible]
            g = h // (heads // kv_heads)
            keys, values = (x[pages, t % page_size, g] for x in (self.k_numbers, self.v_numbers))
            s = keys @ self.q[b, i, h].astype(np.float64) * (head_dim**-0.5 if scale is None else scale)
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if alibi is not None:
                s = s - alibi[h] * np.abs(at - t)
            if mask is not None:
                s = s + mask[b, h, i, t]
            if not len(t) or s.max() == -np.inf:
                continue
            p = np.exp(s - s.max())
            lse[b, i, h] = s.max() + math.log(p.sum())
            sink = 0.0 if sinks is None else math.exp(float(sinks[h]) - s.max())
            out[b, i, h] = p @ values / (p.sum() + sink)
        return out, lse


def _aligned(array):
    """The same numbers in rows at multiples of 16 bytes, with garbage between them; the first one at one of 32."""
    shape = (*array.shape[:-1], -(-array.shape[-1] * array.itemsize // 16) * 16)
    room = np.full(math.prod(shape) + 32, 0x7F, np.uint8)
    room = room[-room.ctypes.data % 32:][:math.prod(shape)].reshape(shape).view(array.dtype)[..., :array.shape[-1]]
    room[...] = array
    return room


def _stored(numbers, used, format, dtype, scale_dtype):
    """(cache, its numbers, its arrays) of `numbers` [pages, page_size, kv_heads, dim]; garbage where not `used`."""
    if format == "plain":
        plain = _aligned(numbers.astype(dtype_of(dtype)))
        plain[~used] = np.nan
        return plain, plain.astype(np.float64), [plain]
    fixed = {"int8_symmetric": lambda: np.abs(numbers).max((0, 1, 3)) / 127,
             "int8_channel": lambda: np.abs(numbers).max((0, 1)) / 127}.get(format, lambda: None)()
    codes, scale, zero = quantize(numbers, format, scale=fixed, scale_dtype=dtype_of(scale_dtype))
    made = QuantizedKV(_aligned(codes), scale, zero, format=format)
    arrays = [made.codes, *(a for a in (scale, zero) if a is not None and a.shape[:2] == used.shape)]
    for array in arrays:
        array[~used] = 0x7F if array.dtype.kind in "iu" else np.nan
    return made, made.dequantize("float64"), arrays


def make(version, lengths, *, heads=4, kv_heads=2, head_dim=None, head_dim_v=None, page_size=16, q_len=1,
         scale_dtype=None, offset=0.0, size=1.0):
    dtype, k, v, padded, _ = version
    head_dim = head_dim or padded
    scale_dtype = scale_dtype or dtype
    lengths = np.int32(lengths)
    batch, columns = len(lengths), -(-int(lengths.max(initial=0)) // page_size) + 1
    num_pages = batch * columns + 2
    table = np.full((batch, columns), WILD, np.int32)
    used = np.zeros((num_pages, page_size), bool)
    ids = rng.permutation(num_pages)
    for b, length in enumerate(lengths):
        t = np.arange(length)
        table[b, t // page_size] = ids[b * columns + t // page_size]
        used[table[b, t // page_size], t % page_size] = True
    caches = []
    for d, format in ((head_dim, k), (head_dim_v or head_dim, v)):
        numbers = size * rng.standard_normal((num_pages, page_size, kv_heads, d)) + offset
        caches.append(_stored(numbers.astype(np.float32), used, format, dtype, scale_dtype))
    q = rng.standard_normal((batch, q_len, heads, head_dim)).astype(dtype_of(dtype))
    (k, k_numbers, k_arrays), (v, v_numbers, v_arrays) = caches
    return Case(version, q, k, v, table, lengths, k_numbers, v_numbers, [(a, ~used) for a in k_arrays + v_arrays])


def _view(names, array):
    return {"data": array, **dict(zip(names, (s // array.itemsize for s in array.strides), strict=False))}


_sequence_view = functools.partial(_view, ("stride_seq", "stride_token", "stride_head"))
_mask_view = functools.partial(_view, ("stride_seq", "stride_head", "stride_query", "stride_key"))


def run(case, *, workers=3, num_splits=None, invariant=False, prefixes=(), causal=True, softcap=0.0, window=0,
        sinks=None, starts=None, scale=None, mask=None, alibi=None):
    """(out, lse) of the kernel."""
    batch, q_len, heads, head_dim = case.q.shape
    k, v = kv_side("decode", "k", case.k), kv_side("decode", "v", case.v)
    kv_heads, head_dim_v = k.shape[2], v.shape[3]
    work = make_work(case.lengths, q_len, num_kv_heads=kv_heads, heads_per_kv=heads // kv_heads, rows=16,
                     workers=workers, causal=causal, window_size=window, cache_starts=starts, num_splits=num_splits,
                     invariant=invariant, prefixes=prefixes)
    padded, bias = case.version[3:]
    assert bias or (mask is None and alibi is None)
    facts = Facts(case.q.dtype.name, k.tag, v.tag, 16, kv_heads, heads // kv_heads,
                  padded, padded, bias, "cpu")   # the padded head_dim decides
    plan = attention_plans._plan("paged_decode", facts, 16, work.workers, "mma", "chosen by the test")
    assert plan.spec.kernel == "paged_decode_mma"
    out = poison(np.empty((batch, q_len, heads, head_dim_v), case.q.dtype))
    lse = poison(np.empty((batch, q_len, heads), np.float32))
    slots = max(1, work.num_slots)
    launch(plan, make_args(
        plan, q=_sequence_view(case.q), k=k.view, v=v.view, k_scale=k.scale, v_scale=v.scale,
        table={"block_table": case.table, "indptr": None, "block_ptrs": None, "row_starts": None,
               "stride_seq": case.table.shape[1], "max_pages": case.table.shape[1],
               "page_size": case.k.shape[1], "num_pages": case.k.shape[0], "reserved": 0},
        mask=NO_MASK if mask is None else {**_mask_view(mask), "queries": mask.shape[2], "keys": mask.shape[3],
                                               "kind": 2},
        out=_sequence_view(out),
        partials={"out": poison(np.empty((slots, 16, head_dim_v), np.float32)),
                  "lse": poison(np.empty((slots, 16), np.float32)), "sum": None, "split_count": None,
                  "stride_split": 16 * head_dim_v, "stride_token": head_dim_v, "stride_head": 0, "lse_split": 16,
                  "lse_token": 1, "lse_head": 0},
        work={name: getattr(work, name) for name in work.ARRAYS}, cu_seqlens_q=None, cache_seqlens=case.lengths,
        cache_starts=starts, key_offsets=None, key_counts=None, finished=None, tree_mask=None, alibi_slopes=alibi,
        sinks=sinks, lse=lse, stride_seqlens=1, stride_starts=1, stride_tree=0, tree_words=0,
        tokens=batch * q_len, q_len=q_len, num_kv_heads=kv_heads, heads_per_kv=heads // kv_heads,
        head_dim=head_dim, head_dim_v=head_dim_v,
        causal=int(causal), window_size=window, key_stride=1, key_offset=0, num_splits=0, whole_to_out=0,
        sink_in_partials=0, softmax_scale=head_dim**-0.5 if scale is None else scale, softcap=softcap,
        lse_factor=1.0))
    assert not work.counters.any()
    return out, lse


def check(case, *, workers=3, num_splits=None, invariant=False, prefixes=(), **options):
    out, lse = run(case, workers=workers, num_splits=num_splits, invariant=invariant, prefixes=prefixes, **options)
    want, want_lse = case.expected(**options)
    assert_close(out, want, *TOLERANCE[case.q.dtype.name])
    # queries rotated or scaled and rounded to half cost 2^-11 of a score; as they are, nothing
    exact = case.version[1] in ("plain", "int8", "int4", "int8_symmetric", "fp8_e4m3", "fp8_e5m2")
    assert_close(lse, want_lse, 1e-5 if exact else 2e-3, 1e-5)


# ---- values ----------------------------------------------------------------------------------------------

def test_versions_are_those_that_ci_compiles():
    tags = {"plain": "KvPlain<{}>", **{name: kind.tag for name, kind in FORMATS.items()}}
    types = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
    wanted = {(types[dtype], tags[k].format(types[dtype]), tags[v].format(types[dtype]), padded, bias)
              for dtype, k, v, padded, bias in VERSIONS}
    core = [dict(spec.constants) for spec in attention_plans.DECODE_CORE if spec.kernel == "paged_decode_mma"]
    assert wanted == {(types[c["T"]], c["KF"], c["VF"], c["HEAD_DIM"], bool(c["BIAS"])) for c in core}
    for side in (1, 2):
        assert {version[side] for version in VERSIONS} == {"plain", *FORMATS}


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_formats(version):
    check(make(version, [70, 131, 0, 1]))
    padded = version[3]
    odd = padded - 32 if any("hadamard" in f for f in version[1:3]) else {64: 40, 128: 72, 256: 200}[padded]
    check(make(version, [33, 64], head_dim=odd, page_size=7), workers=2)


@pytest.mark.parametrize("head_dims", [(72, 72), (80, 128), (128, 96), (8, 88), (120, 16)])
@pytest.mark.parametrize("version", [PLAIN, TOKEN], ids=str)
def test_head_dims_of_keys_and_values(version, head_dims):
    check(make(version, [40, 65], head_dim=head_dims[0], head_dim_v=head_dims[1], scale_dtype="float32"
               if version is FOUR else None))


@pytest.mark.parametrize("group", range(1, 17))
def test_head_groups(group):
    check(make(TOKEN, [50, 33], heads=2 * group), workers=4)


@pytest.mark.parametrize("heads, q_len", [(6, 3), (14, 5), (40, 2), (17, 8)])
def test_several_new_tokens_and_row_tiles(heads, q_len):
    check(make(TOKEN, [50, 3, 70], heads=heads, kv_heads=2 if heads % 2 == 0 else 1, q_len=q_len), workers=4)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tiles(length):
    check(make(PLAIN, [length], heads=2, kv_heads=1, page_size=5))
    check(make(TOKEN, [length], heads=2, kv_heads=1, page_size=5))


OPTIONS = {"window": {"window": 33}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": np.float32([0.5, -3, 8, -np.inf])},
           "starts": {"starts": np.int32([3, 130, 20])}, "scale": {"scale": 0.5}, "window 1": {"window": 1},
           "not causal": {"causal": False, "window": 5}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(make(TOKEN, [45, 160, 20], q_len=3), **options)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v[4]], ids=str)
def test_biases(version):
    case = make(version, [45, 160, 3], q_len=2)
    mask = np.where(rng.random((3, 4, 2, 150)) < 0.3, -np.inf, rng.standard_normal((3, 4, 2, 150))).astype(np.float32)
    past_the_mask = np.concatenate([mask, np.zeros((3, 4, 2, 10))], -1)
    alibi = np.float32([0.1, 0.5, 0.0, 2.0])
    for options in ({"softcap": 3.0}, {}):
        out, lse = run(case, mask=mask, alibi=alibi, **options)
        want, want_lse = case.expected(mask=past_the_mask, alibi=alibi, **options)
        assert_close(out, want, *TOLERANCE[version[0]])
        assert_close(lse, want_lse, 2e-3, 1e-5)


def test_huge_scores():
    """Scores near 1e5 stay finite: a one-hot softmax, not NaN."""
    for version in (PLAIN, TOKEN):
        case = make(version, [50, 200])
        case.q = (case.q.astype(np.float32) * 1e4).astype(case.q.dtype)
        out, lse = run(case)
        want, want_lse = case.expected()
        assert_close(out, want, 2e-2, 2e-2)
        assert_close(lse, want_lse, 1e-1, 1e-5)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 300.0, 3e4])
def test_caches_of_any_magnitude(size):
    """Probabilities times scales stay inside half, whatever the scales are."""
    case = make(FOUR, [150, 40], size=size, scale_dtype="float32")
    case.q = (case.q.astype(np.float32) / size).astype(case.q.dtype)
    out, lse = run(case)
    want, want_lse = case.expected()
    assert_close(out.astype(np.float64) / size, want / size, *TOLERANCE["bfloat16"])
    assert_close(lse, want_lse, 1e-4, 1e-5)


def test_scales_that_grow_along_the_sequence():
    case = make(FOUR, [200], heads=2, kv_heads=1, scale_dtype="float32")
    token = np.argsort(case.table[0, :13].repeat(16)[:200] * 16 + np.arange(200) % 16)
    growth = np.float32(2.0) ** ((np.argsort(token) * 30 // 200).astype(np.float32) - 15)
    used = ~case.unused[0][1]
    for array in (case.v.scale, case.v.zero):
        array[used] *= growth[token][:, None]
    case.v_numbers = case.v.dequantize("float64")
    out, _ = run(case)
    want, _ = case.expected()
    assert_close(out / np.abs(want).max(), want / np.abs(want).max(), *TOLERANCE["bfloat16"])


def test_values_far_from_zero():
    """The offset that all values share is not rounded with the probabilities."""
    case = make(TOKEN, [300], heads=2, kv_heads=1, offset=100.0)
    out, _ = run(case, scale=0.0)
    want, _ = case.expected(scale=0.0)
    assert_close(out, want, 0, 2.0**-11 * 1.05)


# ---- how work is cut -------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", [PLAIN, FOUR, GROUP], ids=str)
@pytest.mark.parametrize("workers", [1, 4, 7])
def test_units_in_pieces(version, workers):
    case = make(version, [20, 700, 0, 257], heads=6, q_len=2)
    check(case, workers=workers)
    check(case, workers=workers, num_splits=3)


@pytest.mark.parametrize("version", [PLAIN, TOKEN, GROUP], ids=str)
def test_a_sequence_does_not_see_its_batch(version):
    """Bit for bit the result it gets alone, on any number of blocks."""
    case = make(version, [20, 1100, 0, 300], heads=6, q_len=2)
    out, lse = run(case, invariant=True)
    for b in range(len(case.lengths)):
        one, one_lse = run(case.alone(b), invariant=True, workers=1 + b)
        assert_same_bits(out[b:b + 1], one)
        assert_same_bits(lse[b:b + 1], one_lse)


def test_shared_prefixes():
    case = make(TOKEN, [300, 270, 200, 261], heads=6, q_len=2)
    for b in (1, 3):
        case.table[b, :8] = case.table[0, :8]
    check(case, workers=4, prefixes=[(128, np.array([0, 1]))])
    check(case, workers=3, prefixes=[(128, np.array([0, 1]))], sinks=np.float32([1, 2, 3, 4, 5, 6]))


def _blocks(case):
    """(k, v, blocks uint8 [pages, nbytes]): the same caches inside memory blocks."""
    parts, sides, at = [], [], 0
    for cache in (case.k, case.v):
        pages, page_size, kv_heads, head_dim = cache.shape
        arrays = [np.ascontiguousarray(a) for a in (cache.codes, cache.scale, cache.zero) if a is not None]
        places = [at + sum(a[0].nbytes for a in arrays[:i]) for i in range(4)]
        groups = arrays[1].shape[3] if arrays[1].ndim == 4 else 1
        sides.append(BlockKV(cache.format, page_size, kv_heads, head_dim, offset=at, scale_offset=places[1],
                             stride_token=arrays[0].strides[1], stride_head=arrays[0].strides[2],
                             scale_dtype=arrays[1].dtype.name, zero_offset=places[2] if cache.zero is not None else 0,
                             scale_stride_token=kv_heads * groups, scale_stride_head=groups, scale_stride_group=1))
        parts += [a.reshape(pages, -1).view(np.uint8) for a in arrays]
        at += sum(a[0].nbytes for a in arrays)
    return *sides, np.concatenate(parts, 1)


@pytest.mark.parametrize("version", [TOKEN, GROUP], ids=str)
def test_forms_of_page_tables(version, monkeypatch):
    """Lists of pages and pointers to blocks that hold codes and scales: the same bits."""
    monkeypatch.setattr(attention_plans, "version", lambda facts: ("mma", "chosen by the test"))
    case = make(version, [40, 200])
    columns = -(-case.lengths // 16)
    indptr = np.concatenate([[0], np.cumsum(columns)]).astype(np.int32)
    pages = np.concatenate([case.table[b, :n] for b, n in enumerate(columns)])
    k, v, blocks = _blocks(case)
    addresses = blocks.ctypes.data + pages.astype(np.uint64) * blocks.strides[0]
    results = [cupyattn.paged_decode(case.q[:, 0], *caches, block_table=table, cache_seqlens=case.lengths)
               for caches, table in (((case.k, case.v), case.table), ((case.k, case.v), PageTable.csr(pages, indptr)),
                                     ((k, v), PageTable.pointers(addresses, indptr, buffers=(blocks,))))]
    assert_close(results[0], case.expected()[0][:, 0], *TOLERANCE[version[0]])
    for other in results[1:]:
        assert_same_bits(other, results[0])


# ---- what must not matter --------------------------------------------------------------------------------

@pytest.mark.parametrize("version", [PLAIN, TOKEN, TENSOR, GROUP], ids=str)
def test_unused_slots_never_matter(version):
    case = make(version, [20, 150], head_dim=96)
    want = run(case)
    for number, byte, entry in ((np.inf, 0xFF, 0), (0.0, 0, -1)):
        for array, unused in case.unused:
            array[unused] = np.array(byte, np.uint8).view(array.dtype) if array.dtype.kind in "iu" else number
        case.table[case.table == WILD] = entry
        for a, b in zip(run(case), want, strict=True):
            assert_same_bits(a, b)


def test_unknown_pages_are_invisible():
    case = make(TOKEN, [60, 160])
    case.table[0, 1], case.table[1, 4] = -5, len(case.k.codes)
    check(case)


@pytest.mark.parametrize("version", [PLAIN, TOKEN, GROUP], ids=str)
def test_checked(version):
    """No fault, and the same bits in any order of threads."""
    case = make(version, [20, 150], head_dim=96, page_size=5)
    outs = []
    for schedule in ("forward", "reverse", "random"):
        with settings(check=True, schedule=schedule, seed=3):
            outs.append(run(case))
    for out, lse in outs[1:]:
        assert_same_bits(out, outs[0][0])
        assert_same_bits(lse, outs[0][1])
    assert_close(outs[0][0], case.expected()[0], *TOLERANCE[version[0]])


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_traffic(version):
    """Every code is read once, in whole sectors, and no tile is written or read with bank conflicts."""
    tokens, kv_heads = 256, 2
    case = make(version, [tokens], heads=8, kv_heads=kv_heads)
    with settings(check=True), counters() as launches:
        run(case, workers=2)
    found, = launches
    for name, cache in (("k", case.k), ("v", case.v)):
        codes = cache.codes if isinstance(cache, QuantizedKV) else cache
        traffic = found.buffers[f"{name}.data"]
        assert traffic["bytes_read"] == 32 * traffic["sectors_read"] == tokens * kv_heads * codes[0, 0, 0].nbytes
        if codes is not cache and cache.granularity in ("token", "group"):
            assert found.buffers[f"{name}_scale.scale"]["bytes_read"] == tokens * cache.scale[0, 0].nbytes
    assert found.shared["cp_async"]["max_ways"] == found.shared["ldmatrix"]["max_ways"] == 1
