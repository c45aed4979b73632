# SPDX-License-Identifier: Apache-2.0
"""An attention layer spread over ranks gives what one rank gives: in one process, over MPI, on the device."""

import contextlib
import doctest
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import standin_nccl
from attention_layers import Layer
from compare import assert_same_bits
from conftest import NumpyArrays
from mpi_ranks import mpiexec, run
from standin import install
from test_context_parallel import decoded_by

import cupyattn
from cupyattn import (
    InProcessCommunicator,
    LoRA,
    NCCLCommunicator,
    PagedCache,
    PagedParams,
    Params,
    TPAttn,
    TPContext,
)
from cupyattn.graphs import BoundSteps, capture, place

README = Path(__file__).parent.parent / "README.md"
CLOSE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}   # of the largest number
NUMPY = NumpyArrays()
LAYERS = {
    "fp16": dict(dtype="float16", formats="float16", heads=8, kv_heads=4),
    "bf16": dict(dtype="bfloat16", formats="bfloat16", heads=4, kv_heads=4, post=True),
    "fp32": dict(dtype="float32", heads=6, kv_heads=3, dim=16, hidden=48, biases=True),
    "eight KV heads": dict(dtype="float32", heads=16, kv_heads=8, dim=8, hidden=48, norm=None),
    "seven heads": dict(dtype="float32", heads=7, kv_heads=7, dim=24, hidden=56, head_norm="heads"),
    "int4 and everything": dict(dtype="float16", formats="int4-g32", heads=8, kv_heads=4, biases=True, post=True,
                                head_norm="heads", rotary_dim=16, rope_style="gptj"),
    "layer norms, float32 residual": dict(dtype="float16", formats=("int8", "int8", "int8", "float16"), norm="layer",
                                          heads=6, kv_heads=3, post=True, residual_fp32=True, head_norm="shared"),
    "no residual": dict(dtype="float32", heads=3, kv_heads=3, has_residual=False),
    "post-norm, no residual": dict(dtype="float32", heads=3, kv_heads=3, post=True, has_residual=False),
}
MPI_LAYERS = ("fp16", "fp32", "eight KV heads", "seven heads", "int4 and everything")
HEADS = {("eight KV heads", 2): ([24, 8], [6, 2]), ("eight KV heads", 3): (None, [3, 3, 2]),   # weights, KV heads
         ("seven heads", 2): (None, [4, 3])}
STEPS = (5, 1, 3)   # new tokens of each step
PAGES = np.int32([[3, 1, 0, 7], [2, 6, 5, 4]])   # of 4 tokens


def whole_layer(name, xp=NUMPY, **changes):
    """(Layer, arguments of QAttn for it); `changes` are Layer's."""
    layer = Layer(xp, **LAYERS[name] | changes)
    arguments = {f"q_{n}_proj": m for n, m in layer.matrices.items()} | layer.vectors | layer.options
    return layer, arguments | {"dtype": layer.dtype, "sincos_size": layer.rotary_dim, "norm_epsilon": 1e-6,
                               "rope_style": {"neox": 2, "interleaved": 1, None: 0}[layer.style]}


def params_of(paged, past, q_len):
    if paged:
        return PagedParams(2, PAGES, np.int32([past, past + 2]), past + 2, page_size=4, q_len=q_len)
    return Params(2, q_len, past, position_offsets=[0, -1])


def steps(name, paged, forward):
    """x of each step; ``forward(x, params)`` with x NumPy. A paged sequence is two tokens ahead, from a step of two."""
    layer, past, found = whole_layer(name)[0], 0, []
    if paged:
        forward(layer.inputs(2, 2), PagedParams(2, PAGES, np.int32([14, 0]), 14, page_size=4, q_len=2))
    for q_len in STEPS:
        found.append(forward(layer.inputs(2, q_len), params_of(paged, past, q_len)))
        past += q_len
    return found


OPTIONS = {"softcap": 4.0, "window_size": 6}


def options_of(layer):
    return OPTIONS | {"sinks": np.linspace(-1, 1, layer.heads, dtype=np.float32)}


def caches_of(layer, paged, kv_heads, xp=NUMPY):
    make = (lambda heads: PagedCache(1, 8, 4, heads, layer.dim, dtype=layer.dtype, xp=xp.module)) if paged else \
        (lambda heads: PagedCache.contiguous(1, 2, 16, heads, layer.dim, dtype=layer.dtype, xp=xp.module))
    return [make(heads) for heads in kv_heads]


def single(name, paged):
    """One rank, without any of this."""
    layer, _ = whole_layer(name)
    (cache,) = caches_of(layer, paged, [layer.kv_heads])
    return steps(name, paged, lambda x, params: layer.attn.forward(x, params, cache, **layer.tables,
                                                                   **options_of(layer)))


def each(communicator, make):
    """``make(n)`` for the n-th rank of this process, on its GPU."""
    made = []
    for n, device in enumerate(communicator.devices):
        with contextlib.nullcontext() if device == "cpu" else sys.modules["cupy"].cuda.Device(device):
            made.append(make(n))
    return made


def spread(name, paged, communicator, xp=NUMPY):
    """The ranks of this process: for each of them x of each step."""
    layer, arguments = whole_layer(name)
    weights, heads = HEADS.get((name, communicator.size), (None, None))
    context = TPContext(communicator, num_heads=layer.heads, num_kv_heads=layer.kv_heads, head_dim=layer.dim,
                        hidden_size=layer.hidden, weights=weights)
    assert heads is None or context.kv_heads == heads
    attn = TPAttn.from_layer(context, **arguments)
    caches = each(communicator, lambda n: caches_of(layer, paged, [attn.shards[n].attn.num_kv_heads], xp)[0])
    tables = {n: each(communicator, lambda _, t=t: xp.array(t)) for n, t in layer.tables.items()}
    options = options_of(layer)
    sinks = options.pop("sinks")
    options["sinks"] = each(communicator, lambda _: xp.array(sinks))

    def forward(x, params):
        out = attn.forward(each(communicator, lambda _: xp.array(x)), params, caches, **tables, **options)
        return [xp.numpy(array) for array in out]

    return list(zip(*steps(name, paged, forward), strict=True))


def assert_equal_runs(found, expected, dtype):
    """Every rank has the same bits, close to the single run's."""
    for rank in found:
        for mine, first, want in zip(rank, found[0], expected, strict=True):
            assert_same_bits(mine, first)
            want = want.astype(np.float64)
            error = np.abs(mine.astype(np.float64) - want).max() / np.abs(want).max()
            assert error <= CLOSE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", LAYERS)
def test_ranks_in_one_process(name, paged):
    expected = single(name, paged)
    for size in (1, 2, 3):
        assert_equal_runs(spread(name, paged, InProcessCommunicator(size)), expected, LAYERS[name]["dtype"])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_over_mpi(size, tmp_path):
    """The bits of ranks in one process, so close to the single run's; then context parallel over the same ranks."""
    here = {(name, paged): spread(name, paged, InProcessCommunicator(size))
            for name in MPI_LAYERS for paged in (True, False)}
    merged = decoded_by(InProcessCommunicator(size))
    found = run("layers", size, tmp_path)   # now that all kernels are compiled
    for rank in found:
        for name, want in zip(("out", "lse"), merged, strict=True):
            assert_same_bits(rank[name], want)
    for (name, paged), mine in here.items():
        there = [[rank[f"{name} {paged} {n}"] for n in range(len(STEPS))] for rank in found]
        assert_equal_runs(there, single(name, paged), LAYERS[name]["dtype"])
        for a, b in zip(mine, there, strict=True):
            for one, other in zip(a, b, strict=True):
                assert_same_bits(one, other)


def test_the_program_of_the_readme_over_mpi(tmp_path):
    """Only its communicator is another one."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (b for b in blocks if ">>> layer = cupyattn.TPAttn" in b)
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(block))
    assert source.count("InProcessCommunicator(2)") == 1
    exec(source, {})   # which compiles all kernels
    program = tmp_path / "program.py"
    program.write_text(source.replace("InProcessCommunicator(2)", "MPICommunicator()"))
    assert mpiexec(2, program).split() == ["True", "True"]


def test_two_gpus_of_one_process():
    """Each rank on a GPU of its own, over NCCL; weights come from the host."""
    with install(devices=2) as xp, standin_nccl.install() as log:
        found = spread("int4 and everything", True, NCCLCommunicator.local([0, 1]), xp)
        assert log == [(rank, "allReduce", 2 * n * 64, "float32", None, 0) for n in (2, *STEPS) for rank in (0, 1)]
    assert_equal_runs(found, single("int4 and everything", True), "float16")


def adapters_of(layer, seed=11):
    """Two adapters of different ranks, one without some projections."""
    rng = np.random.default_rng(seed)

    def lora(projection, rank):
        out, width = layer.matrices[projection].shape
        return LoRA((rng.standard_normal((rank, width)) / np.sqrt(width)).astype(np.float32),
                    (rng.standard_normal((out, rank)) / np.sqrt(rank)).astype(np.float32), 0.5)

    return {"all": {p: lora(p, 4) for p in "qkvo"}, "some": {p: lora(p, 9) for p in "ko"}}


@pytest.mark.parametrize("name", ["fp32", "seven heads", "post-norm, no residual", "int4 and everything"])
def test_adapters(name):
    layer, arguments = whole_layer(name)
    adapters = adapters_of(layer)
    context = TPContext(InProcessCommunicator(3), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
                        head_dim=layer.dim, hidden_size=layer.hidden)
    attn = TPAttn.from_layer(context, **arguments)
    assert attn.set_loras(adapters) == layer.attn.set_loras(adapters) == 9
    x, without = layer.inputs(2, 3), None
    for options in ({}, {"loras": ["some", "all"]}, {"sequence_loras": ["some", None]},
                    {"loras": ["all"], "sequence_loras": [None, "some"]}):
        (cache,) = caches_of(layer, False, [layer.kv_heads])
        want = layer.attn.forward(x.copy(), Params(2, 3, 0), cache, **layer.tables, **options)
        caches = caches_of(layer, False, context.kv_heads)
        found = attn.forward([x.copy() for _ in range(3)], Params(2, 3, 0), caches, **layer.tables, **options)
        assert_equal_runs([[array] for array in found], [want], layer.dtype)
        without = want if without is None else without
        assert bool(options) == (np.abs(want.astype(float) - without).max() > 0.01)
    assert attn.set_loras({}) == 0
    with pytest.raises(ValueError, match="QAttn: loras must be among none, got 'all'"):
        attn.forward([x.copy() for _ in range(3)], Params(2, 3, 0), caches, loras=["all"], **layer.tables)
    with pytest.raises(ValueError, match=r"TPContext: adapters must have a \[rank, .* for 'q', got"):
        attn.set_loras({"one": {"q": LoRA(np.ones((2, 3)), np.ones((3, 2)))}})
    with pytest.raises(ValueError, match="TPContext: adapters must hold a LoRA for q, k, v, o, got NoneType"):
        attn.set_loras({"one": {"q": None}})


def test_threads_with_adapters_of_their_own():
    """Each names its own, with x and caches of its own; nothing of a call is in the layer."""
    layer, context, attn, _, _ = three_ranks()
    attn.set_loras(adapters_of(layer))
    x, names = layer.inputs(2, 1), ({}, {"loras": ["all"]}, {"sequence_loras": ["some", None]}, {"loras": ["some"]})

    def result(options):
        caches = caches_of(layer, False, context.kv_heads)
        return attn.forward([x.copy() for _ in range(3)], Params(2, 1, 0), caches, **layer.tables, **options)[0]

    want = [result(options) for options in names]
    assert len({array.tobytes() for array in want}) == 4

    def work(n):
        for turn in range(12):
            which = (n + turn) % 4
            assert_same_bits(result(names[which]), want[which])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("name", LAYERS)
def test_against_float64(name):
    layer, arguments = whole_layer(name)
    context = TPContext(InProcessCommunicator(3), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
                        head_dim=layer.dim, hidden_size=layer.hidden)
    x, caches = layer.inputs(2, 5), caches_of(layer, False, context.kv_heads)
    found = TPAttn.from_layer(context, **arguments).forward([x.copy() for _ in range(3)], Params(2, 5, 0), caches,
                                                            **layer.tables)
    want, _, _ = layer.expected(x, layer.no_past(2), layer.no_past(2))
    layer.check(found[2], want)


@pytest.mark.parametrize(("kv_heads", "size", "weights", "heads"), [
    (8, 2, [24, 8], [6, 2]), (8, 3, None, [3, 3, 2]), (7, 2, None, [4, 3])])
def test_uneven_heads(kv_heads, size, weights, heads):
    layer, arguments = whole_layer("fp32", heads=2 * kv_heads, kv_heads=kv_heads, dim=8, head_norm="heads")
    context = TPContext(InProcessCommunicator(size), num_heads=2 * kv_heads, num_kv_heads=kv_heads, head_dim=8,
                        hidden_size=48, weights=weights)
    assert context.kv_heads == heads
    attn = TPAttn.from_layer(context, **arguments)
    for paged in (True, False):
        (whole,), parts = (caches_of(layer, paged, counts) for counts in ([kv_heads], heads))
        for past, q_len in ((0, 12), (12, 1)):
            x = layer.inputs(2, q_len)
            params = PagedParams(2, PAGES, [past] * 2, past, page_size=4, q_len=q_len) if paged else \
                Params(2, q_len, past)
            want = layer.attn.forward(x.copy(), params, whole, **layer.tables, **options_of(layer))
            found = attn.forward([x.copy() for _ in heads], params, parts, **layer.tables, **options_of(layer))
            assert_equal_runs([[array] for array in found], [want], "float32")


def _blocks():
    params = Params(2, 3, 0)
    params.cu_seqlens, params.block_diag_layers = np.int32([0, 2, 3, 6]), {0}
    return params


def _other_tables():
    cos, sin = cupyattn.RopeParams(rotary_dim=16, base=7.0).tables(32)
    return {"cpu": (sin, cos)}


_PADDED = np.float32([[0, 0, 0], [-np.inf, 0, 0]])


@pytest.mark.parametrize("make", [
    lambda: Params(2, 3, 0, input_mask=_PADDED, position_offsets=[0, -1]), lambda: Params(2, 3, [0, 0]),
    lambda: Params(2, 3, 0, non_causal_attn=True), lambda: Params(2, 3, 5, rope_offsets=[3]),
    lambda: Params(2, 3, 0, alt_rope_embed=_other_tables()), _blocks], ids=[
    "left padding", "a cache for each sequence", "not causal", "rope offsets", "other tables", "block diagonal"])
def test_what_params_can_say(make):
    """And heads dealt out by weight."""
    layer, arguments = whole_layer("fp32")
    context = TPContext(InProcessCommunicator(2), num_heads=6, num_kv_heads=3, head_dim=16, hidden_size=48,
                        weights=[24, 8])
    assert context.q_heads == [4, 2]
    attn, x, params = TPAttn.from_layer(context, **arguments), layer.inputs(2, 3), make()
    batch, count = (1, 2) if params.multi_cache else (2, 1)
    whole, *parts = ([contiguous(heads, batch) for _ in range(count)] for heads in (3, *context.kv_heads))
    for cache in sum([whole, *parts], []):
        cache.k[0].fill(0.5)
        cache.v[0].fill(0.25)
    if not params.multi_cache:
        (whole,), parts = whole, [cache for (cache,) in parts]
    want = layer.attn.forward(x.copy(), params, whole, **layer.tables)
    found = attn.forward([x.copy(), x.copy()], params, parts, **layer.tables)
    assert_equal_runs([[array] for array in found], [want], "float32")


def test_quantized_caches():
    """Rows of a head are packed for themselves: the ranks' caches hold the single one's bits."""
    layer, context, attn, _, _ = three_ranks(kv_heads=3, heads=6, dim=32)
    options = {"k_format": "hadamard8", "v_format": "hadamard4", "dtype": "float32"}
    whole, *parts = (PagedCache(1, 8, 4, heads, 32, **options) for heads in (3, *context.kv_heads))
    for past, q_len in ((0, 9), (9, 1)):
        x, params = layer.inputs(2, q_len), PagedParams(2, PAGES, [past] * 2, past, page_size=4, q_len=q_len)
        want = layer.attn.forward(x.copy(), params, whole, **layer.tables)
        found = attn.forward([x.copy() for _ in range(3)], params, parts, **layer.tables)
        assert_equal_runs([[array] for array in found], [want], "float32")
    for pools in ("k", "v"):
        codes = [getattr(cache, pools)[0].codes for cache in (whole, *parts)]
        assert_same_bits(np.concatenate(codes[1:], axis=2), codes[0])


def test_the_residual_is_added_once():
    """A layer whose output projection is zero leaves x as it is."""
    layer, arguments = whole_layer("fp32")
    context = TPContext(InProcessCommunicator(3), num_heads=6, num_kv_heads=3, head_dim=16, hidden_size=48)
    arguments |= {"q_o_proj": np.zeros((48, 96), np.float32), "o_bias": None}
    attn = TPAttn.from_layer(context, **arguments)
    x = layer.inputs(2, 3)
    caches = caches_of(layer, False, context.kv_heads)
    for array in attn.forward([x.copy() for _ in range(3)], Params(2, 3, 0), caches, **layer.tables):
        assert_same_bits(array, x)
    bias = np.arange(48, dtype=np.float32)
    attn = TPAttn.from_layer(context, **arguments | {"o_bias": bias})
    for array in attn.forward([x.copy() for _ in range(3)], Params(2, 3, 0), caches, **layer.tables):
        assert_same_bits(array, x + bias)


def three_ranks(**changes):
    """(layer, context, TPAttn, x of each rank, caches) of a batch of one."""
    layer, arguments = whole_layer("fp32", **changes)
    context = TPContext(InProcessCommunicator(3), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
                        head_dim=layer.dim, hidden_size=layer.hidden)
    x, caches = layer.inputs(1, 1), caches_of(layer, False, context.kv_heads)
    for cache in caches:
        for pool in (*cache.k, *cache.v):
            pool.fill(7)
    return layer, context, TPAttn.from_layer(context, **arguments), [x.copy() for _ in range(3)], caches


def contiguous(heads, pages=2, tokens=16, dim=16, **options):
    return PagedCache.contiguous(1, pages, tokens, heads, dim, **{"dtype": "float32"} | options)


def test_memory_that_may_be_shared():
    """What is only read, and views that lie between each other: rows of one array, heads of one cache."""
    layer, context, attn, x, caches = three_ranks()
    want = [array.copy() for array in x]
    attn.forward(want, Params(1, 1, 0), caches, **layer.tables)
    rows = np.concatenate(x, axis=1)   # [1, ranks, hidden]
    whole = contiguous(3)
    parts = caches_of(layer, False, context.kv_heads)
    for rank, part in enumerate(parts):
        first, last = context.heads(rank, "kv")
        part.k, part.v = ([pool[:, :, first:last] for pool in pools] for pools in (whole.k, whole.v))
    views = [rows[:, n:n + 1] for n in range(3)]
    assert attn.forward(views, Params(1, 1, 0), parts, **layer.tables) is views
    for mine, array in zip(views, want, strict=True):
        assert_same_bits(np.ascontiguousarray(mine), array)


@pytest.mark.parametrize("name", ["fp16", "no residual", "int4 and everything", "layer norms, float32 residual"])
def test_a_result_beside_x(name):
    """QAttn's `out`: added to what it holds, while x stays; float32 is rounded less."""
    layer, _ = whole_layer(name)
    x, want, added = layer.inputs(2, 3), None, layer.attn.has_residual
    for out in (None, x.copy() if added else np.full_like(x, np.nan),
                x.astype(np.float32) if added else np.full(x.shape, np.nan, np.float32)):
        (cache,) = caches_of(layer, False, [layer.kv_heads])
        given = x.copy()
        found = layer.attn.forward(given, Params(2, 3, 0), cache, **layer.tables, out=out)
        assert found is (given if out is None else out)
        if out is None:
            want = found
            continue
        assert_same_bits(given, x)
        if out.dtype == x.dtype:
            assert_same_bits(out, want)
        assert_equal_runs([[out]], [want], layer.dtype)
    for out, error, message in ((x[:1].copy(), ValueError, "out must be"),
                                (x.astype(np.float64), TypeError, "out must be"),
                                (np.broadcast_to(x, x.shape), ValueError, "out must be writeable")):
        with pytest.raises(error, match=f"QAttn: {message}"):
            layer.attn.forward(x, Params(2, 3, 0), cache, **layer.tables, out=out)


def test_a_captured_step(xp):
    """Replays see new inputs and lengths, and exchange anew."""
    check_captured(InProcessCommunicator(2, device=None if xp.name == "numpy" else 0), xp)


def test_a_captured_step_over_nccl():
    """Of a process with one rank, the exchange on the stream that captures and on that of each replay."""
    with install() as xp, standin_nccl.install() as log:
        check_captured(NCCLCommunicator.local([0]), xp)
        assert {entry[:4] for entry in log} == {(0, "allReduce", 128, "float32")}
        assert log[1][5] != 0   # after the warm-up


def check_captured(communicator, xp):
    layer, arguments = whole_layer("fp16")
    context = TPContext(communicator, num_heads=8, num_kv_heads=4, head_dim=32, hidden_size=64)
    attn = TPAttn.from_layer(context, **arguments)
    heads, kv_heads = context.q_heads[0], context.kv_heads[0]
    caches = each(communicator, lambda n: caches_of(layer, True, [kv_heads], xp)[0])
    for cache in caches:
        cache.k[0].fill(0.25)
        cache.v[0].fill(0.5)
    tables = {n: each(communicator, lambda _, t=t: xp.array(t)) for n, t in layer.tables.items()}
    params = params_of(True, 3, 1)
    x = each(communicator, lambda _: xp.array(np.zeros((2, 1, 64), np.float16)))
    devices = [None if device == "cpu" else device for device in communicator.devices]
    lengths = [params.get_cache_seqlens_after(device) for device in devices]
    plans = each(communicator, lambda n: cupyattn.schedule(
        lengths[n], num_heads=heads, num_kv_heads=kv_heads, head_dim=32, max_k_len=16, q_len=1))

    def step():
        each(communicator, lambda n: cupyattn.schedule(lengths[n], num_heads=heads, num_kv_heads=kv_heads,
                                                       head_dim=32, max_k_len=16, q_len=1, out=plans[n]))
        attn.forward(x, params, caches, schedules=plans, **tables)

    graph = capture(step, xp=xp.module)
    for past in (5, 2):
        new = layer.inputs(2, 1)
        fresh = params_of(True, past, 1)
        for n, device in enumerate(devices):
            _fill(x[n], new)
            _fill(params.get_cache_seqlens(device), fresh.cache_seqlens)
            _fill(lengths[n], fresh.cache_seqlens_after)
            caches[n].k[0].fill(0.25)
            caches[n].v[0].fill(0.5)
        graph.replay()
        found = [xp.numpy(array) for array in x]
        for cache in caches:
            cache.k[0].fill(0.25)
            cache.v[0].fill(0.5)
        eager = attn.forward(each(communicator, lambda _, new=new: xp.array(new)), fresh, caches, **tables)
        for mine, want in zip(found, eager, strict=True):
            assert_same_bits(mine, xp.numpy(want))


def _fill(array, values):
    if isinstance(array, np.ndarray):
        array[...] = values
    else:
        array.set(values)


def test_the_same_call_again_and_again():
    """Objects of an earlier call, whose contents have changed: the parts are summed every time."""
    layer, arguments = whole_layer("fp32")
    context = TPContext(InProcessCommunicator(3), num_heads=6, num_kv_heads=3, head_dim=16, hidden_size=48)
    spread = TPAttn.from_layer(context, **arguments)
    caches = [PagedCache.contiguous(1, 2, 16, heads, 16, dtype="float32") for heads in context.kv_heads]
    x, params, first = [np.empty((2, 1, 48), np.float32) for _ in range(3)], Params(2, 1, 0), layer.inputs(2, 1)
    for _ in range(5):
        for part in x:
            part[...] = first
        found = spread.forward(x, params, caches, sin=layer.sin, cos=layer.cos)[0].copy()
        want, _, _ = layer.expected(first, layer.no_past(2), layer.no_past(2))
        layer.check(found, want)


def test_bound_steps():
    """Steps called again with the arrays of earlier calls are their launches alone, the exchange among them."""
    layer, _, attn, x, _ = three_ranks()
    caches = caches_of(layer, True, attn.context.kv_heads)
    params, steps, calls = PagedParams(1, PAGES[:1], [4], 4, page_size=4, q_len=1), BoundSteps(np), []
    plans = attn.schedules(params, caches)

    def step():
        calls.append(1)
        attn.schedules(params, caches, out=plans)
        return attn.forward(x, params, caches, schedules=plans, **layer.tables)

    for cache in caches:
        cache.k[0].fill(0.5)
        cache.v[0].fill(0.25)
    for past in (4, 5, 9, 2):
        first, fresh = layer.inputs(1, 1), PagedParams(1, PAGES[:1], [past], past, page_size=4, q_len=1)
        for array in x:
            array[...] = first
        params.get_cache_seqlens("cpu")[:] = past
        params.get_cache_seqlens_after("cpu")[:] = past + 1
        found = [array.copy() for array in steps.run(tuple(map(place, x)), step)]
        want = attn.forward([first.copy() for _ in x], fresh, caches, **layer.tables)
        for mine, array in zip(found, want, strict=True):
            assert_same_bits(mine, array)
    assert len(calls) == 2
