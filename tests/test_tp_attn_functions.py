# SPDX-License-Identifier: Apache-2.0
"""ExLlamaV2's tensor-parallel functions give what one QAttn gives; Params.prep_tp supplies their lists."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import standin_nccl
from attention_layers import Layer
from compare import assert_same_bits, dtype_of
from conftest import NumpyArrays
from mpi_ranks import run
from standin import install
from test_tp_attn import PAGES, adapters_of, assert_equal_runs, each

from cupyattn import (
    CaptureError,
    InProcessCommunicator,
    NCCLCommunicator,
    PagedCache,
    PagedParams,
    Params,
    RopeParams,
    TPContext,
    tp_attn_forward_,
    tp_attn_forward_paged_,
)
from cupyattn.graphs import capture

NUMPY = NumpyArrays()
LAYERS = {
    "fp16": dict(dtype="float16", formats="float16", heads=8, kv_heads=4, norm=None),
    "fp32, uneven": dict(dtype="float32", heads=14, kv_heads=7, dim=8, hidden=80, biases=True),
    "int4 and everything": dict(dtype="float16", formats="int4-g32", heads=8, kv_heads=4, head_norm="heads", post=True,
                                rotary_dim=16, rope_style="gptj", biases=True),
    "no rope": dict(dtype="float32", heads=3, kv_heads=3, head_norm="shared", rope_style="none"),
}
MPI_LAYERS = ("fp32, uneven", "int4 and everything")
OPTIONS = {"softcap": 4.0, "window_size": 6}
STEPS = (9, 1, 3)
SCALE = 0.2


def params_of(paged, past, q_len):
    if paged:
        return PagedParams(2, PAGES, np.int32([past, past]), past, page_size=4, q_len=q_len)
    return Params(2, q_len, past, position_offsets=[[-2], [0]])


def single(name, paged):
    layer, past, found = Layer(NUMPY, **LAYERS[name]), 0, []
    cache = PagedCache(1, 8, 4, layer.kv_heads, layer.dim, dtype=layer.dtype) if paged else \
        PagedCache.contiguous(1, 2, 16, layer.kv_heads, layer.dim, dtype=layer.dtype)
    for q_len in STEPS:
        x = layer.inputs(2, q_len)
        found.append(layer.attn.forward(x, params_of(paged, past, q_len), cache, softmax_scale=SCALE, **layer.tables,
                                        **OPTIONS))
        past += q_len
    return found


class Lists:
    """A layer's lists for the ranks of this process."""

    def __init__(self, name, paged, communicator, xp=NUMPY, weights=None, **changes):
        self.layer = layer = Layer(NUMPY, **LAYERS[name] | changes)
        self.paged, self.communicator, self.xp = paged, communicator, xp
        self.context = context = TPContext(communicator, num_heads=layer.heads, num_kv_heads=layer.kv_heads,
                                           head_dim=layer.dim, hidden_size=layer.hidden, weights=weights)
        vectors, ranks = layer.vectors, communicator.ranks

        def weights(shard, key):
            return each(communicator, lambda n: shard(layer.matrices[key], ranks[n]).to(xp.module))

        def per_rank(key, shard=lambda array, rank: array):
            if key not in vectors:
                return None
            return each(communicator, lambda n: xp.array(np.ascontiguousarray(shard(vectors[key], ranks[n]))))

        def heads(kind):
            return lambda array, rank: array if array.shape == (layer.dim,) else context.shard_heads(array, rank, kind)

        def rows(kind):
            return lambda weight, rank: context.shard_rows(weight, rank, kind)

        def features(array, rank):
            return array[slice(*context.hidden_range(rank))]

        self.positional = {
            "pre_layernorm": per_rank("layernorm") or [], "norm_epsilon": 1e-6, "q_proj": weights(rows("q"), "q"),
            "k_proj": weights(rows("kv"), "k"), "v_proj": weights(rows("kv"), "v"),
            "o_proj": weights(context.shard_output_rows, "o"), "head_dim": layer.dim,
            "rope_style": {"neox": 2, "interleaved": 1, None: 0}[layer.style]}
        self.keywords = {
            "q_norm": per_rank("q_norm", heads("q")), "k_norm": per_rank("k_norm", heads("kv")),
            "post_layernorm": per_rank("post_layernorm"), "rotary_dim": layer.rotary_dim,
            "q_bias": per_rank("q_bias", heads("q")), "k_bias": per_rank("k_bias", heads("kv")),
            "v_bias": per_rank("v_bias", heads("kv")), "o_bias": per_rank("o_bias", features), **OPTIONS}
        self.tables = {n: each(communicator, lambda _, t=t: xp.array(t)) for n, t in layer.tables.items()}
        pages, size = (8, 4) if paged else (2, 16)
        self.caches = [each(communicator, lambda n: xp.array(np.full(
            (pages, size, context.kv_heads[ranks[n]], layer.dim), np.nan, dtype_of(layer.dtype)))) for _ in "kv"]
        self.temps = {}
        most = 2 * max(STEPS) + 3
        for name, width in (("bc0", layer.hidden), ("bc1", layer.hidden), ("bc2", layer.heads * layer.dim)):
            self.temps[name] = self.empty(most, [width] * context.communicator.size)
        self.temps["q"] = self.empty(most, [layer.dim * n for n in context.q_heads])
        self.temps["k"], self.temps["v"] = (self.empty(most, [layer.dim * n for n in context.kv_heads]) for _ in "kv")
        spans = [context.hidden_range(rank) for rank in range(communicator.size)]
        self.temps["o"] = self.empty(most, [stop - start for start, stop in spans])

    def empty(self, rows, widths):
        return each(self.communicator, lambda n: self.xp.array(
            np.full((rows, widths[self.communicator.ranks[n]]), np.nan, dtype_of(self.layer.dtype))))

    def call(self, hidden, params, **changes):
        """One step by position, in the seed's order."""
        params.prep_tp(self.context)
        lengths = (params.cache_seqlens_tp, params.block_index_tp) if self.paged else (params.past_len_tp,)
        offsets = {} if self.paged else {"position_offsets": params.position_offsets_tp}
        keywords = offsets | self.keywords | changes
        t = self.temps
        function = tp_attn_forward_paged_ if self.paged else tp_attn_forward_
        return function(self.context, hidden, t["bc0"], t["bc1"], t["bc2"], t["q"], t["k"], t["v"], t["o"],
                        *self.caches, *self.positional.values(), params.batch_size, params.seq_len,
                        self.tables.get("sin"), self.tables.get("cos"), *lengths, SCALE, **keywords)


def spread(name, paged, communicator, xp=NUMPY, device_hidden=False):
    """(what each call returned, temp_o_ of each rank of this process) of each step."""
    lists, past, returned, columns = Lists(name, paged, communicator, xp), 0, [], []
    for q_len in STEPS:
        hidden = lists.layer.inputs(2, q_len)
        given = xp.array(hidden) if device_hidden else hidden
        out = lists.call(given, params_of(paged, past, q_len))
        assert type(out) is type(given) and out.shape == hidden.shape
        on_host = xp.numpy if device_hidden else np.copy
        assert_same_bits(on_host(given), hidden)
        returned.append(on_host(out))
        rows = 2 * q_len
        columns.append([xp.numpy(o)[:rows] for o in lists.temps["o"]])
        assert all(np.isnan(xp.numpy(o)[2 * max(STEPS):]).all() for o in lists.temps["o"])   # rows of no token
        past += q_len
    return returned, columns


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_one_rank_gives(name, paged):
    expected = single(name, paged)
    for size in (1, 2, 3):
        returned, columns = spread(name, paged, InProcessCommunicator(size))
        assert_equal_runs([returned], expected, LAYERS[name]["dtype"])
        for whole, parts in zip(returned, columns, strict=True):
            assert_same_bits(np.concatenate(parts, axis=1), whole.reshape(-1, whole.shape[-1]))


@pytest.mark.parametrize("size", [2, 3])
def test_over_mpi(size, tmp_path):
    """The bits of ranks in one process."""
    here = {(name, paged): spread(name, paged, InProcessCommunicator(size))
            for name in MPI_LAYERS for paged in (True, False)}
    for rank, result in enumerate(run("functions", size, tmp_path)):   # now that all kernels are compiled
        for (name, paged), (returned, columns) in here.items():
            for n in range(len(STEPS)):
                assert_same_bits(result[f"{name} returned {paged} {n}"], returned[n])
                assert_same_bits(result[f"{name} columns {paged} {n}"], columns[n][rank])


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_on_the_device(xp, paged):
    communicator = InProcessCommunicator(2, device=None if xp.name == "numpy" else 0)
    for device_hidden in (False, True):
        returned, _ = spread("int4 and everything", paged, communicator, xp, device_hidden)
        assert_equal_runs([returned], single("int4 and everything", paged), "float16")


def test_two_gpus_of_one_process():
    with install(devices=2) as xp, standin_nccl.install() as log:
        returned, _ = spread("fp16", True, NCCLCommunicator.local([0, 1]), xp)
        assert log[:2] == [(rank, "allGather", 1, "int64", None, 0) for rank in (0, 1)]   # rows of the ranks' o_proj
        assert log[2:] == [(rank, call, 2 * n * width, "float16", root, 0) for n in STEPS for call, width, root in (
            ("broadcast", 64, 0), ("allGather", 128, None), ("allGather", 32, None)) for rank in (0, 1)]
    assert_equal_runs([returned], single("fp16", True), "float16")


@pytest.mark.parametrize("name", ["fp32, uneven", "int4 and everything"])
def test_adapters(name):
    lists, layer = Lists(name, True, InProcessCommunicator(2)), Layer(NUMPY, **LAYERS[name])
    adapters = adapters_of(layer)
    layer.attn.set_loras(adapters)
    for names in (["some", "all"], ["all"], []):
        x = layer.inputs(2, 3)
        cache = PagedCache(1, 8, 4, layer.kv_heads, layer.dim, dtype=layer.dtype)
        found = lists.call(x.copy(), params_of(True, 0, 3), loras=[adapters[n] for n in names])
        want = layer.attn.forward(x, params_of(True, 0, 3), cache, softmax_scale=SCALE, loras=names, **layer.tables,
                                  **OPTIONS)
        assert_equal_runs([[found]], [want], layer.dtype)


def test_adapters_that_change():
    """Of a dict changed between calls, the LoRA that it then holds; the same again and again are prepared once."""
    lists = Lists("fp32, uneven", True, InProcessCommunicator(2))
    adapters = adapters_of(lists.layer)
    x, given = lists.layer.inputs(2, 3), dict(adapters["all"])

    def result(*loras):
        return lists.call(x, params_of(True, 0, 3), loras=loras).copy()

    first = result(given)
    (layer,) = lists.context.layers.values()
    assert_same_bits(result(dict(adapters["all"])), first)
    assert len(layer._adapters) == 1
    del given["v"]
    assert np.abs(result(given) - first).max() > 1e-2
    given["v"] = adapters["all"]["v"]
    assert_same_bits(result(given), first)
    assert np.abs(result(given, given) - first).max() > 1e-2   # added twice
    assert_same_bits(result({}), result())
    for n in range(9):
        result({"q": adapters["all"]["q"]._replace(scale=float(n))})
    assert len(layer._adapters) == 4
    assert_same_bits(result(given), first)


def test_threads_with_adapters_of_their_own():
    """Over one context and its weights, each with temporary arrays and caches of its own."""
    layer = Layer(NUMPY, **LAYERS["fp32, uneven"])
    adapters, lists = adapters_of(layer), [Lists("fp32, uneven", True, InProcessCommunicator(2)) for _ in range(3)]
    for other in lists[1:]:
        other.context = lists[0].context
        other.positional, other.keywords = lists[0].positional, lists[0].keywords
    x = layer.inputs(2, 1)

    def result(mine, name):
        return mine.call(x, params_of(True, 0, 1), loras=[adapters[name]] if name else []).copy()

    names = ("all", None, "some")
    want = {name: result(lists[0], name) for name in names}
    assert len(lists[0].context.layers) == 1

    def work(n):
        for turn in range(12):
            name = names[(n + turn) % 3]
            assert_same_bits(result(lists[n], name), want[name])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


def test_weights_are_prepared_once():
    lists = Lists("fp32, uneven", True, InProcessCommunicator(2))
    for past in range(3):
        lists.call(lists.layer.inputs(2, 1), params_of(True, past, 1))
    (kept,) = lists.context.layers.values()
    assert kept.ranks[0].q is lists.positional["q_proj"][0]   # as it was given, no copy
    other = Lists("fp32, uneven", True, InProcessCommunicator(2))
    other.context = lists.context
    other.call(other.layer.inputs(2, 1), params_of(True, 0, 1))
    assert len(lists.context.layers) == 2


def test_heads_of_one_cache():
    """Caches of the ranks that are views of one, each of its heads."""
    lists = Lists("fp32, uneven", True, InProcessCommunicator(2))
    x = lists.layer.inputs(2, 3)
    want = lists.call(x, params_of(True, 0, 3))
    whole = [np.zeros((8, 4, 7, 8), np.float32) for _ in "kv"]
    lists.caches = [[pool[:, :, :4], pool[:, :, 4:]] for pool in whole]
    assert_same_bits(lists.call(x, params_of(True, 0, 3)), want)
    assert all(pool[PAGES[:, 0], :3].any(axis=-1).all() for pool in whole)


def test_the_residual_is_added_once():
    """An output projection of zeros leaves x in every temp_o_, and so in the result; with a bias, x + bias."""
    lists = Lists("fp32, uneven", True, InProcessCommunicator(3))
    x = lists.layer.inputs(2, 2)
    spans = [slice(*lists.context.hidden_range(rank)) for rank in range(3)]
    lists.positional["o_proj"] = [np.zeros((span.stop - span.start, 112), np.float32) for span in spans]
    bias = lists.keywords.pop("o_bias")
    assert_same_bits(lists.call(x, params_of(True, 0, 2)), x)
    for out, span in zip(lists.temps["o"], spans, strict=True):
        assert_same_bits(out[:4], np.ascontiguousarray(x.reshape(4, 80)[:, span]))
    assert_same_bits(lists.call(x, params_of(True, 0, 2), o_bias=bias), x + np.concatenate(bias))


@pytest.mark.parametrize(("size", "weights", "heads"), [(2, [24, 8], [6, 2]), (3, None, [3, 3, 2])])
def test_uneven_heads(size, weights, heads):
    changes = dict(heads=16, kv_heads=8)
    lists = Lists("fp32, uneven", False, InProcessCommunicator(size), weights=weights, **changes)
    assert lists.context.kv_heads == heads
    x, cache = lists.layer.inputs(2, 3), PagedCache.contiguous(1, 2, 16, 8, 8, dtype="float32")
    for pool in (*cache.k, *cache.v, *sum(lists.caches, [])):
        pool.fill(0.5)
    found = lists.call(x, params_of(False, 4, 3))
    want = lists.layer.attn.forward(x, params_of(False, 4, 3), cache, softmax_scale=SCALE, **lists.layer.tables,
                                    **OPTIONS)
    assert_equal_runs([[found]], [want], "float32")


KEYWORDS = {   # of the function: (arguments of Layer, options of QAttn.forward)
    "q_norm": (dict(head_norm="heads"), {}),
    "k_norm": (dict(head_norm="shared"), {}),
    "post_layernorm": (dict(post=True), {}),
    "q_bias": (dict(biases=True), {}),
    "o_bias": (dict(biases=True), {}),
    "rotary_dim": (dict(rotary_dim=4), {}),
    "position_offsets": ({}, {}),
    "softcap": ({}, {"softcap": 2.0}),
    "window_size": ({}, {"window_size": 3}),
    "loras": ({}, {"loras": ["all"]}),
}


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword(keyword, paged):
    """It does what QAttn does, and without it the result is another; `tp_attn_forward_` has the same."""
    made, options = KEYWORDS[keyword]
    lists = Lists("fp32, uneven", paged, InProcessCommunicator(2), **{"biases": False} | made)
    layer, x = lists.layer, lists.layer.inputs(2, 4)
    adapters = adapters_of(layer)
    layer.attn.set_loras(adapters)
    offsets = np.int32([3, 0]) if keyword == "position_offsets" else None
    lists.keywords |= {"softcap": 0.0, "window_size": 0} | options
    if "loras" in options:
        lists.keywords["loras"] = [adapters["all"]]
    if offsets is not None:
        lists.keywords["position_offsets"] = [offsets, offsets]
    for pool in sum(lists.caches, []):
        pool.fill(0.5)
    cache = PagedCache(1, 8, 4, 7, 8, dtype="float32") if paged else PagedCache.contiguous(1, 2, 16, 7, 8,
                                                                                           dtype="float32")
    for pool in (*cache.k, *cache.v):
        pool.fill(0.5)
    params = PagedParams(2, PAGES, [5, 5], 5, page_size=4, q_len=4, rope_offsets=offsets) if paged else \
        Params(2, 4, 5, position_offsets=offsets)
    want = layer.attn.forward(x.copy(), params, cache, softmax_scale=SCALE, **layer.tables, **options)
    given = PagedParams(2, PAGES, [5, 5], 5, page_size=4, q_len=4) if paged else Params(2, 4, 5)
    found = lists.call(x, given, **lists.keywords)
    assert_equal_runs([[found]], [want], "float32")
    without = {"softcap": 0.0, "window_size": 0, "loras": ()}.get(keyword)
    if keyword == "rotary_dim":   # tables of a whole head go with it
        cos, sin = RopeParams(rotary_dim=8, base=100.0).tables(128)
        lists.tables = {"sin": [sin] * 2, "cos": [cos] * 2}
    other = lists.call(x, given, **lists.keywords | {keyword: without})
    assert np.abs(other - found).max() > 1e-3


def test_quantized_caches():
    lists = Lists("fp32, uneven", True, InProcessCommunicator(2), dim=32)
    formats = {"k_format": "hadamard8", "v_format": "hadamard4", "dtype": "float32"}
    parts = [PagedCache(1, 8, 4, heads, 32, **formats) for heads in lists.context.kv_heads]
    lists.caches = [[part.k[0] for part in parts], [part.v[0] for part in parts]]
    whole = PagedCache(1, 8, 4, 7, 32, **formats)
    for past, q_len in ((0, 9), (9, 1)):
        x = lists.layer.inputs(2, q_len)
        found = lists.call(x, params_of(True, past, q_len))
        want = lists.layer.attn.forward(x, params_of(True, past, q_len), whole, softmax_scale=SCALE,
                                        **lists.layer.tables, **OPTIONS)
        assert_equal_runs([[found]], [want], "float32")


def test_not_for_capture():
    """A schedule of its own, made from the lengths; TPAttn takes one."""
    lists, params = Lists("fp32, uneven", True, InProcessCommunicator(2)), params_of(True, 0, 1)
    with pytest.raises(CaptureError, match="must not call paged_decode without schedule"):
        capture(lambda: lists.call(lists.layer.inputs(2, 1), params))
