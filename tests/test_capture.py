# SPDX-License-Identifier: Apache-2.0
"""An op that is given its outputs only launches: it can be captured in a CUDA graph and replayed."""

import numpy as np
import pytest
from ggml_blocks import quantized
from selective_models import Model

import cupyattn

rng = np.random.default_rng(3)


def _normal(xp, *shape, dtype=np.float16):
    return xp.array(rng.standard_normal(shape).astype(dtype))


def _paged(xp):
    """Two sequences of 1500 and 20 tokens in pages of 16: caches, table, lengths."""
    table = np.arange(2 * 100, dtype=np.int32).reshape(2, 100)
    return (_normal(xp, 200, 16, 2, 64), _normal(xp, 200, 16, 2, 64), xp.array(table),
            xp.array(np.int32([1500, 20])))


def _rms_norm(xp):
    x, weight, residual = _normal(xp, 3, 64), _normal(xp, 64), xp.array(np.zeros((3, 64), np.float32))
    out = xp.module.zeros((3, 64), np.float16)
    return lambda: cupyattn.rms_norm(x, weight, residual=residual, out=out), [out, residual]


def _layer_norm(xp):
    x, weight, bias, out = _normal(xp, 3, 64), _normal(xp, 64), _normal(xp, 64), xp.module.zeros((3, 64), np.float16)
    return lambda: cupyattn.layer_norm(x, weight, bias, out=out), [out]


def _rope(xp):
    x, out = _normal(xp, 3, 4, 64), xp.module.zeros((3, 4, 64), np.float16)
    cos, sin = _normal(xp, 50, 32, dtype=np.float32), _normal(xp, 50, 32, dtype=np.float32)
    positions = xp.array(np.int32([0, 7, 49]))
    return lambda: cupyattn.rope(x, cos=cos, sin=sin, positions=positions, out=out), [out]


def _kv_append(xp):
    k_cache, v_cache, table, lengths = _paged(xp)
    k, v = _normal(xp, 2, 2, 64), _normal(xp, 2, 2, 64)
    return lambda: cupyattn.kv_append(k, v, k_cache, v_cache, block_table=table, positions=lengths), [k_cache, v_cache]


def _kv_flatten(xp):
    k_cache, v_cache, table, lengths = _paged(xp)
    outs, starts = [xp.module.zeros((1520, 2, 64), np.float16) for _ in "kv"], xp.array(np.int32([0, 1500, 1520]))
    return lambda: cupyattn.kv_flatten(k_cache, v_cache, block_table=table, cache_seqlens=lengths,
                                       cu_seqlens_k=starts, out=outs), outs


def _paged_decode(xp):
    """With the planner's launch: both read lengths on the device."""
    k_cache, v_cache, table, lengths = _paged(xp)
    q, out = _normal(xp, 2, 6, 64), xp.module.zeros((2, 6, 64), np.float16)
    lse = xp.module.zeros((2, 6), np.float32)
    options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64}
    made = cupyattn.schedule(lengths, max_k_len=1600, **options)

    def call():
        work = cupyattn.schedule(lengths, out=made, **options)
        cupyattn.paged_decode(q, k_cache, v_cache, block_table=table, cache_seqlens=lengths, schedule=work,
                              out=(out, lse), return_lse=True)

    return call, [out, lse]


def _attention(xp):
    """Prefill of 30 tokens beside one that decodes."""
    k_cache, v_cache, table, lengths = _paged(xp)
    q, out = _normal(xp, 31, 6, 64), xp.module.zeros((31, 6, 64), np.float16)
    starts = xp.array(np.int32([0, 30, 31]))
    options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "cu_seqlens_q": starts, "max_q_len": 30}
    made = cupyattn.schedule(lengths, max_k_len=1600, **options)

    def call():
        work = cupyattn.schedule(lengths, out=made, **options)
        cupyattn.attention(q, k_cache, v_cache, cu_seqlens_q=starts, block_table=table, cache_seqlens=lengths,
                           max_q_len=30, schedule=work, out=out)

    return call, [out]


def _split_reduce(xp):
    partial, lse = _normal(xp, 3, 2, 4, 64, dtype=np.float32), _normal(xp, 3, 2, 4, dtype=np.float32)
    out = xp.module.zeros((2, 4, 64), np.float16)
    return lambda: cupyattn.split_reduce(partial, lse, out=out), [out]


def _silu_mul(xp):
    gate, up, out = _normal(xp, 3, 64), _normal(xp, 3, 64), xp.module.zeros((3, 64), np.float16)
    return lambda: cupyattn.silu_mul(gate, up, out=out), [out]


def _weights(xp):
    """A q8_0 matrix [48, 64]."""
    raw, _ = quantized("Q8_0", rng.standard_normal((48, 64)).astype(np.float32))
    return cupyattn.QMatrix.from_gguf(raw, "q8_0", (48, 64)).to(xp.module)


def _quant_gemm(xp):
    x, weights, bias, out = _normal(xp, 3, 64), _weights(xp), _normal(xp, 48), xp.module.zeros((3, 48), np.float16)
    return lambda: cupyattn.quant_gemm(x, weights, bias=bias, accumulate=True, out=out), [out]


def _embedding(xp):
    ids, table, out = xp.array(np.int32([47, 0, 5])), _weights(xp), xp.module.zeros((3, 64), np.float16)
    return lambda: cupyattn.embedding(ids, table, out=out), [out]


def _lightning_attention(xp):
    """Two steps, then a prefill that goes on."""
    q, k, v, slopes = *(_normal(xp, 4, 2, 16) for _ in "qkv"), cupyattn.lightning_slopes(2, 0, 2, xp=xp.module)
    state, out = xp.module.zeros((2, 2, 16, 16), np.float32), xp.module.zeros((4, 2, 16), np.float16)
    starts, fresh = xp.array(np.int32([0, 3, 4])), xp.array(np.array([False, True]))

    def call():
        cupyattn.lightning_attention(q[:2], k[:2], v[:2], state, slopes, has_state=fresh, out=out[:2])
        cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=starts, has_state=fresh, out=out)

    return call, [out, state]


def _page_move(xp):
    pools, ids = [_normal(xp, 4, 3, 2, 16) for _ in "kv"], [xp.array(np.int32(a)) for a in ([3, 2], [0, 1])]
    return lambda: cupyattn.page_move(pools, *ids), pools


def _schedule(xp):
    lengths, changed, cu_seqlens_q = (xp.array(np.int32(a)) for a in ([1500, 20], [9, 2000], [0, 1, 300]))
    options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "cu_seqlens_q": cu_seqlens_q}
    made = cupyattn.schedule(lengths, max_k_len=2000, max_q_len=300, **options)
    lists = [work for work in (made.decode, made.prefill) if work is not None]
    return (lambda: cupyattn.schedule(changed, out=made, **options),
            [array for work in lists for array in (work.items, work.worker_items, work.units, work.pieces)])


def _causal_conv1d(xp):
    x, weight, states = _normal(xp, 5, 16), _normal(xp, 16, 4), _normal(xp, 2, 16, 4, dtype=np.float32)
    starts, out = xp.array(np.int32([0, 3, 5])), xp.module.zeros((5, 16), np.float16)
    return lambda: cupyattn.causal_conv1d(x, weight, conv_states=states, cu_seqlens=starts, out=out), [out, states]


def _causal_conv1d_update(xp):
    x, weight, state = _normal(xp, 2, 16), _normal(xp, 16, 4), _normal(xp, 2, 16, 4, dtype=np.float32)
    out = xp.module.zeros((2, 16), np.float16)
    return lambda: cupyattn.causal_conv1d_update(x, state, weight, out=out), [out, state]


def _selective_state_update(xp):
    model = Model(heads=2, channels=8, states=16)
    inputs = {name: xp.array(a) for name, a in model.inputs(2).items()}
    state, out = xp.array(model.pool(2, np.arange(2))), xp.module.zeros((2, 2, 8), np.float32)
    return lambda: cupyattn.selective_state_update(state, **inputs, dt_softplus=True, out=out), [out, state]


def _selective_scan(xp):
    model = Model(heads=2, channels=8, states=16)
    inputs = {name: xp.array(a) for name, a in model.inputs(50).items()}
    state, out = xp.array(model.pool(2, np.arange(2))), xp.module.zeros((50, 2, 8), np.float32)
    starts = xp.array(np.int32([0, 45, 50]))
    return lambda: cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, cu_seqlens=starts, chunk_size=32,
                                           out=out), [out, state]


CASES = {"rms_norm": _rms_norm, "layer_norm": _layer_norm, "rope": _rope, "kv_append": _kv_append,
         "kv_flatten": _kv_flatten, "paged_decode": _paged_decode, "attention": _attention,
         "split_reduce": _split_reduce, "silu_mul": _silu_mul, "quant_gemm": _quant_gemm, "embedding": _embedding,
         "lightning_attention": _lightning_attention, "page_move": _page_move,
         "schedule": _schedule, "causal_conv1d": _causal_conv1d, "causal_conv1d_update": _causal_conv1d_update,
         "selective_scan": _selective_scan, "selective_state_update": _selective_state_update}


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_capture(xp, name):
    call, outputs = CASES[name](xp)
    before = [xp.numpy(a) for a in outputs]
    xp.module.cuda.runtime.deviceSynchronize()
    stream = xp.module.cuda.Stream(non_blocking=True)
    with stream:
        call()   # compiles, and makes this stream's workspace
        stream.synchronize()
        eager = [xp.numpy(a) for a in outputs]
        assert any((a != b).any() for a, b in zip(before, eager, strict=True))
        for array, content in zip(outputs, before, strict=True):
            array.set(content)
        stream.synchronize()
        if xp.name == "standin":
            xp.events.clear()
        stream.begin_capture()
        call()
        graph = stream.end_capture()
        if xp.name == "standin":
            assert set(xp.events) == {"launches"}, "an op may not allocate, copy or wait"
        for array, content in zip(outputs, before, strict=True):
            np.testing.assert_array_equal(xp.numpy(array), content, err_msg="ran during capture")
        graph.launch(stream)
        stream.synchronize()
        for array, content in zip(outputs, eager, strict=True):
            np.testing.assert_array_equal(xp.numpy(array), content)
