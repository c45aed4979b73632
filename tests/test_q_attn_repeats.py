# SPDX-License-Identifier: Apache-2.0
"""Decoding steps that `QAttn.forward` remembers: which calls repeat one, and what makes them new."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import bench_q_attn
import numpy as np
import pytest
from attention_layers import Layer
from compare import assert_same_bits
from conftest import NumpyArrays
from test_q_attn_steps import PAGE_TABLE, check_in_threads, device_of, filled, put, refill

import cupyattn
from cupyattn import PagedParams, QAttn, runtime
from cupyattn.graphs import capture
from cupyattn.q_attn import weights as converted_tables
from cupyattn.q_attn.step import steps_of
from cupyattn.runtime import cpu


def new_params(past=(5, 9), q_len=1, table=PAGE_TABLE, **options):
    return PagedParams(2, table, past, max(past), page_size=4, q_len=q_len, **options)


class Step:
    """A layer's step, called again and again; how often all of its Python ran."""

    def __init__(self, xp, monkeypatch, q_len=1, layer=None, **options):
        self.xp, self.layer, self.options = xp, layer or Layer(xp, dtype="float16"), options
        self.attn, self.cache, self.params = self.layer.attn, filled(self.layer, xp), new_params(q_len=q_len)
        self.x, self.tables, self.number = xp.array(self.layer.inputs(2, q_len)), dict(self.layer.tables), 0
        original, self.plain = QAttn.checked, []
        plain = self.plain
        monkeypatch.setattr(QAttn, "checked", lambda *args: plain.append(1) or original(*args))

    def __call__(self):
        """Whether all of its Python ran."""
        before = len(self.plain)
        found = self.attn.forward(self.x, self.params, self.cache, self.number, **self.tables, **self.options)
        assert found is (self.x if self.options.get("out") is None else self.options["out"])
        return len(self.plain) > before

    def remembered(self):
        """Call it until it is."""
        calls = [self() for _ in range(6)]
        assert calls[0] and not calls[-1]
        return self


@pytest.mark.parametrize("q_len", [1, 3])
def test_a_step_called_again(xp, monkeypatch, q_len):
    """Calls that repeat write what new ones would: input, tables and weights may have changed in place."""
    step = Step(xp, monkeypatch, q_len)
    layer, other = step.layer, filled(step.layer, xp)
    step.tables = {name: xp.array(xp.numpy(table)) for name, table in step.tables.items()}
    seen = []
    for n in range(7):
        rows = layer.inputs(2, q_len)
        put(step.x, rows)
        if n == 5:
            for name, table in zip(("cos", "sin"), cupyattn.RopeParams(rotary_dim=32, base=7.0).tables(128),
                                   strict=True):
                put(step.tables[name], table)
        seen.append(step())
        fresh = xp.array(rows)
        layer.attn.forward(fresh, new_params(q_len=q_len), other, 0, **step.tables)
        assert_same_bits(xp.numpy(step.x), xp.numpy(fresh))
        for mine, pool in zip((*step.cache.k, *step.cache.v), (*other.k, *other.v), strict=True):
            assert_same_bits(xp.numpy(mine), xp.numpy(pool))
    assert seen == [True] * 4 + [False] * 3


def test_steps_of_two_layers_over_lengths_changed_in_place(xp, monkeypatch):
    """A decode loop of one PagedParams. On NumPy the first layer of each step looks at its lengths and pages."""
    first = Step(xp, monkeypatch)
    layer, cache, params, x = first.layer, first.cache, first.params, first.x
    second, other, device = Layer(xp, dtype="float16", seed=1), filled(layer, xp), device_of(xp)
    made, plain = layer.attn.schedule(params, cache), []
    for past, table in (((5, 9), PAGE_TABLE), ((6, 10), PAGE_TABLE), ((7, 11), PAGE_TABLE[::-1]), ((0, 3), PAGE_TABLE),
                        ((1, 4), PAGE_TABLE), ((8, 2), PAGE_TABLE[::-1])):
        rows, fresh = layer.inputs(2, 1), new_params(past, table=table)
        for array, values in ((x, rows), (params.get_cache_seqlens(device), fresh.cache_seqlens),
                              (params.get_cache_seqlens_after(device), fresh.cache_seqlens_after),
                              (params.get_block_index(device), table)):
            put(array, values)
        refill(cache, xp), refill(other, xp)
        layer.attn.schedule(params, cache, out=made)
        for n, one in enumerate((layer, second)):
            first.plain.clear()
            one.attn.forward(x, params, cache, n, **layer.tables, schedule=made)
            plain.append(len(first.plain))
        eager = xp.array(rows)
        for n, one in enumerate((layer, second)):
            one.attn.forward(eager, fresh, other, n, **layer.tables)
        layer.check(x, xp.numpy(eager).astype(np.float64), 0.5)
        for mine, pool in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
            layer.check(mine, xp.numpy(pool).astype(np.float64), 0.5, what="cache")
    assert plain[1::2][-2:] == [0, 0]
    assert plain[0::2][-2:] == ([1, 1] if xp.name == "numpy" else [0, 0])


def test_contents_are_checked_where_they_are_read(monkeypatch):
    """A remembered step refuses what a new one refuses, and writes nothing."""
    step = Step(NumpyArrays(), monkeypatch)
    layer, params, cache = step.layer, step.params, step.cache
    made = step.options["schedule"] = layer.attn.schedule(params, cache)
    cos, sin = layer.cos[:11], layer.sin[:11]   # rows for these lengths and one more
    step.tables = {"cos": cos, "sin": sin}
    step.remembered()
    lengths, after, table = params.get_cache_seqlens(), params.get_cache_seqlens_after(), params.get_block_index()

    def set_lengths(past, planned=True):
        lengths[:] = past
        after[:] = lengths + 1
        if planned:
            layer.attn.schedule(params, cache, out=made)

    def change(name):
        if name == "page out of range":
            table[0, 1] = 10
        elif name == "negative page":
            table[1, 0] = -1
        elif name == "one page twice":
            table[1, 2] = table[0, 1]
            set_lengths([5, 9])
        elif name == "past the table":
            set_lengths([5, 20])
        elif name == "past the tables of RoPE":
            set_lengths([5, 11])
        elif name == "another schedule":
            set_lengths([4, 8], planned=False)
        elif name == "lengths that disagree":
            lengths[0] = 4
        elif name == "lengths after that disagree":
            after[0] = 4
        elif name == "a schedule of other lengths":
            cupyattn.schedule(np.int32([3, 4]), num_heads=4, num_kv_heads=2, head_dim=32, out=made)

    for name, message in (("page out of range", "block_table must"), ("negative page", "block_table must"),
                          ("one page twice", "places must differ"), ("past the table", "positions must|cache_seqlens"),
                          ("past the tables of RoPE", "positions must be in"), ("another schedule", "schedule must be"),
                          ("lengths that disagree", r"cache_seqlens_after = cache_seqlens \+ 1"),
                          ("lengths after that disagree", "schedule must be|cache_seqlens_after = cache_seqlens"),
                          ("a schedule of other lengths", "schedule must be")):
        change(name)
        before = [array.copy() for array in (*cache.k, *cache.v)]
        with pytest.raises(ValueError, match=message):
            step()
        for pool, untouched in zip((*cache.k, *cache.v), before, strict=True):
            assert_same_bits(pool, untouched)
        table[...] = PAGE_TABLE
        set_lengths([5, 9])
        assert not step()   # what is there now has been checked before


def test_what_one_layer_has_checked_another_may_not_have(monkeypatch):
    """A page that only the window hides, a row of the tables that only a layer without RoPE does not read."""
    xp = NumpyArrays()
    step = Step(xp, monkeypatch)
    narrow = Layer(xp, dtype="float16", seed=1)
    still = Layer(xp, dtype="float16", seed=2, rope_style="none")
    params, cache, tables = step.params, step.cache, {"cos": step.layer.cos[:11], "sin": step.layer.sin[:11]}
    plans = [{}]

    def layers():
        yield lambda: narrow.attn.forward(step.x, params, cache, 0, **tables, window_size=2)
        yield lambda: still.attn.forward(step.x, params, cache, 0, **plans[-1])
        yield lambda: step.layer.attn.forward(step.x, params, cache, 1, **tables, **plans[-1])

    for _ in range(6):
        for call in layers():
            call()
    table = params.get_block_index()
    table[1, 0] = -1
    for n, call in enumerate(layers()):
        if n == 0:
            call()
        else:
            with pytest.raises(ValueError, match="block_table must hold page ids"):
                call()
    table[...] = PAGE_TABLE
    plans.append({"schedule": step.layer.attn.schedule(params, cache)})
    for _ in range(6):
        for call in layers():
            call()
    params.get_cache_seqlens()[:] = [5, 11]
    params.get_cache_seqlens_after()[:] = [6, 12]
    step.layer.attn.schedule(params, cache, out=plans[-1]["schedule"])
    _, without, turned = layers()
    without()
    short = Layer(xp, dtype="float16", rope_style="none", max_seq_len=11)
    with pytest.raises(ValueError, match="params must have at most max_seq_len 11 tokens, got 12"):
        short.attn.forward(step.x, params, cache, 0, **plans[-1])
    with pytest.raises(ValueError, match=r"positions must be in \[-1, 11\)"):
        turned()


def test_two_schedules(monkeypatch):
    """What one of them says is not what the other says."""
    step = Step(NumpyArrays(), monkeypatch)
    rows, want = step.x.copy(), None
    one, other = (step.attn.schedule(step.params, step.cache) for _ in range(2))
    for n in range(12):
        step.options["schedule"] = one if n < 6 else other
        if n == 6:
            cupyattn.schedule(np.int32([0, 0]), num_heads=4, num_kv_heads=2, head_dim=32, out=one)
        step.x[...] = rows
        step()
        want = step.x.copy() if want is None else want
        assert_same_bits(step.x, want)


def test_params_filled_again(xp, monkeypatch):
    """`PagedParams.fill` is what a caller does to the arrays; without a Schedule of the new lengths it is refused."""
    step, device = Step(xp, monkeypatch).remembered(), device_of(xp)
    step.params.fill(PAGE_TABLE[::-1], [6, 2])
    fresh = new_params((6, 2), table=PAGE_TABLE[::-1])
    for name in ("block_index", "cache_seqlens", "cache_seqlens_after"):
        held, want = getattr(step.params, name), getattr(fresh, name)
        assert_same_bits(held, want)
        assert_same_bits(xp.numpy(getattr(step.params, f"get_{name}")(device)), want)
    with pytest.raises(ValueError, match="schedule must be given for lengths of params that were changed in place"):
        step()
    step.options["schedule"] = step.attn.schedule(step.params, step.cache)
    rows = xp.numpy(step.x).copy()
    for _ in range(6):
        put(step.x, rows)
        step()
    want = xp.array(rows)
    step.attn.forward(want, fresh, step.cache, 0, **step.tables)
    step.layer.check(step.x, xp.numpy(want).astype(np.float64), 0.5)
    assert not step()


CHANGES = {
    "x": lambda s: setattr(s, "x", s.xp.array(s.xp.numpy(s.x))),
    "x as rows": lambda s: setattr(s, "x", s.x.reshape(2, 64)),
    "params": lambda s: setattr(s, "params", new_params()),
    "cache": lambda s: setattr(s, "cache", filled(s.layer, s.xp)),
    "a pool of the cache": lambda s: s.cache.k.__setitem__(0, s.cache.k[0].copy()),
    "layer": lambda s: setattr(s, "number", 1),
    "layer that is no integer": lambda s: setattr(s, "number", False),
    "sin": lambda s: s.tables.update(sin=s.tables["sin"].copy()),
    "cos": lambda s: s.tables.update(cos=s.tables["cos"].copy()),
    "softmax_scale": lambda s: s.options.update(softmax_scale=0.5),
    "window_size": lambda s: s.options.update(window_size=3),
    "softcap": lambda s: s.options.update(softcap=2.0),
    "invariant": lambda s: s.options.update(invariant=True),
    "sinks": lambda s: s.options.update(sinks=s.xp.array(np.ones(4, np.float32))),
    "out": lambda s: s.options.update(out=s.xp.array(s.xp.numpy(s.x))),
    "schedule": lambda s: s.options.update(schedule=s.attn.schedule(s.params, s.cache)),
    "loras": lambda s: s.options.update(loras=("a",)),
    "sequence_loras": lambda s: s.options.update(sequence_loras=("a", None)),
    "set_loras": lambda s: s.attn.set_loras({"a": {}}),
    "other tables": lambda s: setattr(s, "params", new_params(alt_rope_embed=(s.layer.sin[::-1], s.layer.cos[::-1]))),
    "blocks": lambda s: s.params.block_diag_layers.add(1),
    "a gain of the layer": lambda s: setattr(s.attn, "layernorm", 2 * s.attn.layernorm),
    "an option of the layer": lambda s: setattr(s.attn, "has_residual", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_a_call_a_new_one(monkeypatch, name):
    step = Step(NumpyArrays(), monkeypatch)
    step.attn.set_loras({"a": {}})
    step.remembered()
    CHANGES[name](step)
    if name == "layer that is no integer":
        with pytest.raises(TypeError, match="layer must be an integer"):
            step()
        return
    target = step.options.get("out", step.x)
    rows = target.copy()
    assert step()
    found = target.copy()
    for _ in range(5):   # remembered in its turn, where such calls are
        target[...] = rows
        step()
        assert_same_bits(target, found)
    target[...] = rows
    with runtime.profiling():   # which is a call with all of its Python
        assert step()
    assert_same_bits(target, found)


def test_other_scales_of_a_quantized_pool(monkeypatch):
    """Parts of a QuantizedKV may be other arrays from one call to the next."""
    step = Step(NumpyArrays(), monkeypatch)
    scales = [np.full(1, 0.05, np.float32)] * 2
    step.cache = cupyattn.PagedCache(2, 10, 4, 2, 32, k_format="int8_symmetric", scales=(scales, scales))
    rows = step.remembered().x.copy()
    assert not step()
    step.cache.v[0].scale = np.full(1, 0.1, np.float32)
    other = cupyattn.PagedCache(2, 10, 4, 2, 32, k_format="int8_symmetric", scales=(scales, [2 * scales[0]] * 2))
    other.k[0].codes[...], other.v[0].codes[...] = step.cache.k[0].codes, step.cache.v[0].codes
    step.x[...], fresh = rows, rows.copy()
    assert step()
    step.attn.forward(fresh, new_params(), other, 0, **step.tables)
    assert_same_bits(step.x, fresh)


def test_a_copy_of_a_layer_is_another_layer(monkeypatch):
    """A copy that gets other adapters, or weights, has no launches of the one it was made of."""
    rng, step = np.random.default_rng(0), Step(NumpyArrays(), monkeypatch)
    made = {name: {"q": cupyattn.LoRA(*(rng.standard_normal(shape).astype(np.float16) / 4
                                        for shape in ((4, 64), (128, 4))))} for name in "ab"}
    step.attn.set_loras({"x": made["a"]})
    step.options["loras"], rows = ("x",), step.x.copy()
    step.remembered()
    one, other = step.attn, copy.copy(step.attn)
    other.set_loras({"x": made["b"]})
    found = {}
    for layer in (one, other) * 6:
        step.attn = layer
        step.x[...] = rows
        step()
        assert_same_bits(step.x, found.setdefault(layer, step.x.copy()))
    assert (found[one] != found[other]).any()
    step.attn = one
    assert not step()


def test_names_that_can_be_read_once(monkeypatch):
    """Adapters may be named by an iterator: it is read once, also by a call that might be a repeated one."""
    layer, rng = Layer(NumpyArrays(), dtype="float16"), np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float16) / 4 for shape in ((4, 64), (128, 4)))
    layer.attn.set_loras({"a": {"q": cupyattn.LoRA(a, b)}})
    step, x = Step(NumpyArrays(), monkeypatch, layer=layer), None
    rows = step.x.copy()
    for n in range(6):
        step.x[...], step.options["loras"] = rows, (name for name in "a")
        step()
        x = step.x.copy() if n == 0 else x
        assert_same_bits(step.x, x)
    step.x[...], step.options["loras"] = rows, ()
    step()
    assert (step.x != x).any()


def test_steps_that_are_watched(xp, monkeypatch, caplog):
    """Recordings, profiles, captures, checks and logs see the step itself."""
    step = Step(xp, monkeypatch).remembered()
    with runtime.recording() as wanted:
        assert step()
    assert len(wanted) >= 4 and not step()
    with runtime.profiling() as profile:
        assert step()
    assert len(profile.rows()) >= 3 and not step()
    step.options["schedule"] = step.attn.schedule(step.params, step.cache)
    step.remembered()
    step.plain.clear()
    assert len(capture(step, xp=xp.module).launches) == 5 and len(step.plain) == 3
    assert not step()
    monkeypatch.setenv("CUPYATTN_CHECK", "1")
    assert step() and step()
    monkeypatch.delenv("CUPYATTN_CHECK")
    assert not step()
    monkeypatch.setenv("CUPYATTN_DEBUG", "2")
    caplog.clear()
    with caplog.at_level("DEBUG", "cupyattn"):
        assert step()
    assert [record.message.split("(")[0] for record in caplog.records].count("launch Plan") >= 4
    monkeypatch.delenv("CUPYATTN_DEBUG")
    assert not step()


def test_other_surroundings(monkeypatch):
    """Settings of the executor and threads; on a GPU streams, and a stream that captures."""
    from standin import install

    step = Step(NumpyArrays(), monkeypatch).remembered()
    with cpu.settings(workers=1):
        assert step() and not step.remembered()()
    assert not step()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(step).result() and not pool.submit(lambda: step.remembered()()).result()
    assert not step()

    with install() as xp:
        step = Step(xp, monkeypatch)
        made = step.options["schedule"] = step.attn.schedule(step.params, step.cache)
        step.remembered()
        stream = xp.module.cuda.Stream(non_blocking=True)
        with stream:
            assert step() and not step.remembered()()
            stream.begin_capture()
            step.attn.schedule(step.params, step.cache, out=made)
            assert step()
            stream.end_capture()
            step.options["schedule"] = None
            step.remembered()
            stream.begin_capture()
            with pytest.raises(cupyattn.CaptureError, match="schedule must be given"):
                step()
            stream.end_capture()
            assert not step()


def test_more_scratch(monkeypatch):
    """A larger step of another layer takes a larger workspace; the remembered one goes on with its own."""
    step = Step(NumpyArrays(), monkeypatch).remembered()
    rows = step.layer.inputs(2, 1)
    step.x[...] = rows
    assert not step()
    want, large = step.x.copy(), Layer(NumpyArrays(), hidden=512, heads=16, kv_heads=16, dtype="float16")
    large.attn.forward(large.inputs(2, 60), cupyattn.Params(2, 60, 0), **large.tables)
    step.x[...] = rows
    step()
    assert_same_bits(step.x, want)


def test_a_step_that_is_refused_or_fails(monkeypatch):
    step = Step(NumpyArrays(), monkeypatch).remembered()
    step.x.flags.writeable = False
    with pytest.raises(ValueError, match="x must be writeable"):
        step()
    step.x.flags.writeable = True
    assert not step()
    for name, value in (("window_size", []), ("softmax_scale", "1"), ("sinks", 3), ("schedule", 3), ("loras", "a"),
                        ("loras", [[]]), ("out", 3)):
        step.options[name] = value
        with pytest.raises((TypeError, ValueError), match=f"QAttn: {name} must"):
            step.attn.forward(step.x, step.params, step.cache, 0, **step.tables, **step.options)
        del step.options[name]
    for layer in (2, -1, "0"):
        with pytest.raises((TypeError, ValueError), match="QAttn: layer must"):
            step.attn.forward(step.x, step.params, step.cache, layer, **step.tables)
    with pytest.raises(TypeError, match="QAttn: x must be"):
        step.attn.forward(step.x.tolist(), step.params, step.cache, 0, **step.tables)
    assert not step()
    step.attn.close()
    with pytest.raises(ValueError, match=r"must not be used after close\(\)"):
        step()


def test_what_is_remembered_is_let_go(monkeypatch):
    """With the PagedParams, with the cache, with the layer, and with close(): none of them needs the collector."""
    gc.collect()
    gc.disable()
    try:
        for case in ("params", "cache", "layer", "close"):
            step = Step(NumpyArrays(), monkeypatch).remembered()
            kept = [weakref.ref(array) for array in (step.x, step.cache.k[0], step.attn.o_proj, step.params)]
            assert all(ref() is not None for ref in kept)
            x, cache, attn, params = step.x, step.cache, step.attn, step.params
            del step
            if case == "params":
                params = x = None
            elif case == "cache":
                cache = x = None
            elif case == "layer":
                attn = cache = x = None
            else:
                attn.close()
                cache = x = None
            gone = {"params": [0, 3], "cache": [0, 1], "layer": [0, 1, 2], "close": [0, 1, 2]}[case]
            assert [n for n, ref in enumerate(kept) if ref() is None] == gone, case
            del x, cache, attn, params
    finally:
        gc.enable()


def test_tables_that_were_copied_keep_their_place(monkeypatch):
    """Those of ExLlamaV2's form are not the ones a launch reads; others may not come to lie where they are."""
    step = Step(NumpyArrays(), monkeypatch)
    step.tables = {name: np.concatenate([table, table], axis=1)[None, None] for name, table in step.tables.items()}
    step.remembered()
    given = [weakref.ref(table) for table in step.tables.values()]
    step.tables = None
    converted_tables._tables.clear()
    assert all(table() is not None for table in given)
    step.params = None
    assert all(table() is None for table in given)


def test_only_a_few_inputs_are_kept(monkeypatch):
    """A caller that makes a new x for each call does not find all of them again in memory."""
    step = Step(NumpyArrays(), monkeypatch)
    alive = []
    for _ in range(40):
        step.x = step.layer.inputs(2, 1)
        alive.append(weakref.ref(step.x))
        step()
    step.x = None
    assert sum(ref() is not None for ref in alive) <= 4


def test_threads_share_params(monkeypatch):
    """Several threads with one PagedParams, each with a cache and an x of its own."""
    layer = Layer(NumpyArrays(), dtype="float16")
    params, inputs = new_params(), [layer.inputs(2, 1) for _ in range(4)]

    def work(rows):
        cache, x, found = filled(layer, NumpyArrays()), rows.copy(), []
        for _ in range(30):
            x[...] = rows
            layer.attn.forward(x, params, cache, 0, **layer.tables)
            found.append(x.copy())
        return found

    check_in_threads(work, inputs)


def test_threads_and_streams_share_no_schedule():
    """Launches count what they have done in a Schedule, and those of two threads or two streams overlap."""
    from standin import install

    layer, params = Layer(NumpyArrays(), dtype="float16"), new_params()
    cache = filled(layer, NumpyArrays())

    def step():
        layer.attn.forward(layer.inputs(2, 1), params, cache, 0, **layer.tables)

    step()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(step).result()
    step()
    made, = steps_of(params, cache, np)
    assert len({id(found.decode.counters) for found in made.schedules.values()}) == len(made.schedules) == 2
    with install() as xp:
        layer, params = Layer(xp, dtype="float16"), new_params()
        cache, x = filled(layer, xp), xp.array(layer.inputs(2, 1))
        for stream in (xp.module.cuda.Stream.null, xp.module.cuda.Stream(non_blocking=True)) * 2:
            with stream:
                layer.attn.forward(x, params, cache, 0, **layer.tables)
        made, = steps_of(params, cache, xp.module)
        assert len(made.schedules) == 2


def test_what_python_costs():
    """The bench's rows; its times are not judged, but a step called again must be the cheaper one."""
    costs, launches = bench_q_attn.python_cost(np, np.array, rounds=10)
    assert len(costs) == 6 and len(launches) == 5
    assert costs["called again"] < costs["with all of its Python"]
