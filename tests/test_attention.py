# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, dtype_of, poison
from conftest import NumpyArrays

import cupyattn
from cupyattn.kv.quantized import FORMATS, BlockKV, QuantizedKV
from cupyattn.reference import kv_codec
from cupyattn.reference.attention import attention as expected_attention
from cupyattn.runtime.cpu import counters, settings

TOLERANCE = {"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0.0)}
WILD = 2_147_480_000   # an id that would lead far out of any cache
NUMPY = NumpyArrays()
rng = np.random.default_rng(23)


# ---- inputs ----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A ragged batch over a paged cache; slots without a token are NaN, table entries without a page wild."""

    q: np.ndarray          # [tokens, heads, head_dim]
    k: np.ndarray          # [pages, page_size, kv_heads, head_dim]
    v: np.ndarray
    table: np.ndarray
    q_lens: np.ndarray
    lengths: np.ndarray

    @property
    def cu(self):
        return offsets(self.q_lens)

    def tokens(self, b):
        """(pages, slots) of the tokens of sequence b."""
        t = np.arange(self.lengths[b])
        return self.table[b, t // self.k.shape[1]], t % self.k.shape[1]

    def flat(self, cache):
        """The tokens of all sequences one after the other, [tokens_k, kv_heads, dim]."""
        return np.concatenate([cache[self.tokens(b)] for b in range(len(self.lengths))])

    def keys(self, xp, form):
        """k, v and the arguments that say where they are, in one of FORMS."""
        if form == "ragged":
            return xp.array(self.flat(self.k)), xp.array(self.flat(self.v)), {
                "cu_seqlens_k": xp.array(offsets(self.lengths))}
        page_size = self.k.shape[1]
        columns = -(-self.lengths // page_size)
        pages = np.concatenate([self.table[b, :n] for b, n in enumerate(columns)]).astype(np.int32)
        if form == "csr":
            k, v = xp.array(self.k), xp.array(self.v)
            table = cupyattn.PageTable.csr(xp.array(pages), xp.array(offsets(columns)))
        elif form == "pointers":
            k, v, blocks = self.blocks(xp)
            table = cupyattn.PageTable.pointers(xp.array(address(blocks) + pages.astype(np.uint64) * blocks.shape[1]),
                                                xp.array(offsets(columns)), buffers=(blocks,))
        else:
            k, v, table = xp.array(self.k), xp.array(self.v), xp.array(self.table)
            if form == "head-major":
                k, v = (xp.array(np.ascontiguousarray(a.transpose(0, 2, 1, 3))).transpose(0, 2, 1, 3)
                        for a in (self.k, self.v))
        return k, v, {"block_table": table, "cache_seqlens": xp.array(self.lengths)}

    def blocks(self, xp):
        """The pages as memory blocks: 32 bytes of something else, then K, then V, head by head."""
        pages, page_size, kv_heads, _ = self.k.shape
        parts = [np.full((pages, 32), 0x7F, np.uint8)]
        parts += [np.ascontiguousarray(a.transpose(0, 2, 1, 3)).reshape(pages, -1).view(np.uint8)
                  for a in (self.k, self.v)]
        at = 32
        sides = []
        for part, a in zip(parts[1:], (self.k, self.v), strict=True):
            dim = a.shape[3]
            sides.append(BlockKV(a.dtype.name, page_size, kv_heads, dim, offset=at, stride_token=dim,
                                 stride_head=page_size * dim))
            at += part.shape[1]
        return (*sides, xp.array(np.concatenate(parts, axis=1)))

    def alone(self, b):
        """Sequence b without the others."""
        rows = slice(self.cu[b], self.cu[b + 1])
        return replace(self, q=self.q[rows], table=self.table[b:b + 1], q_lens=self.q_lens[b:b + 1],
                       lengths=self.lengths[b:b + 1])

    def expected(self, **options):
        return expected_attention(self.q, self.k, self.v, cu_seqlens_q=self.cu, block_table=self.table,
                                  cache_seqlens=self.lengths, return_lse=True, **options)


FORMS = ("dense", "head-major", "csr", "pointers", "ragged")


def offsets(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def address(array):
    return np.uint64(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def make(lengths, q_lens, *, heads=4, kv_heads=2, head_dim=64, head_dim_v=None, page_size=16, dtype="float32",
         kv_dtype=None, unread=()):
    """`unread`: a number of tokens at the start of each sequence that nobody may read."""
    lengths, q_lens = np.int32(lengths), np.int32(q_lens)
    batch, columns = len(lengths), -(-int(max(lengths, default=0)) // page_size) + 1
    used = -(-lengths // page_size)
    num_pages = int(used.sum()) + 2
    ids = rng.permutation(num_pages).astype(np.int32)
    table = np.full((batch, columns), WILD, np.int32)
    k, v = (poison(np.empty((num_pages, page_size, kv_heads, dim), dtype_of(kv_dtype or dtype)))
            for dim in (head_dim, head_dim_v or head_dim))
    case = Case(rng.standard_normal((int(q_lens.sum()), heads, head_dim)).astype(dtype_of(dtype)), k, v, table, q_lens,
                lengths)
    for b in range(batch):
        first = unread[b] if len(unread) else 0
        start = int(used[:b].sum())
        table[b, first // page_size:used[b]] = ids[start + first // page_size:start + used[b]]
        pages, slots = (a[first:] for a in case.tokens(b))
        for cache in (k, v):
            cache[pages, slots] = rng.standard_normal((len(pages), *cache.shape[2:]))
    return case


def attend(case, xp=NUMPY, form="dense", **options):
    k, v, where = case.keys(xp, form)
    options = {name: xp.array(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
    out, lse = cupyattn.attention(xp.array(case.q), k, v, cu_seqlens_q=xp.array(case.cu), return_lse=True, **where,
                                  **options)
    return xp.numpy(out), xp.numpy(lse)


def check(case, xp=NUMPY, form="dense", how=None, rounded_probs=False, **options):
    """The op within its bounds of float64; `how` are options that do not change the meaning.

    `rounded_probs`: tensor cores take each probability rounded to the activations' type, off by 2^-8 (bfloat16) or
    2^-11 of itself. Before the result is rounded that alone may come to this share of sum(p * |v|), which of two or
    three keys is now and then so much more than 1 that `atol` does not hold.
    """
    out, lse = attend(case, xp, form, **options, **(how or {}))
    atol, rtol = TOLERANCE[case.q.dtype.name]
    if rounded_probs:
        case = replace(case, v=np.concatenate([case.v, np.abs(case.v)], axis=-1))
    want, want_lse = case.expected(**options)
    if rounded_probs:
        want, sizes = np.split(want, 2, axis=-1)
        atol = np.maximum(atol, rtol * sizes)
    assert out.dtype == case.q.dtype and lse.dtype == np.float32
    assert_close(out, want, atol, rtol)
    assert_close(lse, want_lse, 2e-6, 1e-6)


def assert_all_same(results):
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


# ---- shapes ----------------------------------------------------------------------------------------------

LENGTHS = {"page": lambda ps: (0, 1, ps - 1, ps, ps + 1), "tile": lambda ps: (15, 16, 17, 63, 64, 65),
           "two tiles": lambda ps: (127, 128, 129), "1000": lambda ps: (1000, 7), "4097": lambda ps: (4097,)}
AXES = {"lengths": tuple(LENGTHS), "group": (1, 2, 3, 4, 5, 6, 7, 8, 12, 16),
        "head_dim": (32, 64, 72, 80, 96, 112, 128, 192, 256), "head_dim_v": ("same", 8, 64, 200),
        "page_size": (1, 2, 7, 8, 16, 32, 48, 64, 128, 256), "form": FORMS, "causal": (True, False),
        "dtype": ("float32", "float16", "bfloat16")}


@functools.cache
def covering():
    """Cases in which every pair of values of two axes occurs, picked greedily."""
    pick = np.random.default_rng(5)
    names = tuple(AXES)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in AXES[a] for y in AXES[b]}
    cases = []
    while missing:
        (a, x), (b, y) = min(missing, key=repr)
        best, covered = None, set()
        for _ in range(20):
            case = {name: AXES[name][pick.integers(len(AXES[name]))] for name in names} | {a: x, b: y}
            found = {pair for pair in itertools.combinations(case.items(), 2) if pair in missing}
            if len(found) > len(covered):
                best, covered = case, found
        cases.append(best)
        missing -= covered
    return cases


def check_shape(lengths, group, head_dim, head_dim_v, page_size, form, causal, dtype):
    lengths = [n for n in LENGTHS[lengths](page_size) if n >= 0]
    q_lens = [(min(n, 130), 1, min(n, 3))[i % 3] for i, n in enumerate(lengths)]
    kv_heads = 2 if group < 4 else 1
    case = make(lengths, q_lens, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
                head_dim_v=head_dim if head_dim_v == "same" else head_dim_v, page_size=page_size, dtype=dtype)
    # 16-bit queries through one kernel only: the others differ in nothing but rows per tile, and compile for seconds
    check(case, form=form, causal=causal, how={"invariant": dtype != "float32"})


@pytest.mark.parametrize("part", range(4))
def test_shapes(part):
    """Every pair of the lengths, groups, dims, page sizes, forms and dtypes."""
    for values in covering()[part::4]:
        check_shape(**values)


@pytest.mark.full
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_all_shapes(dtype, form, head_dim):
    """A twelfth of the lengths, groups and page sizes for each dtype, form and head dim; together all of them."""
    cell = AXES["dtype"].index(dtype) + 3 * list(FORMS).index(form) + 5 * AXES["head_dim"].index(head_dim)
    every = list(itertools.product(LENGTHS, AXES["group"], AXES["page_size"]))
    for lengths, group, page_size in every[cell % 12::12]:
        if lengths != "4097" or group % 4 == 0:
            check_shape(lengths, group, head_dim, "same", page_size, form, True, dtype)


@pytest.mark.parametrize("dtype, kv_dtype", [("float16", None), ("float32", None), ("float32", "float16")])
def test_mixed_batch(xp, dtype, kv_dtype):
    """Decode, speculation, whole prompts, chunks and nothing in one call."""
    check(make([300, 70, 70, 1100, 0, 9, 3], [1, 4, 70, 33, 0, 0, 9], heads=6, dtype=dtype, kv_dtype=kv_dtype), xp)


def test_forms_agree():
    """However keys are found: the same bits."""
    case = make([80, 1, 200], [7, 1, 100])
    assert_all_same([attend(case, form=form) for form in FORMS])


def test_permuted_pages():
    case = make([300, 41], [100, 41])
    order = rng.permutation(len(case.k)).astype(np.int32)
    moved = replace(case, k=case.k[np.argsort(order)], v=case.v[np.argsort(order)],
                    table=np.where(case.table == WILD, WILD, order[np.minimum(case.table, len(order) - 1)]))
    assert_all_same([attend(case), attend(moved)])


def test_block_diagonal():
    """Independent segments of one buffer see nothing of each other."""
    case = make([30, 1, 65], [30, 1, 65])
    k, v, where = case.keys(NUMPY, "ragged")
    whole = cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, causal=False, invariant=True, **where)
    for b in range(3):
        rows = slice(case.cu[b], case.cu[b + 1])
        each = np.int32([0, case.q_lens[b]])
        assert_same_bits(whole[rows], cupyattn.attention(case.q[rows], k[rows], v[rows], cu_seqlens_q=each,
                                                         cu_seqlens_k=each, causal=False, invariant=True))


# ---- options ---------------------------------------------------------------------------------------------

SINKS = np.float32([0.5, -3, 8, -np.inf])
SLOPES = np.float32([0.5, 0.25, 0.0, 2.0])
OPTIONS = {"window": {"window_size": 33}, "window 1": {"window_size": 1}, "softcap": {"softcap": 2.0},
           "sinks": {"sinks": SINKS}, "scale": {"softmax_scale": 0.2}, "not causal": {"causal": False},
           "window both ways": {"causal": False, "window_size": 20}, "ALiBi": {"alibi_slopes": SLOPES},
           "all": {"window_size": 50, "softcap": 1.5, "sinks": SINKS, "softmax_scale": 0.3, "alibi_slopes": SLOPES}}


def several(dtype="float32"):
    return make([45, 1060, 20, 0, 130], [3, 17, 20, 2, 1], dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    check(several(), **options)


def test_wide_softcap():
    """Caps far above the scores change no digit that float32 has: tanh is exact near zero."""
    for softcap in (50.0, 1000.0):
        check(make([6] * 20, [6] * 20), softcap=softcap)


def test_options_elsewhere(xp):
    check(several("float16"), xp, **OPTIONS["all"])


def test_starts_and_finished():
    unread = [3, 1030, 20, 0, 64]
    case = make([45, 1060, 20, 0, 130], [3, 17, 20, 2, 1], unread=unread)
    check(case, cache_starts=np.int32(unread))
    check(case, cache_starts=np.int32(unread), window_size=9)
    finished = np.array([False, False, True, False, True])
    out, lse = attend(case, cache_starts=np.int32(unread), finished=finished)
    assert (out[20:40] == 0).all() and (lse[20:40] == -np.inf).all()
    check(case, cache_starts=np.int32(unread), finished=finished)


def test_more_queries_than_keys():
    check(make([3, 0, 20], [9, 70, 21]))
    check(make([3, 0, 20], [9, 70, 21]), causal=False)


def test_huge_scores():
    """Scores near 1e5 stay finite: a one-hot softmax but for near ties, not NaN."""
    case = make([50, 1100], [50, 9])
    case.q *= 1e4
    out, lse = attend(case)
    want, want_lse = case.expected()
    assert_close(out, want, 5e-2, 0)
    assert_close(lse, want_lse, 2e-2, 1e-6)


MASK_SHAPES = {"all": (5, 4, 20, 1060), "short": (5, 4, 20, 40), "keys": (40,), "one head": (5, 1, 20, 100),
               "one query": (5, 4, 1, 1060), "one sequence": (1, 4, 20, 33)}


@pytest.mark.parametrize("shape", MASK_SHAPES.values(), ids=MASK_SHAPES)
@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_mask(kind, shape):
    mask = rng.random(shape) < 0.7 if kind == "bool" else rng.standard_normal(shape).astype(np.float32)
    check(several(), mask=mask)
    if kind == "float32":
        mask[..., ::3] = -np.inf
        check(several(), mask=mask, window_size=30)


def test_one_schedule_with_and_without_a_mask(xp):
    """Who attends what does not depend on masks: the layers of a step may share one schedule."""
    case = make([70, 9, 130], [3, 9, 40], dtype="float16")
    made = cupyattn.schedule(case.lengths, num_heads=4, num_kv_heads=2, head_dim=64, cu_seqlens_q=case.cu,
                             xp=xp.module)
    mask = rng.random((3, 1, 1, 130)) < 0.7
    for options in ({}, {"mask": mask}, {"alibi_slopes": SLOPES}):
        check(case, xp, how={"schedule": made}, **options)
        if xp.name == "numpy":
            assert_all_same([attend(case, **options), attend(case, schedule=made, **options)])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_mask_of_16_bits(kind):
    check(several("bfloat16"), mask=rng.standard_normal((4, 1, 60)).astype(dtype_of(kind)))


def test_mask_views():
    """Strides of any kind, none expanded."""
    whole = rng.random((5, 4, 40, 2120)) < 0.6
    view = whole[:, ::-1, ::2, ::2]
    assert_all_same([attend(several_once(), mask=np.ascontiguousarray(view)), attend_with_view(view)])
    repeated = np.broadcast_to(whole[:1, :1, :1, :50], (5, 4, 20, 50))
    assert_all_same([attend(several_once(), mask=np.ascontiguousarray(repeated)), attend_with_view(repeated)])


@functools.cache
def several_once():
    return several()


def attend_with_view(mask):
    case = several_once()
    k, v, where = case.keys(NUMPY, "dense")
    return cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, mask=mask, return_lse=True, **where)


def test_masked_keys_may_be_anything():
    """Keys a mask hides from everybody may be NaN."""
    case = make([100, 40], [20, 1])
    mask = np.ones((2, 1, 1, 100), bool)
    mask[:, :, :, 7:30] = False
    want = attend(case, mask=mask)
    for b in range(2):
        pages, slots = (a[7:30] for a in case.tokens(b))
        case.k[pages, slots] = np.nan
        case.v[pages, slots] = np.nan
    assert_all_same([want, attend(case, mask=mask)])


def test_tree_mask(xp):
    """Branches of drafted tokens: each sees the history, its ancestors and itself."""
    q_lens = [5, 1, 40]
    words = np.zeros((46, 2), np.uint32)
    row = 0
    for q_len in q_lens:
        parents = [-1] + [int(rng.integers(0, i)) for i in range(1, q_len)]
        for i in range(q_len):
            j = i
            while j >= 0:
                words[row + i, j // 32] |= np.uint32(1 << j % 32)
                j = parents[j]
        row += q_len
    check(make([60, 9, 150], q_lens), xp, tree_mask=words)
    check(make([60, 9, 150], q_lens), xp, tree_mask=words, window_size=30)


def test_alibi_is_an_additive_mask():
    case = make([90], [90])
    n, t = np.arange(90)[:, None], np.arange(90)
    mask = (-SLOPES[:, None, None] * np.abs(n - t)).astype(np.float32)[None]
    assert_close(attend(case, alibi_slopes=SLOPES)[0], attend(case, mask=mask)[0], 2e-6, 0)


# ---- caches ----------------------------------------------------------------------------------------------


def quantized(cache, format, dtype, used, **options):
    """`cache` as QuantizedKV; rows that are not `used` [pages, page_size] are the worst there is."""
    x = np.where(used[..., None, None], cache, 0).astype(np.float32)
    kv_heads, head_dim = cache.shape[2:]
    scale = None
    if format == "int8_symmetric":
        scale = np.abs(x).max((0, 1, 3)) / np.float32(127)
    elif format == "int8_channel":
        scale = np.abs(x).max((0, 1)) / np.float32(127)
    codes, scale, zero = kv_codec.quantize(x, format, scale=scale, scale_dtype=dtype_of(dtype))
    codes[~used] = 0x7F
    for per_row in (scale, zero):
        if per_row is not None and per_row.ndim > 2:
            per_row[~used] = np.nan
    return QuantizedKV(codes, scale, zero, format=format)


@pytest.mark.parametrize("dtype, k_format, v_format", [
    ("float16", "int8", "int8"), ("float16", "int8", "int4"), ("bfloat16", "int4", "int8"),
    ("float32", "hadamard4", "hadamard8"), ("float16", "hadamard6", "hadamard6"),
    ("bfloat16", "int8_symmetric", "fp8_e4m3"), ("float16", "int8_channel", "int4"),
    ("float32", "int8_channel", "fp8_e4m3"), ("float32", "fp8_e5m2", "int8_channel")])
def test_formats(dtype, k_format, v_format):
    """Attention over what the codes stand for, at the bounds of the activations."""
    case = make([45, 200, 1060, 0], [1, 70, 9, 1], heads=6, head_dim=96, head_dim_v=64, dtype=dtype, kv_dtype="float32")
    used = np.zeros(case.k.shape[:2], bool)
    for b in range(len(case.lengths)):
        used[case.tokens(b)] = True
    case.k, case.v = (quantized(cache, format, dtype, used)
                      for cache, format in ((case.k, k_format), (case.v, v_format)))
    k, v = case.k, case.v
    want, want_lse = case.expected(window_size=1000)
    out, lse = cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, block_table=case.table, window_size=1000,
                                  cache_seqlens=case.lengths, invariant=True, return_lse=True)   # one kernel to build
    assert_close(out, want, *TOLERANCE[dtype])
    assert_close(lse, want_lse, 2e-6, 1e-6)


# ---- onnxruntime -----------------------------------------------------------------------------------------


def onnx_run(node, feeds, outputs):
    """Results of one node on onnxruntime's CPU provider; `outputs` are names and dtypes, feeds of None are left out."""
    import onnxruntime
    from onnx import helper

    feeds = {name: np.ascontiguousarray(a) for name, a in feeds.items() if a is not None}
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for name, a in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
               for name, dtype in outputs.items()]
    model = helper.make_model(helper.make_graph([node], "attention", inputs, outputs), ir_version=10, opset_imports=[
        helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def grouped_query_attention(q, k_new, v_new, k_past, v_past, lengths, *, window=0, softcap=0.0, sinks=None, scales=None,
                            kind="NONE"):
    """GroupQueryAttention: q [batch, q_len, heads, dim] and the newest keys after k_past [batch, past, kv_heads, dim].

    `scales` of K and V belong to int8 caches, `kind` says what has one. Returns the output and the caches, as
    [batch, tokens, kv_heads, dim].
    """
    from onnx import helper

    batch, q_len, heads, _ = q.shape
    feeds = {"query": q.reshape(batch, q_len, -1), "key": k_new.reshape(batch, q_len, -1),
             "value": v_new.reshape(batch, q_len, -1), "past_key": k_past.transpose(0, 2, 1, 3),
             "past_value": v_past.transpose(0, 2, 1, 3), "seqlens_k": lengths - 1,
             "total": np.int32([lengths.max()]), "cos": None, "sin": None, "positions": None, "bias": None,
             "head_sink": None if sinks is None else sinks.astype(q.dtype),
             **({} if scales is None else {"k_scale": scales[0], "v_scale": scales[1]})}
    quantized = {} if scales is None else {"kv_cache_bit_width": 8, "k_quant_type": kind, "v_quant_type": kind}
    node = helper.make_node("GroupQueryAttention", ["" if a is None else name for name, a in feeds.items()],
                            ["out", "present_key", "present_value"], domain="com.microsoft", num_heads=heads,
                            kv_num_heads=k_new.shape[2], softcap=softcap, local_window_size=window or -1, **quantized)
    out, k, v = onnx_run(node, feeds, {"out": q.dtype, "present_key": k_past.dtype, "present_value": v_past.dtype})
    return out.reshape(q.shape), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def paged_like(case, q_len):
    """(q, new k, new v, past k, past v) of a batch whose sequences all have q_len queries, for the function above."""
    batch, longest = len(case.lengths), int(case.lengths.max())
    k, v = (np.zeros((batch, longest, *cache.shape[2:]), cache.dtype) for cache in (case.k, case.v))
    for b, length in enumerate(case.lengths):
        k[b, :length], v[b, :length] = case.k[case.tokens(b)], case.v[case.tokens(b)]
    rows, new = np.arange(batch)[:, None], case.lengths[:, None] - q_len + np.arange(q_len)
    past = longest - q_len if batch == 1 else longest   # a ragged batch is padded
    return case.q.reshape(batch, q_len, *case.q.shape[1:]), k[rows, new], v[rows, new], k[:, :past], v[:, :past]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lengths, q_len", [([37, 1, 128, 300], 1), ([200], 70), ([70], 70)])
@pytest.mark.parametrize("options", [{}, {"window_size": 33}, {"softcap": 2.0}, {"sinks": SINKS[:3].repeat(2)},
                                     {"window_size": 20, "softcap": 5.0}], ids=str)
def test_onnxruntime(dtype, lengths, q_len, options):
    case = make(lengths, [q_len] * len(lengths), heads=6, dtype=dtype)
    theirs = {"window" if name == "window_size" else name: value for name, value in options.items()}
    want = grouped_query_attention(*paged_like(case, q_len), case.lengths, **theirs)[0]
    assert_close(attend(case, **options)[0], want.reshape(case.q.shape), *TOLERANCE[dtype])


@pytest.mark.parametrize("lengths, q_len", [([37, 1, 128], 1), ([200], 70)])
@pytest.mark.parametrize("kind, format", [("PER_TENSOR", "int8_symmetric"), ("PER_CHANNEL", "int8_channel")])
def test_onnxruntime_int8(kind, format, lengths, q_len):
    """Its int8 caches, read as they are."""
    case = make(lengths, [q_len] * len(lengths), heads=6)
    scales = [np.float32(rng.random(1 if kind == "PER_TENSOR" else (2, 64)) * 0.01 + 0.02) for _ in "kv"]
    q, k_new, v_new, *past = paged_like(case, q_len)
    past = [np.clip(np.rint(a / s), -127, 127).astype(np.int8) for a, s in zip(past, scales, strict=True)]
    want, k, v = grouped_query_attention(q, k_new, v_new, *past, case.lengths, scales=scales, kind=kind)
    k, v = (QuantizedKV(codes, scale, format=format) for codes, scale in zip((k, v), scales, strict=True))
    got = cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, cache_seqlens=case.lengths,
                             block_table=np.arange(len(lengths), dtype=np.int32)[:, None])
    assert_close(got, want.reshape(case.q.shape), *TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 2.0, "softmax_scale": 0.2}, {"mask": "bool"},
                                     {"mask": "float32", "causal": False}], ids=str)
def test_onnxruntime_attention(dtype, options):
    """Attention of opset 23, head dims that differ."""
    from onnx import helper

    tokens = 70
    case = make([tokens], [tokens], heads=6, head_dim_v=48, dtype=dtype)
    k, v, where = case.keys(NUMPY, "ragged")
    feeds = {name: a.transpose(1, 0, 2)[None] for name, a in (("q", case.q), ("k", k), ("v", v))}
    options = dict(options)
    if "mask" in options:
        mask = rng.standard_normal((1, 6, tokens, tokens)).astype(np.float32)
        options["mask"] = np.maximum(mask, 0) + np.eye(tokens) > 0.5 if options["mask"] == "bool" else mask
        feeds["mask"] = options["mask"] if options["mask"].dtype == bool else mask.astype(dtype)
    node = helper.make_node("Attention", list(feeds), ["out"], is_causal=int(options.get("causal", True)),
                            softcap=options.get("softcap", 0.0), scale=options.get("softmax_scale", 0.125))
    want = onnx_run(node, feeds, {"out": case.q.dtype})[0][0].transpose(1, 0, 2)
    got = cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, **where, **options)
    bounds = TOLERANCE[dtype] if dtype == "float32" else (3e-3, 2.0**-9)   # it computes in float16
    assert_close(got, want, *bounds)


# ---- independence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_chunked_prefill_is_whole_prefill(dtype):
    """With invariant=True: the same bits, whatever the chunks."""
    case = make([1300], [1300], heads=3, kv_heads=1, dtype=dtype)
    whole = attend(case, invariant=True, window_size=600, sinks=SINKS[:3])
    parts = []
    for first, last in itertools.pairwise([0, 1, 65, 700, 1299, 1300]):
        chunk = replace(case, q=case.q[first:last], q_lens=np.int32([last - first]), lengths=np.int32([last]))
        parts.append(attend(chunk, invariant=True, window_size=600, sinks=SINKS[:3]))
    assert_all_same([whole, tuple(np.concatenate(a) for a in zip(*parts, strict=True))])


@pytest.mark.parametrize("options", [{}, {"alibi_slopes": SLOPES, "window_size": 100}], ids=["plain", "ALiBi"])
def test_a_sequence_does_not_see_its_batch(options):
    """With invariant=True: the bits it gets alone."""
    case = make([20, 1500, 0, 1024, 300], [20, 3, 1, 1, 200])
    out, lse = attend(case, invariant=True, **options)
    for b in range(5):
        rows = slice(case.cu[b], case.cu[b + 1])
        assert_all_same([attend(case.alone(b), invariant=True, **options), (out[rows], lse[rows])])


def test_decode_and_prefill_agree():
    """A token at a time or all at once: both within the bound of float64."""
    case = make([90], [90], heads=6)
    want = case.expected()[0]
    steps = [attend(replace(case, q=case.q[i:i + 1], q_lens=np.int32([1]), lengths=np.int32([i + 1])))[0]
             for i in range(90)]
    assert_close(np.concatenate(steps), want, *TOLERANCE["float32"])
    assert_close(attend(case)[0], want, *TOLERANCE["float32"])


@pytest.mark.parametrize("splits", [1, 2, 5, 64])
def test_splits(splits):
    """Partial results merged in the kernel, and by split_reduce."""
    case = make([45, 3000, 0, 130], [3, 5, 1, 130])
    check(case, sinks=SINKS, how={"num_splits": splits})
    parts = np.full((splits, 139, 4, 64), np.nan, np.float32), np.full((splits, 139, 4), np.nan, np.float32)
    k, v, where = case.keys(NUMPY, "dense")
    cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, num_splits=splits, partials=parts, **where)
    out, lse = cupyattn.split_reduce(*parts, sinks=SINKS, return_lse=True)
    want, want_lse = case.expected(sinks=SINKS)
    assert_close(out, want, *TOLERANCE["float32"])
    assert_close(lse, want_lse, 2e-6, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])   # CUDA cores, tensor cores
def test_many_pieces(xp, dtype):
    """More pieces than a warp has lanes, some without a visible key: the bits of split_reduce in float32."""
    case = make([71 * 64 - 5, 3 * 64], [2, 1], dtype=dtype)
    mask = np.ones((2, 1, 1, 71 * 64), bool)
    mask[0, ..., 10 * 64:33 * 64] = False
    check(case, xp, mask=mask, sinks=SINKS, how={"num_splits": 71})
    k, v, where = case.keys(xp, "dense")
    call = functools.partial(cupyattn.attention, xp.array(case.q), k, v, cu_seqlens_q=xp.array(case.cu), num_splits=71,
                             mask=xp.array(mask), sinks=xp.array(SINKS), **where)
    parts = [xp.array(np.full(shape, np.nan, np.float32)) for shape in ((71, 3, 4, 64), (71, 3, 4))]
    call(partials=tuple(parts))
    empty = np.isneginf(xp.numpy(parts[1]))
    assert empty[10:33].all() and not empty[:3].any() and not empty[33:, :2].any()
    for merged, want in zip(call(return_lse=True),
                            cupyattn.split_reduce(*parts, sinks=xp.array(SINKS), return_lse=True), strict=True):
        assert_same_bits(xp.numpy(merged), xp.numpy(want).astype(merged.dtype))


def test_pieces_in_any_order():
    """Whoever merges 70 pieces, of rows that fill the threads of a block or a few: the same bits, and no race."""
    for heads, head_dim in ((1, 8), (8, 64)):
        case = make([69 * 64 + 3], [1], heads=heads, kv_heads=1, head_dim=head_dim)
        k, v, where = case.keys(NUMPY, "dense")
        made = cupyattn.schedule(case.lengths, num_heads=heads, num_kv_heads=1, head_dim=head_dim, dtype="float32",
                                 cu_seqlens_q=case.cu, num_workers=72)
        assert made.decode.units[0, 1] == 70
        for options in ({"check": True}, {"workers": 2}):
            results = []
            for order, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
                with settings(schedule=order, seed=seed, **options):
                    results.append(cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, schedule=made,
                                                      return_lse=True, **where))
            assert_all_same(results)
            assert_close(results[0][0], case.expected()[0], *TOLERANCE["float32"])


def test_order_of_threads():
    """Any order of threads and any number of workers: the same bits."""
    case = make([45, 1500, 0, 130], [3, 5, 1, 130])
    results = []
    for schedule, seed, workers in (("forward", 0, 1), ("forward", 0, 2), ("reverse", 0, 2),
                                    *(("random", seed, 2) for seed in range(5))):
        with settings(schedule=schedule, seed=seed, workers=workers):
            results.append(attend(case, sinks=SINKS))
    assert_all_same(results)


@pytest.mark.parametrize("dtype, options", [("float32", {}), ("bfloat16", {"alibi_slopes": SLOPES})],
                         ids=["plain", "ALiBi"])
def test_attention_checked(dtype, options):
    """The checker finds nothing, and every order of threads gives the same bits."""
    case = make([40, 0, 1100], [9, 2, 3], heads=4, head_dim=40, head_dim_v=72, dtype=dtype)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(attend(case, window_size=300, invariant=True, **options))
    assert_all_same(results)


@pytest.mark.parametrize("k_format, v_format, dtype", [
    ("int8", "int8", "float16"), ("hadamard4", "hadamard8", "float32"), (None, None, "float32")])
def test_formats_checked(k_format, v_format, dtype):
    """The checker finds nothing; every row is read once; staged keys do not conflict."""
    case = make([30, 70], [3, 5], head_dim=64, dtype=dtype, kv_dtype="float32")
    used = np.zeros(case.k.shape[:2], bool)
    for b in range(2):
        used[case.tokens(b)] = True
    k, v = (a if f is None else quantized(a, f, dtype, used) for a, f in ((case.k, k_format), (case.v, v_format)))
    results = []
    for schedule in ("forward", "reverse"):
        with settings(check=True, schedule=schedule), counters() as launches:
            results.append(cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, block_table=case.table,
                                              cache_seqlens=case.lengths, invariant=True, return_lse=True))
        launch, = launches
        for name, format in (("k", k_format), ("v", v_format)):
            row = 64 * 4 if format is None else FORMATS[format].row_codes(64)
            assert launch.buffers[f"{name}.data"]["bytes_read"] == 100 * 2 * row   # tokens, KV heads
        assert launch.shared["cp_async"]["requests"] > 0 and launch.shared["cp_async"]["conflicts"] == 0
        # 16 bytes of a key are read without conflicts, shorter pieces are not; the rest happens once per item
        reads = [place for place, access in launch.conflicts if access == "read" and "attention_store" not in place]
        assert not reads or k_format is not None, reads
    assert_all_same(results)
