# SPDX-License-Identifier: Apache-2.0
"""PagedAttn: prompts, decodes and steps of both over a paged cache, by every method, against float64."""

import enum
import threading
import types

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, dtype_of
from hypothesis import given, settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import (
    AttentionImpl,
    AttentionMetadata,
    AttentionOutput,
    AttentionRegistry,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    PagedAttn,
)
from cupyattn.errors import CaptureError
from cupyattn.graphs import capture

PAGES, PS, H, KV, D = 20, 4, 8, 2, 16
BOUNDS = {"float32": (2e-6, 0.0), "float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8)}
BATCH = (1, 4, 0, 9, 5)   # lengths of the decoding sequences; 0 is a row of padding
SINKS = [0.5, -1.0, 2.0, 0.0, 1.0, -9.0, 3.0, -0.5]
DTYPES = ("float32", "float16", "bfloat16")
NUMPY = types.SimpleNamespace(name="numpy", array=np.array, numpy=np.array, module=np)


def rounded(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype_of(dtype))


class Step:
    """A step over pages that hold `junk` wherever no token is: a prompt's chunk, then decodes; views of it by kind.

    `length` of the prompt with the chunk, `start` and `chunk` rows of it; None for no prompt. `decodes`: lengths of the
    sequences with the new token, 0 for padding; None for no decodes.
    """

    def __init__(self, xp, dtype="float32", length=6, start=0, chunk=8, decodes=BATCH, *, junk=np.nan, heads=H,
                 kv_heads=KV, dim=D, page_size=PS, kv_dtype=None, columns=0, seed=0, quantizer=None):
        self.xp, self.length, self.start, self.chunk = xp, length, start, 0 if length is None else chunk
        self.decodes = () if decodes is None else decodes
        rng = np.random.default_rng(seed)
        self.tokens = self.chunk + len(self.decodes)
        self.q = rounded(rng, (self.tokens, heads, dim), dtype)
        self.real = 0 if length is None else max(0, min(length - start, chunk))
        self.q[self.real:self.chunk] = np.nan   # padding
        lengths = ([] if length is None else [length]) + list(self.decodes)
        kv_dtype = kv_dtype or dtype
        self.history = [rounded(rng, (2, n, kv_heads, dim), kv_dtype) for n in lengths]   # K and V of each sequence
        self.k, self.v = (rounded(rng, (self.tokens, kv_heads, dim), kv_dtype) for _ in "kv")
        for new, side in ((self.k, 0), (self.v, 1)):   # the last token of each sequence, the tokens of the chunk
            new[:self.real] = self.history[0][side, start:start + self.real] if self.real else 0
            new[self.real:self.chunk] = np.nan
            for b, n in enumerate(self.decodes):
                new[self.chunk + b] = self.history[b + (length is not None)][side, n - 1] if n else np.nan
        needed = [-(-n // page_size) for n in lengths]
        ids = iter(rng.permutation(np.arange(1, max(PAGES, sum(needed) + 1))))
        self.tables = [[int(next(ids)) for _ in range(n)] for n in needed]
        pages = max(PAGES, sum(needed) + 1)
        sizes = PagedAttentionCacheMetaData(8, 1, pages, 4, 64, page_size, kv_heads, dim, 0.5)
        self.view = PagedAttentionCacheView.init(None, kv_dtype, sizes, 0, None, quantizer, xp=xp.module)
        if quantizer is None:
            self.view.key_pages.fill(junk)
            self.view.value_pages.fill(junk)
        width = max([len(t) for t in self.tables[length is not None:]], default=0) + columns
        table = np.zeros((len(self.decodes), width), np.int32)   # page 0 where there are no tokens
        for b, row in enumerate(self.tables[length is not None:]):
            table[b, :len(row)] = row
        absent = PagedAttentionMetadata.init_empty(xp=xp.module)
        self.metadata = PagedAttentionMetadata(*[getattr(absent, f) for f in absent.to_dict()])
        if length is not None:
            self.metadata.prefill_length = self.ints(length)
            self.metadata.prefill_position = self.ints(np.arange(start, start + chunk))
            self.metadata.prefill_page_table = self.ints(self.tables[0] + [0] * columns)
        if decodes is not None:
            self.metadata.decodes_position = self.ints(np.int32(self.decodes) - 1)
            self.metadata.decodes_page_table = self.ints(table)

    def ints(self, values):
        return self.xp.array(np.int32(values))

    def write(self, new=True):
        """Store the tokens of all sequences, those of this step as well if `new`."""
        for i, ((k, v), table) in enumerate(zip(self.history, self.tables, strict=True)):
            prompt = i == 0 and self.length is not None
            length = len(k) if new else min(self.start, len(k)) if prompt else max(0, len(k) - 1)
            if length:
                self.view.write_prefill_to_cache(
                    self.xp.array(k[:length]), self.xp.array(v[:length]), PagedAttentionMetadata.prefill(
                        length, self.ints(np.arange(length)), self.ints(table)))
        return self

    def run(self, method="forward_tpu", scale=None, **options):
        """Result of a method as float64."""
        impl = PagedAttn(AttentionMetadata(softmax_scale=scale))
        q, k, v = (self.xp.array(a) for a in (self.q, self.k, self.v))
        return getattr(impl, method)(q, k, v, self.view, self.metadata, **options)

    def out(self, method="forward_tpu", **options):
        return self.xp.numpy(self.run(method, **options).attention_outputs)

    def truth(self, scale=None, window=0, softcap=0.0, sinks=None, unseen=()):
        """Outputs and lse of every row in float64; tokens (sequence, t) in `unseen` are left out."""
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], -np.inf)
        rows = [(r, 0, self.start + r) for r in range(self.real)]
        rows += [(self.chunk + b, b + (self.length is not None), n - 1) for b, n in enumerate(self.decodes) if n]
        heads, dim = self.q.shape[1:]
        for row, sequence, at in rows:
            k, v = self.history[sequence].astype(np.float64)
            see = [t for t in range(max(0, at - window + 1) if window else 0, at + 1) if (sequence, t) not in unseen]
            for h in range(heads):
                g = h // (heads // k.shape[1])
                scores = k[see, g] @ self.q[row, h].astype(np.float64) * (dim**-0.5 if scale is None else scale)
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                if not see:
                    continue
                total = np.exp(scores).sum()
                lse[row, h] = np.log(total)
                weights = np.exp(scores) / (total + (0 if sinks is None else np.exp(np.float64(sinks[h]))))
                out[row, h] = weights @ v[see, g]
        return out, lse

    def check(self, out, bound=None, **options):
        assert out.dtype == self.q.dtype
        want, _ = self.truth(**options)
        assert_close(out, want, *BOUNDS[bound or out.dtype.name])
        padding = [*range(self.real, self.chunk), *(self.chunk + b for b, n in enumerate(self.decodes) if n == 0)]
        assert_same_bits(out[padding], np.zeros_like(out[padding]))


MODES = {"prefill": {"decodes": None}, "later chunk": {"decodes": None, "length": 14, "start": 8},
         "decode": {"length": None}, "mixed": {}, "mixed later chunk": {"length": 14, "start": 8}}
modes = pytest.mark.parametrize("mode", MODES)


# ---- the classes around it -------------------------------------------------------------------------------

def test_names_and_registry():
    metadata = AttentionMetadata("bfloat16", softmax_scale=0.5)
    impl = AttentionRegistry.create("paged_attention", metadata)
    assert type(impl) is PagedAttn and isinstance(impl, AttentionImpl)
    assert impl.get_impl_name() == PagedAttn.get_impl_name() == "paged_attention"
    assert impl.get_impl_metadata() is metadata is impl.metadata
    assert AttentionRegistry.get("paged_attention") is PagedAttn
    assert AttentionRegistry.list_implementations() == ["paged_attention"]
    with pytest.raises(ValueError, match="name must be one of paged_attention, got 'flash'"):
        AttentionRegistry.create("flash", metadata)


def test_registering_others(monkeypatch, caplog):
    monkeypatch.setattr(AttentionRegistry, "_registry", {})

    class Mine(AttentionImpl):
        @classmethod
        def get_impl_name(cls):
            return "mine", "also_mine"

        def get_impl_metadata(self):
            return self.metadata

        def forward_cpu(self, x, *, more):
            return x + more

    assert AttentionRegistry.register(Mine) is Mine and AttentionRegistry.register(Mine) is Mine
    assert AttentionRegistry.list_implementations() == ["mine", "also_mine"] and not caplog.records
    impl = AttentionRegistry.create("also_mine", AttentionMetadata(backend="cpu"))
    assert impl(1, more=2) == 3
    for method in ("native", "gpu", "cuda", "rocm", "tpu"):
        with pytest.raises(NotImplementedError, match=f"Mine.forward_{method}: .* there is forward_cpu$"):
            getattr(impl, f"forward_{method}")()
    with pytest.raises(TypeError, match="abstract"):
        AttentionImpl(AttentionMetadata())
    AttentionRegistry.register(type("Other", (Mine,), {}))
    assert AttentionRegistry.get("mine").__name__ == "Other" and "mine is now Other, was Mine" in caplog.text


def test_metadata():
    fields = ["runtime_dtype", "runtime_softmax_dtype", "sequence_axis_name", "mesh", "platform", "backend",
              "partition_axis", "base_config", "scan_ring_attention", "softmax_scale", "dropout_prob", "blocksize_q",
              "blocksize_k", "blocksize_b"]
    made = AttentionMetadata("float16")
    assert list(made.to_dict()) == fields
    assert list(made.to_dict().values()) == ["float16", None, "sp", None, None, None, None, None, True, None, 0.0, 512,
                                             1024, 1]
    assert AttentionMetadata.from_json(made.to_json()) == made == AttentionMetadata(runtime_dtype="float16")
    assert made.replace(softmax_scale=2.0).softmax_scale == 2.0 and made.replace() is made
    config = types.SimpleNamespace(attn_dtype="bfloat16", attn_softmax_dtype="float32", softmax_scale=0.25, mesh="mesh",
                                   blocksize_q=64, blocksize_b=3, backend="gpu", sequence_axis_name="not read",
                                   scan_attention_layers=False, dropout_prob=0.5)
    made = AttentionMetadata(base_config=config, blocksize_k=32)
    assert made.blocksize_b == 3
    assert (made.runtime_dtype, made.softmax_scale, made.mesh, made.blocksize_q, made.blocksize_k, made.backend,
            made.sequence_axis_name, made.dropout_prob) == ("bfloat16", 0.25, "mesh", 64, 32, "gpu", "sp", 0.0)
    made = AttentionMetadata.from_config(config, 0.5, 0.125)
    assert (made.runtime_dtype, made.runtime_softmax_dtype, made.softmax_scale, made.dropout_prob, made.base_config,
            made.scan_ring_attention, made.sequence_axis_name) == (
        "bfloat16", "float32", 0.5, 0.125, config, False, "not read")
    assert AttentionMetadata.from_config(types.SimpleNamespace(), None).blocksize_b == 1


def test_output():
    out = np.ones((1, 2, 3), np.float32)
    made = AttentionOutput(attention_outputs=out)
    assert made.attention_weights is made.lse is None and AttentionOutput(None, out) == made
    assert AttentionOutput.from_json(made.to_json()) == made


# ---- modes -----------------------------------------------------------------------------------------------

@modes
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes(xp, mode, dtype):
    """What the caller wrote is attended to; a step of both writes on its own. Pages without tokens hold NaN."""
    step = Step(xp, dtype, **MODES[mode])
    step.write(new="mixed" not in mode)
    step.check(step.out())


@modes
def test_every_method(mode):
    """The reference and the kernels; the reference is off by one rounding."""
    for dtype, worst in (("float32", 2.0**-24), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        found = {}
        for method in ("forward_native", "forward_cpu", "forward_tpu", "__call__"):
            step = Step(NUMPY, dtype, **MODES[mode]).write(new="mixed" not in mode)
            result = step.run(method)
            assert result.attention_weights is None and result.lse is None
            found[method] = result.attention_outputs
            step.check(found[method])
        assert_close(found["forward_native"], step.truth()[0], 1e-8, worst)
        assert_same_bits(found["forward_cpu"], found["forward_tpu"])
        assert_same_bits(found["forward_cpu"], found["__call__"])


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_methods_for_cupy(xp):
    step = Step(xp).write(new=False)
    want = step.out("forward_tpu")
    for method in ("forward_gpu", "forward_cuda", "__call__"):
        assert_same_bits(step.out(method), want)
    for method in ("forward_native", "forward_cpu"):
        with pytest.raises(TypeError, match=f"{method}: arrays must be NumPy, got CuPy; forward_gpu and forward_cuda"):
            step.run(method)
    assert isinstance(step.run().attention_outputs, xp.module.ndarray)


def test_methods_refuse_the_other_kind():
    step = Step(NUMPY).write(new=False)
    for method in ("forward_gpu", "forward_cuda"):
        with pytest.raises(TypeError, match=f"{method}: arrays must be CuPy, got NumPy; forward_cpu and forward_nat"):
            step.run(method)
    with pytest.raises(NotImplementedError, match="no kernels for AMD GPUs; there are forward_cuda and forward_gpu"):
        step.run("forward_rocm")


@modes
def test_a_step_of_both_writes(xp, mode):
    """A step of both stores its tokens, others store nothing unless told; padding is never stored."""
    step, full = Step(xp, **MODES[mode]).write(new=False), Step(xp, **MODES[mode]).write()
    before = step.view.copy()
    if "mixed" in mode:
        q, k, v = (xp.array(a) for a in (step.q, step.k, step.v))
        step.run(write_kv=False)
        assert step.view == before
        PagedAttn(AttentionMetadata()).forward_tpu(q, k, v, step.view, step.metadata)
    else:
        PagedAttn(AttentionMetadata()).forward_tpu(xp.array(step.q), None, None, step.view, step.metadata)
        assert step.view == before
        step.check(step.out(write_kv=True))
    assert step.view == full.view


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_both_is_its_parts(xp, dtype):
    step = Step(xp, dtype).write()
    whole = step.out(invariant=True)
    q, chunk = xp.array(step.q), step.chunk
    impl, metadata = PagedAttn(AttentionMetadata()), step.metadata
    prompt = PagedAttentionMetadata.prefill(metadata.prefill_length, metadata.prefill_position,
                                            metadata.prefill_page_table)
    decode = PagedAttentionMetadata.decode(metadata.decodes_position, metadata.decodes_page_table)
    for rows, part in ((slice(0, chunk), prompt), (slice(chunk, None), decode)):
        out = impl.forward_tpu(q[rows], None, None, step.view, part, invariant=True)
        assert_same_bits(xp.numpy(out.attention_outputs), whole[rows])


def test_a_refused_step_of_both_stores_nothing():
    """One launch stores its tokens, so those of the chunk are not there when those of a sequence have no place."""
    step = Step(NUMPY, decodes=(3, 3)).write(new=False)
    step.metadata.decodes_page_table[1] = step.metadata.decodes_page_table[0]
    before = step.view.copy()
    with pytest.raises(ValueError, match="places must differ from token to token"):
        step.run()
    assert step.view == before


# ---- the layers of a step --------------------------------------------------------------------------------

def layers_of(step, number=3):
    """Views of several layers that hold the same."""
    return [step.view.copy() for _ in range(number)]


def with_tokens(step, view):
    """`run` for another layer."""
    step.view = view
    return step


@modes
def test_layers_share_what_is_made_for_a_step(xp, mode):
    """The tables, lengths and work lists of the first layer are those of all: the others launch what they must."""
    step = Step(xp, **MODES[mode]).write(new="mixed" not in mode)
    want, views = step.out(), layers_of(Step(xp, **MODES[mode]).write(new="mixed" not in mode))
    made, launches, allocations = [], [], []
    step.metadata = step.metadata.replace(prefill_length=step.metadata.prefill_length)
    for view in views:
        before = dict(getattr(xp, "events", {}))
        assert_same_bits(with_tokens(step, view).out(), want)
        made.append(step.metadata._step)
        if xp.name == "standin":
            launches.append(xp.events["launches"] - before.get("launches", 0))
            allocations.append(xp.events["allocations"] - before.get("allocations", 0))
    assert made[0] is made[1] is made[2] and len(made[0].schedules) == 1
    if xp.name == "standin":
        attend = 1 if mode == "decode" else 2                             # tiles of few rows, and of many
        assert launches[1:] == [attend + ("mixed" in mode)] * 2           # and one that stores
        assert launches[0] == launches[1] + 1                             # the work lists
        assert allocations[1:] == [4] * 2 < allocations[:1]               # q, k, v and the result


def test_layers_with_other_options_share_the_rest(xp):
    step = Step(xp, "float16").write(new=False)
    for view, window, invariant in zip(layers_of(step, 4), (0, 3, 3, 3), (False, False, False, True), strict=True):
        with_tokens(step, view).check(step.out(window_size=window, invariant=invariant), window=window)
        made = step.metadata._step
    assert len(made.schedules) == 3 and len(made.calls) == 4


def test_arrays_changed_in_place_are_another_step(xp):
    """Positions that move on between steps, whoever stores the tokens: the first layer that comes again sees them."""
    whole = Step(xp, length=None, decodes=(9, 6)).write(new=False)
    views = layers_of(whole)
    q, k, v = (xp.array(a) for a in (whole.q, whole.k, whole.v))
    impl, last = PagedAttn(AttentionMetadata()), np.int32([8, 5])
    metadata = PagedAttentionMetadata.decode(xp.array(last - 3), whole.metadata.decodes_page_table)
    for back in (3, 2, 1, 0):
        same = PagedAttentionMetadata.decode(xp.array(last - back), whole.metadata.decodes_page_table)
        for n, view in enumerate(views):
            other = view.copy()
            if n < 2:
                view.write_decodes_to_cache(k, v, metadata)
                other.write_decodes_to_cache(k, v, same)
            out = impl.forward_tpu(q, k, v, view, metadata, write_kv=n == 2).attention_outputs
            want = impl.forward_tpu(q, k, v, other, same.replace(decodes_position=xp.array(last - back)),
                                    write_kv=n == 2).attention_outputs
            assert_same_bits(xp.numpy(out), xp.numpy(want))
            assert view == other
        metadata.decodes_position[...] = xp.array(last - back + 1)


def test_what_another_layer_finds_changed():
    """A step may begin with a layer that had no part in the last one, e.g. of a draft model's target: it is checked."""
    step = Step(NUMPY, length=None, decodes=(9, 6)).write()
    views = layers_of(step)
    step.check(with_tokens(step, views[0]).out())
    positions, pages = step.metadata.decodes_position, step.metadata.decodes_page_table
    positions -= 2
    out = with_tokens(step, views[1]).out()
    step.metadata = PagedAttentionMetadata.decode(positions.copy(), pages.copy())
    assert_same_bits(out, step.out())
    step.metadata.decodes_page_table[0, 0] = 0
    with pytest.raises(ValueError, match="decodes_page_table must hold page ids from 1"):
        with_tokens(step, views[2]).run()


def test_other_arrays_are_another_step(xp):
    """Also between two layers; and so are pages of another size."""
    step = Step(xp, length=None, decodes=(3, 7)).write()
    first, second = layers_of(step, 2)
    step.check(with_tokens(step, first).out())
    made = step.metadata._step
    step.metadata.decodes_position = xp.array(np.int32([2, -1]))
    out = with_tokens(step, second).out()
    assert step.metadata._step is not made and not out[1].any() and out[0].any()
    made = step.metadata._step
    step.metadata.decodes_position += 0   # assigns the field, which may not be the same
    assert step.metadata._step is None
    with_tokens(step, first.copy()).run()
    made, other = step.metadata._step, Step(xp, length=None, decodes=(3, 7), page_size=8)
    other.metadata = step.metadata
    other.run(write_kv=False)
    assert step.metadata._step is not made


def test_another_thread_makes_its_own():
    """Ranks that are threads attend at the same time: one's work lists are not the other's."""
    step = Step(NUMPY, length=None, decodes=(40, 7)).write()
    views, outs, both = layers_of(step, 2), {}, threading.Barrier(2)

    def rank(n):
        for _ in range(20):
            outs[n] = PagedAttn(AttentionMetadata()).forward_cpu(step.q, None, None, views[n], step.metadata)
            both.wait()

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs.values():
        step.check(out.attention_outputs)
    with_tokens(step, views[0]).run()
    last = step.metadata._step
    alone = threading.Thread(target=with_tokens(step, views[1]).run)
    alone.start()
    alone.join()
    assert step.metadata._step is not last


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_another_stream_or_a_graph_makes_its_own(xp):
    step = Step(xp, length=None, decodes=(3, 7)).write()
    views, q, made = layers_of(step, 2), xp.array(step.q), []
    impl = PagedAttn(AttentionMetadata())
    schedule = impl.schedule(q, step.view, step.metadata)

    def layers():
        for view in views:
            impl.forward_tpu(q, None, None, view, step.metadata, schedule=schedule)
            made.append(step.metadata._step)

    first = step.metadata._step
    layers()
    graph = capture(layers, xp=xp.module, warmups=1)
    assert made[0] is made[1] is first                                # that of the schedule
    assert made[2] is made[3] is not made[4] and made[4] is made[5]   # of the warm-up, and of the replays
    with pytest.raises(ValueError, match="forward_tpu: schedule must be given while a CUDA graph is captured"):
        capture(lambda: impl.forward_tpu(q, None, None, views[0], step.metadata), xp=xp.module)
    assert len(set(made)) == 3 and [each.is_capturing for each in made] == [False] * 4 + [True] * 2
    graph.close()


def test_pages_in_two_formats_need_no_schedule(xp):
    """Tensor cores do not take values of another type than the queries', a schedule for keys in int8 would."""
    step = Step(xp, "float16", length=None, decodes=(3, 7), quantizer="int8")
    values = Step(xp, "float16", length=None, decodes=(3, 7), kv_dtype="bfloat16").view.value_pages
    step.view = step.view.replace(value_pages=values)
    out = step.write().out()
    assert np.abs(out - step.truth()[0]).max() < 0.05 and not step.metadata._step.schedules


def test_unaligned_pages_need_no_schedule(xp):
    """What a schedule is not made for has work lists of its own in every layer."""
    step = Step(xp, "float16", length=None, decodes=(3, 7))
    flat = [xp.array(np.zeros(KV * PAGES * PS * D + 1, np.float16))[1:] for _ in "kv"]
    step.view = PagedAttentionCacheView(step.view.metadata, 0, *(a.reshape(KV, PAGES, PS, D) for a in flat))
    step.check(step.write().out())
    assert not step.metadata._step.schedules


# ---- calls with an axis more -----------------------------------------------------------------------------

@modes
@pytest.mark.parametrize("backend", [None, "tpu", "own"])
def test_call(xp, mode, backend):
    """A prefill has its axis in front, decodes and steps of both behind the tokens; the result has it again."""
    step = Step(xp, **MODES[mode]).write(new="mixed" not in mode)
    axis = 1 if step.decodes else 0
    if backend == "own":
        backend = enum.Enum("Backends", {"CPU": "cpu", "GPU": "gpu"})["CPU" if xp.name == "numpy" else "GPU"]
    impl = PagedAttn(AttentionMetadata(backend=backend))
    rows = [xp.array(np.expand_dims(a, axis)) for a in (step.q, step.k, step.v)]
    result = impl(*rows, step.view, step.metadata, return_lse=True, no_such_option=3)
    assert result.attention_outputs.shape == rows[0].shape and result.lse.shape == rows[0].shape[:-1]
    assert_same_bits(xp.numpy(result.attention_outputs).squeeze(axis), step.out())
    assert_close(xp.numpy(result.lse).squeeze(axis), step.truth()[1], 2e-6, 2e-6)
    wrong = rows[0].reshape(2, -1, H, D) if step.tokens % 2 == 0 else rows[0].reshape(1, -1, H, D)
    with pytest.raises(ValueError, match=r"q must be \[(1, chunk|tokens, 1), num_heads, head_dim\]"):
        impl(wrong, *rows[1:], step.view, step.metadata)


def test_unknown_backends():
    step = Step(NUMPY).write(new=False)
    for backend in ("rocm", "", 3):
        with pytest.raises(RuntimeError, match="PagedAttn: metadata.backend must be cpu, gpu, tpu or None, got "):
            PagedAttn(AttentionMetadata(backend=backend))(step.q, step.k, step.v, step.view, step.metadata)
    with pytest.raises(TypeError, match="forward_gpu: arrays must be CuPy"):
        PagedAttn(AttentionMetadata(backend="GPU"))(step.q, step.k, step.v, step.view, step.metadata)


# ---- chunks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunks", [(8, 8), (5, 3, 8), (1,) * 14, (3, 13), (14,)])
@pytest.mark.parametrize("decodes", [None, (3, 0)])
def test_chunks_equal_one_chunk(xp, chunks, decodes):
    """14 tokens, padded or not, aligned to pages or not: within the bounds, with `invariant` bit for bit."""
    whole = Step(xp, length=14, chunk=16, decodes=None).write()
    want, start = whole.out(invariant=True), 0
    whole.check(want)
    own = Step(xp, length=14, chunk=16, decodes=decodes)   # the same prompt, stored as it comes
    for chunk in chunks:
        length = min(14, start + chunk)
        step = Step(xp, length=length, start=start, chunk=chunk, decodes=decodes)
        step.view, step.tables = own.view, own.tables
        step.metadata.prefill_page_table = own.ints(own.tables[0])
        if decodes:
            step.metadata.decodes_page_table = own.metadata.decodes_page_table
        rows = slice(start, length)
        step.q[:length - start], step.q[length - start:chunk] = whole.q[rows], np.nan
        for new, history in ((step.k, whole.history[0][0]), (step.v, whole.history[0][1])):
            new[:length - start] = history[rows]
        out = step.out(invariant=True, write_kv=True)
        assert_same_bits(out[:length - start], want[rows])
        assert not out[length - start:chunk].any()
        out = step.out()
        assert_close(out[:length - start], whole.truth()[0][rows], 2e-6, 0)
        start += chunk


def test_rows_of_padding_only(xp):
    """A chunk past its prompt, a prompt of no tokens, a chunk without rows, padding among decodes."""
    for length, start, chunk in ((8, 8, 4), (0, 0, 4), (3, 8, 4), (0, 0, 0)):
        step = Step(xp, length=length, start=start, chunk=chunk, decodes=(0, 3, 0)).write(new=False)
        step.real = 0
        step.check(step.out())
        alone = Step(xp, length=length, start=start, chunk=chunk, decodes=None)
        assert not alone.out().any() and alone.out().shape == (chunk, H, D)
    nothing = Step(xp, length=None, decodes=())
    assert nothing.out().shape == (0, H, D)
    negative = Step(xp, decodes=(3,)).write(new=False)
    negative.metadata.prefill_position = negative.ints([-1] * 8)
    assert not negative.out(write_kv=False)[:8].any()


def test_a_length_that_is_a_number(xp):
    step = Step(xp).write(new=False)
    step.metadata.prefill_length = 6
    step.check(step.out())


def test_more_tokens_than_the_chunk_reaches(xp):
    """Tokens after the chunk's last are not seen by it."""
    step = Step(xp, length=14, start=4, chunk=4, decodes=None).write()
    step.check(step.out())


# ---- memory without tokens -------------------------------------------------------------------------------

@modes
@pytest.mark.parametrize("junk", [np.inf, -np.inf, 0.0])
def test_slots_without_tokens_leave_the_bits(xp, mode, junk):
    outs = []
    for content in (np.nan, junk):
        step = Step(xp, columns=3, junk=content, **MODES[mode]).write(new="mixed" not in mode)
        outs.append(step.out(return_lse=True))
    assert_same_bits(*outs)


@pytest.mark.parametrize("name,mode", [("prefill_page_table", "prefill"), ("prefill_page_table", "mixed"),
                                       ("decodes_page_table", "decode"), ("decodes_page_table", "mixed")])
@pytest.mark.parametrize("page", [0, -1, PAGES])
def test_pages_where_tokens_are(xp, mode, name, page):
    """Page 0 within a length is an error on the host, as ids of no page are; on a device nobody sees its tokens."""
    step = Step(xp, length=None if mode == "decode" else 6, decodes=None if mode == "prefill" else (3, 7)).write()
    table = xp.numpy(getattr(step.metadata, name))
    table[0 if table.ndim == 1 else (1, 0)] = page
    setattr(step.metadata, name, xp.array(table))
    if xp.name != "numpy":
        sequence = 0 if table.ndim == 1 else 1 + (mode == "mixed")
        step.check(step.out(write_kv=False), unseen={(sequence, t) for t in range(PS)})
        return
    before = step.view.copy()
    for method in ("forward_cpu", "forward_native"):
        with pytest.raises(ValueError, match=f"{method}: {name} must hold page ids from 1 to 19 .page 0 is reserved., "
                                             f"got {page} where tokens are"):
            step.run(method)
    assert step.view == before


def test_table_entries_past_the_end(xp):
    """They may be anything; EasyDeL reads them and loads what they name."""
    step, wild = Step(xp, columns=2).write(new=False), Step(xp, columns=2).write(new=False)
    for name, rows in (("prefill_page_table", wild.tables[:1]), ("decodes_page_table", wild.tables[1:])):
        table = xp.numpy(getattr(wild.metadata, name))
        for row, pages in zip(np.atleast_2d(table), rows, strict=True):
            row[len(pages):] = 2_147_480_000
        setattr(wild.metadata, name, xp.array(table))
    assert_same_bits(wild.out(), step.out())


@modes
@pytest.mark.parametrize("xp", ["standin"], indirect=True)
def test_nothing_is_read_on_the_host(xp, mode):
    step = Step(xp, **MODES[mode]).write(new="mixed" not in mode)
    q, k, v = (xp.array(a) for a in (step.q, step.k, step.v))
    before = dict(xp.events)
    PagedAttn(AttentionMetadata())(q, k, v, step.view, step.metadata)
    assert {name for name in xp.events if xp.events[name] != before.get(name, 0)} == {"allocations", "launches"}


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_checks_of_device_arrays(xp, monkeypatch):
    step = Step(xp, length=None, decodes=(5,)).write()
    monkeypatch.setenv("CUPYATTN_CHECK", "1")
    step.metadata.decodes_page_table = step.ints([[0, 3]])
    with pytest.raises(ValueError, match="block_table must hold page ids from 0 to 19, got -1 at page 0 of sequence 0"):
        step.run()


def test_tables_that_are_too_short(xp):
    step = Step(xp, decodes=(3, 7)).write(new=False)
    step.metadata.prefill_page_table = step.metadata.prefill_page_table[:1]
    if xp.name != "numpy":
        step.check(step.out(), unseen={(0, 4), (0, 5)})
        return
    before = step.view.copy()
    with pytest.raises(ValueError, match="prefill_page_table must have a page for every token, got 1 pages of 4 for 6"):
        step.run()
    step = Step(xp, length=None, decodes=(3, 7))
    step.metadata.decodes_page_table = step.metadata.decodes_page_table[:, :1]
    with pytest.raises(ValueError, match="decodes_page_table must have a page for every token, got 1 pages of 4 for 7"):
        step.run()
    assert step.view.copy() != before


# ---- shapes, options, formats ----------------------------------------------------------------------------

@pytest.mark.parametrize("columns", [0, 1, 6, 12])
def test_any_number_of_pages(xp, columns):
    """EasyDeL takes multiples of 8 pages for a sequence."""
    step = Step(xp, columns=columns).write(new=False)
    step.check(step.out())


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_heads_share_keys(xp, dtype):
    """EasyDeL rounds the running output to q's type when a multiple of 8 heads share keys, and adds up a prompt's."""
    step = Step(xp, dtype, length=300, start=290, chunk=16, decodes=(300, 17), heads=16, page_size=8).write(new=False)
    step.check(step.out())


def test_pages_keep_float32():
    """JAX's kernels round float32 keys and values to bfloat16, 7e-3 off."""
    step = Step(NUMPY, decodes=(64,), length=64, chunk=64).write(new=False)
    assert np.abs(step.out() - step.truth()[0]).max() < 1e-6


@pytest.mark.parametrize("dtype,kv_dtype", [("float16", "bfloat16"), ("float32", "float16")])
def test_pages_of_another_type(xp, dtype, kv_dtype):
    step = Step(xp, dtype, length=None, kv_dtype=kv_dtype).write()
    step.check(step.out())


def test_pages_in_the_other_layout(xp):
    """Pools [num_pages, page_size, num_kv_heads, head_dim]."""
    step, other = Step(xp), Step(xp).write(new=False)
    pools = [xp.array(np.full((PAGES, PS, KV, D), np.nan, np.float32)) for _ in "kv"]
    step.view = PagedAttentionCacheView(step.view.metadata, 0, *(pool.transpose(2, 0, 1, 3) for pool in pools))
    step.write(new=False)
    assert_same_bits(step.out(), other.out())
    assert_same_bits(xp.numpy(pools[0]), xp.numpy(other.view.key_pages).transpose(1, 2, 0, 3))


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_pages_in_fewer_bits(xp):
    """The kernels' result is that of the numbers the pages stand for; a schedule is made for their format."""
    step = Step(xp, "float16", quantizer="int8").write(new=False)
    out = step.out()
    assert np.abs(out - step.truth()[0]).max() < 0.05
    step.history = [np.float32(history) for history in step.history]
    view = step.view.to(np)
    k, v = view.k_cache.dequantize(), view.v_cache.dequantize()
    for history, table in zip(step.history, step.tables, strict=True):
        for t in range(history.shape[1]):
            at = table[t // PS], t % PS
            history[:, t] = k[at], v[at]
    step.check(out)
    if xp.name == "numpy":
        assert_close(Step(xp, "float16", quantizer="int8").write(new=False).out("forward_native"), out, 1e-3, 2.0**-11)
    made = PagedAttn(AttentionMetadata()).schedule(xp.array(step.q), step.view, step.metadata, window_size=3)
    assert made.kv_format == "int8" and made.window_size == 3
    assert_same_bits(step.out(schedule=made, window_size=3), step.out(window_size=3))


@modes
@pytest.mark.parametrize("options", [{"window_size": 3}, {"softcap": 1.5}, {"sinks": SINKS},
                                     {"window_size": 1, "softcap": 0.5, "sinks": SINKS}],
                         ids=lambda options: "-".join(options))
def test_options(xp, mode, options):
    """Beyond EasyDeL, which passes no cap and no window; a window also has an effect on single tokens."""
    want = {name.removesuffix("_size"): value for name, value in options.items()}
    for method in ("forward_tpu",) if xp.name != "numpy" else ("forward_tpu", "forward_native"):
        step = Step(xp, **MODES[mode]).write(new="mixed" not in mode)
        given = {**options, **({"sinks": xp.array(np.float32(options["sinks"]))} if "sinks" in options else {})}
        result = step.run(method, scale=0.7, return_lse=True, **given)
        step.check(xp.numpy(result.attention_outputs), scale=0.7, **want)
        assert_close(xp.numpy(result.lse), step.truth(0.7, **want)[1], 2e-6, 2e-6)
        assert xp.numpy(result.lse).dtype == np.float32


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_shapes(data):
    prompt = data.draw(st.booleans(), "prompt")
    start, chunk = data.draw(st.integers(0, 20), "start"), data.draw(st.integers(0, 40), "chunk")
    length = data.draw(st.integers(0, start + chunk), "length") if prompt else None
    least = 0 if prompt else 1
    decodes = tuple(data.draw(st.lists(st.integers(0, 30), min_size=least, max_size=4), "decodes"))
    kv_heads = data.draw(st.integers(1, 3), "kv_heads")
    dtype = data.draw(st.sampled_from(("float32", "float16")), "dtype")
    step = Step(NUMPY, dtype, length, start, chunk, decodes or None,
                heads=kv_heads * data.draw(st.integers(1, 9), "group"), kv_heads=kv_heads,
                dim=data.draw(st.sampled_from((8, 24)), "dim"), seed=data.draw(st.integers(0, 99), "seed"),
                page_size=data.draw(st.sampled_from((1, 3, 16)), "page"),
                columns=data.draw(st.integers(0, 2), "columns"))
    step.write(new=not (prompt and decodes))
    step.check(step.out())


# ---- schedules -------------------------------------------------------------------------------------------

@modes
@pytest.mark.parametrize("invariant", [False, True])
def test_schedule(xp, mode, invariant):
    """Made once per step; with it every layer gets the bits it gets without."""
    step = Step(xp, "float16", **MODES[mode]).write(new="mixed" not in mode)
    want = step.out(invariant=invariant)
    impl, q = PagedAttn(AttentionMetadata()), xp.array(step.q)
    made = impl.schedule(q[:, None] if step.decodes else q[None], step.view, step.metadata, invariant=invariant)
    assert made.device == xp.module.__name__ and made.dtype == "float16"
    for _ in range(2):
        assert_same_bits(step.out(invariant=invariant, schedule=made), want)


def test_host_lengths_are_not_captured():
    """A replay would not make the lengths and tables of NumPy arrays anew."""
    step = Step(NUMPY).write()
    with pytest.raises(CaptureError, match="must not call PagedAttn.forward_tpu with NumPy arrays"):
        capture(step.run)


# ---- refusals --------------------------------------------------------------------------------------------

def test_refusals():
    step, impl = Step(NUMPY).write(new=False), PagedAttn(AttentionMetadata())
    q, k, v = step.q, step.k, step.v

    def refused(error, message, q=q, k=k, v=v, view=step.view, metadata=step.metadata, **options):
        before = step.view.copy()
        for call in (impl, impl.forward_cpu, impl.forward_native):
            with pytest.raises(error, match=message):
                call(q, k, v, view, metadata, **options)
        assert step.view == before

    refused(ValueError, "cache_metadata must have a prefill or decodes, got neither",
            metadata=PagedAttentionMetadata.init_empty())
    refused(TypeError, "cache_view must be a PagedAttentionCacheView, got NoneType", view=None)
    refused(TypeError, "cache_metadata must be a PagedAttentionMetadata, got dict", metadata={})
    refused(ValueError, r"q must be \[tokens, num_heads, head_dim\] = \[13, \*, \*\], got \[12, 8, 16\]", q=q[1:])
    refused(TypeError, "q must be float16 or bfloat16 or float32, got float64", q=q.astype(np.float64))
    refused(ValueError, "key_pages must have a num_kv_heads that divides the 3 heads of q, got 2", q=q[:, :3])
    refused(ValueError, "key_pages must have q's head_dim 8, got 16", q=np.ascontiguousarray(q[..., :8]))
    refused(TypeError, "k must be a NumPy or CuPy array, got None", k=None)
    refused(ValueError, r"v must be \[tokens, num_kv_heads, head_dim\] = \[13, \*, \*\], got \[12, 2, 16\]", v=v[1:])
    refused(TypeError, "write_kv must be True or False, got 1", write_kv=1)
    refused(TypeError, "invariant must be True or False, got 1", invariant=1)
    refused(TypeError, "return_lse must be True or False, got 1", return_lse=1)
    refused(ValueError, "window_size must be an int32 of at least 0, got -1", window_size=-1)
    refused(TypeError, "window_size must be an integer, got list", window_size=[3])
    refused(ValueError, "softcap must be a finite float32 of at least 0, got -1", softcap=-1.0)
    refused(ValueError, r"sinks must be \[num_heads\]", sinks=np.zeros(3, np.float32))
    refused(TypeError, "sinks must be a NumPy or CuPy array, got list", sinks=[0.0] * H)
    with pytest.raises(TypeError, match="softmax_scale must be a number, got str"):
        PagedAttn(AttentionMetadata(softmax_scale="1"))(q, k, v, step.view, step.metadata)
    for name, value, error, message in (
            ("prefill_position", np.int32([0, 1, 3, 4, 5, 6, 7, 8]), ValueError,
             r"must count up by one over the chunk's tokens below prefill_length 6, got \[0, 1, 3"),
            ("prefill_position", np.int32([0, 1, 2, 3, 4, 5, 2, 7]), ValueError, "must count up by one"),
            ("prefill_position", np.arange(8), TypeError, "prefill_position must be int32, got int64"),
            ("prefill_length", np.int32([6]), ValueError, "prefill_length must be one number"),
            ("prefill_page_table", np.int32([[1, 2]]), ValueError, r"prefill_page_table must be \[pages\]"),
            ("decodes_position", np.int32([1, 2]), ValueError, "decodes_page_table must be .batch"),
            ("decodes_position", np.float32([1, 2]), TypeError, "decodes_position must be int32, got float32"),
            ("decodes_page_table", np.int32([1, 2]), ValueError, "decodes_page_table must be .batch")):
        refused(error, message, metadata=step.metadata.replace(**{name: value}))


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_kinds_are_not_mixed(xp):
    step = Step(xp).write(new=False)
    with pytest.raises(TypeError, match="all arrays must be of one kind"):
        PagedAttn(AttentionMetadata())(step.q, xp.array(step.k), xp.array(step.v), step.view, step.metadata)
    host = step.metadata.to(np)
    with pytest.raises(TypeError, match="all arrays must be of one kind"):
        PagedAttn(AttentionMetadata())(step.q, step.k, step.v, step.view, host, write_kv=False)


def test_everything_is_exported():
    for name in ("PagedAttn", "AttentionMetadata", "AttentionOutput", "AttentionImpl", "AttentionRegistry"):
        assert getattr(cupyattn, name) is getattr(cupyattn.paged_attn, name) and name in cupyattn.__all__
