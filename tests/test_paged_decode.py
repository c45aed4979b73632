# SPDX-License-Identifier: Apache-2.0
import mmap
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.attn import plans as attention_plans
from cupyattn.kv.quantized import FORMATS
from cupyattn.reference.paged_decode import paged_decode as expected_decode
from cupyattn.runtime.cpu import settings

TOLERANCE = {"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0.0)}
MAP_NORESERVE = 0x4000   # of Linux; Python 3.11's mmap does not name it
WILD = 2_147_480_000   # an id that would lead far out of any cache
rng = np.random.default_rng(17)


@dataclass
class Case:
    """Inputs of one call; every cache slot without a visible token is NaN, every unread table entry wild."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray | None = None

    def arguments(self, xp):
        tables = {"block_table": xp.array(self.table), "cache_seqlens": xp.array(self.lengths)}
        if self.starts is not None:
            tables["cache_starts"] = xp.array(self.starts)
        return (xp.array(self.q), xp.array(self.k), xp.array(self.v)), tables

    def expected(self, **options):
        return expected_decode(self.q, self.k, self.v, block_table=self.table, cache_seqlens=self.lengths,
                               cache_starts=self.starts, return_lse=True, **options)

    def alone(self, b):
        """Sequence b without the others, in a table as narrow as its length allows."""
        pages = max(1, -(-int(self.lengths[b]) // self.k.shape[1]))
        return Case(self.q[b:b + 1], self.k, self.v, self.table[b:b + 1, :pages], self.lengths[b:b + 1],
                    None if self.starts is None else self.starts[b:b + 1])


def make(lengths, *, heads=4, kv_heads=2, head_dim=64, page_size=16, dtype="float32", kv_dtype=None, q_len=None,
         starts=None, spare_pages=1):
    lengths = np.int32(lengths)
    batch, columns = len(lengths), -(-int(max(lengths, default=0)) // page_size) + spare_pages
    num_pages = batch * columns + 2
    shape = (batch, heads, head_dim) if q_len is None else (batch, q_len, heads, head_dim)
    k, v = (poison(np.empty((num_pages, page_size, kv_heads, head_dim), dtype_of(kv_dtype or dtype))) for _ in "kv")
    table = np.full((batch, columns), WILD, np.int32)
    ids = rng.permutation(num_pages)
    for b, length in enumerate(lengths):
        first = 0 if starts is None else starts[b]
        for t in range(first, length):
            table[b, t // page_size] = ids[b * columns + t // page_size]
        tokens = np.arange(first, length)
        at = table[b, tokens // page_size], tokens % page_size
        for cache in (k, v):
            cache[at] = rng.standard_normal((len(tokens), kv_heads, head_dim))
    return Case(rng.standard_normal(shape).astype(dtype_of(dtype)), k, v, table, lengths,
                None if starts is None else np.int32(starts))


class Numpy:
    name = "numpy"
    array = staticmethod(np.array)
    numpy = staticmethod(np.array)


def decode(case, xp=Numpy, **options):
    arrays, tables = case.arguments(xp)
    if "sinks" in options:
        options["sinks"] = xp.array(options["sinks"])
    out, lse = cupyattn.paged_decode(*arrays, **tables, return_lse=True, **options)
    return xp.numpy(out), xp.numpy(lse)


def check(case, xp=Numpy, **options):
    out, lse = decode(case, xp, **options)
    want, want_lse = case.expected(**options)
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    assert_close(out, want, *TOLERANCE[case.q.dtype.name])
    assert_close(lse, want_lse, 2e-6, 1e-6)


@pytest.fixture(params=["cores", "mma"])
def version(request, monkeypatch):
    """Both versions of the kernel, whichever the plan would choose."""
    monkeypatch.setattr(attention_plans, "version", lambda facts: (request.param, "chosen by the test"))
    return request.param


# ---- values ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, kv_dtype", [("float16", None), ("bfloat16", None), ("float32", None),
                                             ("float32", "float16"), ("float16", "bfloat16")])
def test_ragged_batch(xp, dtype, kv_dtype):
    check(make([37, 0, 1, 128, 1100], heads=6, dtype=dtype, kv_dtype=kv_dtype), xp)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (9, 3), (7, 1), (10, 2), (5, 5), (32, 2)])
def test_head_groups(heads, kv_heads):
    check(make([50, 33], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 40, 72, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    check(make([70, 31], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 7, 16, 100])
def test_page_sizes(page_size):
    check(make([101, 30], page_size=page_size))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 2049])
def test_lengths_around_tiles_and_chunks(length):
    check(make([length], heads=2, kv_heads=1, head_dim=16))


@pytest.mark.parametrize("q_len", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_several_new_tokens(xp, q_len, dtype):
    """Causal among the new tokens, also when fewer tokens are visible than queries ask."""
    check(make([40, 1030, 3, 0], heads=6, q_len=q_len, dtype=dtype), xp)


OPTIONS = {"window": {"window_size": 33}, "window 1": {"window_size": 1}, "softcap": {"softcap": 2.0},
           "sinks": {"sinks": np.float32([0.5, -3, 8, -np.inf])}, "scale": {"softmax_scale": 0.5},
           "all": {"window_size": 50, "softcap": 1.5, "sinks": np.float32([1, 2, 3, 4]), "softmax_scale": 0.3}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_options(xp, options, dtype):
    check(make([45, 1060, 20], q_len=3, dtype=dtype), xp, **options)


def test_wide_softcap():
    """Caps far above the scores change no digit that float32 has: tanh is exact near zero."""
    for softcap in (50.0, 1000.0):
        check(make([6] * 40), softcap=softcap)


def test_starts():
    check(make([45, 1060, 20], starts=[3, 1030, 20]))
    check(make([45, 1060, 20], starts=[3, 1030, 20], q_len=4), window_size=9)


def test_huge_scores():
    """Scores near 1e5 stay finite: a one-hot softmax, not NaN."""
    case = make([50, 1500])
    case.q *= 1e4
    check(case)


def test_pages_outside_the_window_may_be_gone():
    case = make([400, 1300], q_len=2)
    case.table[:, :10] = WILD
    case.table[1, :60] = -1
    check(case, window_size=100)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 200, 256])
def test_tensor_cores_head_dims(version, head_dim, dtype):
    check(make([70, 31, 0, 1], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 1023, 1025])
def test_tensor_cores_lengths(version, length):
    check(make([length, 16], heads=2, kv_heads=1, head_dim=16, dtype="float16", page_size=5))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (9, 3), (17, 1), (40, 1)])
@pytest.mark.parametrize("q_len", [1, 3, 8])
def test_tensor_cores_row_tiles(version, heads, kv_heads, q_len):
    check(make([50, 33, 2], heads=heads, kv_heads=kv_heads, q_len=q_len, dtype="float16"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tensor_cores_options(version, options):
    check(make([45, 1060, 20], q_len=3, dtype="float16", starts=[2, 1000, 0]), **options)


def test_tensor_cores_huge_scores(version):
    case = make([50, 1200], dtype="bfloat16")
    case.q = (case.q.astype(np.float32) * 1e4).astype(case.q.dtype)
    check(case)


# ---- layouts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_views(xp, dtype):
    """Head-major pools, K and V interleaved, offset and strided queries, tables, lengths and outputs."""
    case = make([37, 70], dtype=dtype, q_len=2)
    want, want_lse = case.expected()
    pages, page_size, kv_heads, head_dim = case.k.shape
    both = poison(np.empty((pages, kv_heads, page_size + 1, 2, head_dim), case.k.dtype))
    both[:, :, 1:, 0] = case.k.transpose(0, 2, 1, 3)
    both[:, :, 1:, 1] = case.v.transpose(0, 2, 1, 3)
    pool = xp.array(both)
    k, v = pool[:, :, 1:, 0].transpose(0, 2, 1, 3), pool[:, :, 1:, 1].transpose(0, 2, 1, 3)
    fused = xp.array(np.concatenate([poison(np.empty_like(case.q)), case.q], axis=2))
    table = xp.array(np.repeat(case.table, 2, axis=0))[::2]
    lengths = xp.array(np.repeat(case.lengths, 3))[::3]
    place = xp.array(poison(np.empty((2, 4, 4, head_dim + 8), case.q.dtype)))
    out = place[:, ::2, :, 3:head_dim + 3]   # not on a 16-byte boundary
    lse = xp.array(poison(np.empty((2, 2, 4), np.float32)))
    got = cupyattn.paged_decode(fused[:, :, 4:], k, v, block_table=table, cache_seqlens=lengths, out=(out, lse),
                                return_lse=True)
    assert got[0] is out and got[1] is lse
    host = xp.numpy(place)
    assert_close(host[:, ::2, :, 3:head_dim + 3], want, *TOLERANCE[dtype])
    assert_close(xp.numpy(lse), want_lse, 2e-6, 1e-6)
    assert np.isnan(host[:, 1::2].astype(np.float32)).all()
    assert np.isnan(host[..., :3].astype(np.float32)).all()


def test_out_may_be_q():
    case = make([30, 1100])
    want = decode(case)[0]
    cupyattn.paged_decode(case.q, case.k, case.v, block_table=case.table, cache_seqlens=case.lengths, out=case.q)
    assert_same_bits(case.q, want)


def test_shared_and_permuted_pages():
    """The same tokens through other pages, also pages shared by all sequences: the same bits."""
    case = make([80, 80])
    case.table[1] = case.table[0]
    case.q[1] = case.q[0]
    out, _ = decode(case)
    assert_same_bits(out[0], out[1])
    order = rng.permutation(len(case.k))
    moved = Case(case.q, case.k[np.argsort(order)], case.v[np.argsort(order)],
                 np.where(case.table == WILD, WILD, order[np.minimum(case.table, len(order) - 1)]).astype(np.int32),
                 case.lengths)
    assert_same_bits(decode(moved)[0], out)


def test_offsets_beyond_two_to_the_31():
    """A cache of 6 GiB address space in which a few pages exist."""
    page_size, kv_heads, head_dim = 16, 2, 64
    stride = 2**31 // 8 + 64                       # elements between pages; page 12 starts beyond 2^31 elements
    pages = 13
    memory = mmap.mmap(-1, pages * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = np.frombuffer(memory, np.float16)
    cache = np.lib.stride_tricks.as_strided(flat, (pages, page_size, kv_heads, head_dim),
                                            (stride * 2, kv_heads * head_dim * 2, head_dim * 2, 2))
    case = make([40], dtype="float16")
    small = case.alone(0)
    far = Case(small.q, cache, cache, np.int32([[12, 0, 11]]), small.lengths)
    near_k = np.zeros((3, page_size, kv_heads, head_dim), np.float16)
    for i, page in enumerate(far.table[0]):
        near_k[i] = rng.standard_normal(near_k[i].shape)
        cache[page] = near_k[i]
    near = Case(small.q, near_k, near_k, np.int32([[0, 1, 2]]), small.lengths)
    got = cupyattn.paged_decode(far.q, cache, cache, block_table=far.table, cache_seqlens=far.lengths)
    assert_same_bits(got, decode(near)[0])


# ---- independence ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("q_len", [None, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sequence_does_not_see_its_batch(xp, dtype, q_len):
    """Invariant: bit for bit the result it gets alone, whether it has one chunk or several."""
    case = make([20, 1500, 0, 1024, 300], heads=6, q_len=q_len, dtype=dtype)
    sinks = np.float32([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    out, lse = decode(case, xp, sinks=sinks, invariant=True)
    for b in range(len(case.lengths)):
        one, one_lse = decode(case.alone(b), xp, sinks=sinks, invariant=True)
        assert_same_bits(out[b:b + 1], one)
        assert_same_bits(lse[b:b + 1], one_lse)


def test_tensor_cores_do_not_see_the_batch(version):
    case = make([20, 1100, 0, 300], heads=6, q_len=2, dtype="float16")
    out, lse = decode(case, invariant=True)
    for b in range(len(case.lengths)):
        one, one_lse = decode(case.alone(b), invariant=True)
        assert_same_bits(out[b:b + 1], one)
        assert_same_bits(lse[b:b + 1], one_lse)


def test_unused_slots_never_matter(version):
    """NaN, infinity or zero in slots and table entries past the length: the same bits."""
    case = make([20, 1500], dtype="float16")
    want = decode(case)
    for filling, entry in ((np.inf, 0), (0.0, -1)):
        case.k[np.isnan(case.k)] = filling
        case.v[np.isnan(case.v)] = filling
        case.table[case.table == WILD] = entry
        for a, b in zip(decode(case), want, strict=True):
            assert_same_bits(a, b)


def test_empty_batch(xp):
    case = make([])
    out, lse = decode(case, xp)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


# ---- faults ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [None, [1]], ids=["None", "list"])
@pytest.mark.parametrize("op, name", [
    *(("paged_decode", name) for name in ("q", "k", "v", "cache_seqlens", "block_table", "partials")),
    *(("attention", name) for name in ("q", "k", "v", "cu_seqlens_q", "partials"))])
def test_what_is_no_array(op, name, value):
    """A TypeError names it."""
    case = make([20])
    given = {"q": case.q, "k": case.k, "v": case.v, "cache_seqlens": case.lengths, "block_table": case.table}
    if op == "attention":
        given["cu_seqlens_q"] = np.int32([0, 1])
    if name == "partials":
        given |= {name: (value, value), "num_splits": 2}
    else:
        given[name] = value
    name = {"k": "k(_cache)?", "v": "v(_cache)?", "partials": r"partials\.out"}.get(name, name)
    arrays = [given.pop(array) for array in "qkv"]
    with pytest.raises(TypeError, match=f"^{op}: {name} must be a NumPy or CuPy array, got (NoneType|list)$"):
        getattr(cupyattn, op)(*arrays, **given)


def test_unknown_pages_are_invisible(xp):
    """On NumPy an error that names the entry; on a device the page's tokens are left out."""
    case = make([60, 1100])
    case.table[0, 1], case.table[1, 40] = -5, len(case.k)
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=r"page ids from 0 to \d+, got -5 at page 1 of sequence 0"):
            decode(case, xp)
    else:
        check(case, xp)


def test_lengths_past_the_table(xp):
    case = make([60, 20], spare_pages=0)
    case.lengths[0] = 100
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=r"cache_seqlens must be from 0 to 64 \(max_pages \* page_size\)"):
            decode(case, xp)
    else:
        case.v[np.isnan(case.v)] = 0   # the table's last page is full of tokens now
        case.k[np.isnan(case.k)] = 0
        check(case, xp)


def test_errors():
    case = make([30])
    (q, k, v), tables = case.arguments(Numpy)

    def refused(error, match, *arrays, **changes):
        with pytest.raises(error, match=match):
            cupyattn.paged_decode(*arrays, **{**tables, **changes})

    refused(ValueError, r"head_dim that is a multiple of 8 up to 256, got 60", q[..., :60], k, v)
    refused(ValueError, r"q must be .* with q_len from 1 to 8, got \[1, 9, 4, 64\]", q[:, None].repeat(9, 1), k, v)
    refused(ValueError, "num_kv_heads that divides the 3 heads", q[:, :3], k, v)
    refused(ValueError, "v_cache must have the pages, page_size and num_kv_heads of k_cache", q, k, v[1:])
    refused(TypeError, "v_cache must be float32 like k_cache, got float16", q, k, v.astype(np.float16))
    refused(TypeError, "q must be float16 or bfloat16 or float32, got float64", q.astype(np.float64), k, v)
    refused(TypeError, "block_table must be int32, got int64", q, k, v, block_table=case.table.astype(np.int64))
    refused(ValueError, r"cache_seqlens must be \[batch\] = \[1\]", q, k, v, cache_seqlens=np.int32([1, 2]))
    refused(ValueError, "cache_starts must be ≥ 0, got -1", q, k, v, cache_starts=np.int32([-1]))
    refused(ValueError, "k_cache must have a contiguous last axis", q, k.swapaxes(0, 3).copy().swapaxes(0, 3), v)
    refused(TypeError, r"out must be the pair \(out, lse\)", q, k, v, out=np.empty_like(q), return_lse=True)
    refused(TypeError, "out must be float32, got float16", q, k, v, out=np.empty(q.shape, np.float16))


@pytest.mark.parametrize("error, options, rule", [
    (ValueError, {"softcap": np.nan}, "softcap must be a finite float32 of at least 0, got nan"),
    (ValueError, {"softcap": np.inf}, "softcap must be a finite float32 of at least 0, got inf"),
    (ValueError, {"softcap": -1}, "softcap must be a finite float32 of at least 0, got -1"),
    (ValueError, {"softmax_scale": np.nan}, "softmax_scale must be a finite float32, got nan"),
    (ValueError, {"softmax_scale": -np.inf}, "softmax_scale must be a finite float32, got -inf"),
    (ValueError, {"softmax_scale": 10**400}, "softmax_scale must be a finite float32, got 1000"),
    (ValueError, {"window_size": -1}, "window_size must be an int32 of at least 0, got -1"),
    (ValueError, {"window_size": 2**31}, "window_size must be an int32 of at least 0, got 2147483648"),
    (TypeError, {"window_size": 2.5}, "window_size must be an integer, got float"),
    (TypeError, {"window_size": True}, "window_size must be an integer, got bool"),
    (TypeError, {"softcap": None}, "softcap must be a number, got NoneType"),
    (TypeError, {"softmax_scale": "a"}, "softmax_scale must be a number, got str")])
def test_options_that_are_refused(error, options, rule):
    with pytest.raises(error, match=f"paged_decode: {rule}"):
        decode(make([30]), **options)


def test_numpy_scalars_are_options():
    case = make([30])
    assert_same_bits(decode(case, window_size=np.int8(9), softcap=np.float16(2), softmax_scale=np.float32(-0.5))[0],
                     decode(case, window_size=9, softcap=2, softmax_scale=-0.5)[0])


# ---- against onnxruntime, on random shapes, under the checker --------------------------------------------

def onnx_attention(q, k, v, lengths, window=0, softcap=0.0, sinks=None, rotary=None):
    """GroupQueryAttention of onnxruntime's CPU provider; q [batch, q_len, H, D], k and v [batch, tokens, Hk, D].

    rotary = (cos, sin, style) rotates q and the newest keys first.
    """
    import onnxruntime
    from onnx import helper

    batch, q_len, heads, head_dim = q.shape
    cos, sin, style = rotary or (None, None, None)
    new = lengths[:, None] - q_len + np.arange(q_len)   # positions of the new tokens
    rows = np.arange(batch)[:, None]
    feeds = {"query": q.reshape(batch, q_len, -1), "key": k[rows, new].reshape(batch, q_len, -1),
             "value": v[rows, new].reshape(batch, q_len, -1), "past_key": k.transpose(0, 2, 1, 3),
             "past_value": v.transpose(0, 2, 1, 3), "seqlens_k": lengths - 1,
             "total": np.int32([lengths.max()]), "cos": cos, "sin": sin, "positions": None, "bias": None,
             "head_sink": None if sinks is None else sinks.astype(q.dtype)}
    names = ["" if a is None else name for name, a in feeds.items()]
    feeds = {name: np.ascontiguousarray(a) for name, a in feeds.items() if a is not None}
    node = helper.make_node("GroupQueryAttention", names, ["out", "present_key", "present_value"],
                            domain="com.microsoft", num_heads=heads, kv_num_heads=k.shape[2], softcap=softcap,
                            local_window_size=window or -1, do_rotary=int(rotary is not None),
                            rotary_interleaved=int(style == "interleaved"))
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for name, a in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(q.dtype), None)
               for name in ("out", "present_key", "present_value")]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, outputs), ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], feeds)[0].reshape(q.shape)


def onnx_operands(case):
    """q, k and v of a case in the form of onnx_attention; bfloat16, which its CPU provider lacks, as float32."""
    k, v = (np.zeros((len(case.lengths), max(case.lengths), *pool.shape[2:]), pool.dtype) for pool in (case.k, case.v))
    page_size = case.k.shape[1]
    for b, length in enumerate(case.lengths):
        t = np.arange(length)
        k[b, :length] = case.k[case.table[b, t // page_size], t % page_size]
        v[b, :length] = case.v[case.table[b, t // page_size], t % page_size]
    return [a.astype(np.float32) if a.dtype == dtype_of("bfloat16") else a for a in (case.q, k, v)]


ON_BOTH = pytest.mark.parametrize("kernel, dtype", [("cores", "float32"), ("cores", "float16"), ("mma", "float16"),
                                                    ("cores", "bfloat16"), ("mma", "bfloat16")])


@ON_BOTH
@pytest.mark.parametrize("lengths, q_len", [([37, 1, 128, 300], 1), ([200], 5)])
@pytest.mark.parametrize("window, softcap, sinks", [(0, 0.0, None), (33, 0.0, None), (0, 2.0, None),
                                                    (0, 0.0, [1.0, -2.0, 3.0, 0.5]), (20, 5.0, None)])
def test_onnxruntime(kernel, dtype, lengths, q_len, window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(attention_plans, "version", lambda facts: (kernel, "chosen by the test"))
    case = make(lengths, q_len=q_len, page_size=8, dtype=dtype)
    options = {} if sinks is None else {"sinks": np.float32(sinks)}
    want = onnx_attention(*onnx_operands(case), case.lengths, window, softcap, **options)
    assert_close(decode(case, window_size=window, softcap=softcap, **options)[0], want, *TOLERANCE[dtype])


@ON_BOTH
@pytest.mark.parametrize("lengths, q_len", [([37, 1, 128], 1), ([200], 5)])
@pytest.mark.parametrize("style", ["neox", "interleaved"])
def test_onnxruntime_with_rope(kernel, dtype, lengths, q_len, style, monkeypatch):
    """rope of the queries and the newest keys, kv_append and paged_decode are one GroupQueryAttention."""
    monkeypatch.setattr(attention_plans, "version", lambda facts: (kernel, "chosen by the test"))
    case = make(lengths, q_len=q_len, page_size=8, dtype=dtype)
    table = np.float32 if dtype == "bfloat16" else case.q.dtype
    cos, sin = (a.astype(table) for a in cupyattn.RopeParams(rotary_dim=64).tables(256))
    q, k, v = onnx_operands(case)
    want = onnx_attention(q, k, v, case.lengths, rotary=(cos, sin, style))
    positions = (case.lengths[:, None] - q_len + np.arange(q_len, dtype=np.int32)).reshape(-1)
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), q_len)
    new_k, new_v = (a[rows, positions].astype(case.k.dtype) for a in (k, v))
    turn = {"cos": cos, "sin": sin, "positions": positions, "style": style}
    cupyattn.kv_append(cupyattn.rope(new_k, **turn), new_v, case.k, case.v, block_table=case.table,
                       positions=positions, batch_indices=rows)
    case.q = cupyattn.rope(case.q.reshape(-1, 4, 64), **turn).reshape(case.q.shape)
    assert_close(decode(case)[0], want, *TOLERANCE[dtype])


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(kernel=st.sampled_from(["cores", "mma"]), lengths=st.lists(st.integers(0, 200), max_size=3),
       group=st.integers(1, 9), kv_heads=st.integers(1, 3), head_dim=st.integers(1, 16), page_size=st.integers(1, 20),
       q_len=st.integers(1, 8), window=st.integers(0, 60))
def test_shapes(kernel, lengths, group, kv_heads, head_dim, page_size, q_len, window):
    case = make(lengths, heads=group * kv_heads, kv_heads=kv_heads, head_dim=8 * head_dim, page_size=page_size,
                q_len=q_len, dtype="float32" if kernel == "cores" else "float16")
    with mock.patch.object(attention_plans, "version", lambda facts: (kernel, "chosen by the test")):
        check(case, window_size=window)


@pytest.mark.parametrize("kernel, head_dim, dtype", [("mma", 40, "float16"), ("mma", 64, "bfloat16"),
                                                     ("cores", 64, "float16"), ("cores", 40, "float32")])
def test_paged_decode_checked(xp, kernel, head_dim, dtype, monkeypatch):
    """The checker finds nothing, and every order of threads gives the same bits."""
    monkeypatch.setattr(attention_plans, "version", lambda facts: (kernel, "chosen by the test"))
    case = make([45, 0, 1060], heads=6, head_dim=head_dim, dtype=dtype, q_len=2)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(decode(case, xp, window_size=150, sinks=np.zeros(6, np.float32)))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("head_dim, dtype", [(128, "float16"), (200, "float16"), (256, "bfloat16")])
def test_tensor_cores_checked(head_dim, dtype, monkeypatch):
    """The deeper rings of the larger head_dims, over two chunks."""
    monkeypatch.setattr(attention_plans, "version", lambda facts: ("mma", "chosen by the test"))
    case = make([300, 1030], heads=3, kv_heads=1, head_dim=head_dim, dtype=dtype, q_len=2)
    results = []
    for schedule in ("forward", "random"):
        with settings(check=True, schedule=schedule):
            results.append(decode(case))
    assert_close(results[0][0], case.expected()[0], *TOLERANCE[dtype])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# ---- plans -----------------------------------------------------------------------------------------------

def plan(arch="cpu", q="float16", k="KvPlain<__half>", v=None, align=16, q_len=1, heads=32, kv_heads=8, head_dim=128,
         head_dim_v=None, bias=False):
    facts = attention_plans.Facts(q, k, v or k, align, kv_heads, heads // kv_heads, head_dim, head_dim_v or head_dim,
                                  bias, arch)
    tiles = attention_plans.tiling(facts, q_len * facts.heads_per_kv, 132)
    return attention_plans.plan_decode(facts, tiles.decode_rows, tiles.decode_workers)


def test_plan_says_why():
    assert plan("sm_90a").spec.kernel == "paged_decode_mma" and plan("sm_90a").note.startswith("tensor cores")
    for changes, reason in (({"arch": "cpu"}, "an mma costs the executor more than it saves"),
                            ({"arch": "sm_75"}, "sm_75 has no cp.async"), ({"align": 4}, "alignment 4"),
                            ({"k": "KvPlain<__nv_bfloat16>"}, "q float16, k KvPlain<__nv_bfloat16>"),
                            ({"q": "float32"}, "q float32")):
        got = plan(**{"arch": "sm_120a", **changes})
        assert got.spec.kernel == "paged_decode" and reason in got.note
    assert plan("sm_90a").grid == (264, 1, 1) and plan().grid == (16, 1, 1)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_shared_memory_fits(head_dim):
    """CUDA cores: what every block has without opting in. Tensor cores: what every GPU from sm_80 on can give."""
    tags = [kind.tag.format("__half") for kind in FORMATS.values() if head_dim % kind.multiple == 0]
    for k in ("KvPlain<__half>", "KvPlain<float>", *tags):
        for q_len in (1, 2):
            assert plan("sm_75", k=k, q_len=q_len, head_dim=head_dim, bias=True).shared_bytes <= 48 * 1024
        if k != "KvPlain<float>":
            assert plan("sm_120a", k=k, head_dim=head_dim).shared_bytes <= 99 * 1024


@pytest.mark.parametrize("start", [2**31 - 1, 2**31 - 40, 10_000])
def test_starts_far_past_the_end(version, start):
    case = make([2, 100], dtype="float16", head_dim=64)
    case.starts = np.int32([start, 3])
    out, lse = decode(case)
    assert not out[0].any() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all()


def test_workspace_of_the_caller(xp):
    case = make([1500, 7], dtype="float16")
    arrays, tables = case.arguments(xp)
    want = xp.numpy(cupyattn.paged_decode(*arrays, **tables))
    scratch = xp.array(np.full(2**20, 0x7F, np.uint8))
    got = cupyattn.paged_decode(*arrays, **tables, workspace=scratch)
    assert_same_bits(xp.numpy(got), want)
    assert (xp.numpy(scratch) != 0x7F).any()
    with pytest.raises(ValueError, match=r"workspace must be \[nbytes\] with at least \d+ bytes, got \[8\]"):
        cupyattn.paged_decode(*arrays, **tables, workspace=scratch[:8])
    with pytest.raises(TypeError, match="paged_decode: workspace must be uint8, got float16"):
        cupyattn.paged_decode(*arrays, **tables, workspace=arrays[0].reshape(-1))


def test_a_schedule_for_another_head_dim_of_values_is_refused():
    """Tensor cores pad both head dims to the larger one; of the tiles of 128 rows for 128 dims none is for 256."""
    facts = attention_plans.Facts("float16", "KvPlain<__half>", "KvPlain<__half>", 16, 2, 4, 128, 256, False, "sm_90a")
    assert attention_plans.legal_rows(facts)[:2] == ((16,), (64,))
    assert attention_plans.legal_rows(facts._replace(head_dim_v=128))[:2] == ((16,), (64, 128))
    for head_dim_v, rows in ((None, 128), (256, 64)):
        tiles = attention_plans.tiling(facts._replace(head_dim_v=head_dim_v or 128), 1000, 132)
        assert tiles.prefill_rows == rows
