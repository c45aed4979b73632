# SPDX-License-Identifier: Apache-2.0
"""What an op writes has a place of its own for every element."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import cupyattn

X = np.arange(1, 33, dtype=np.float32).reshape(2, 16)
HEADS = np.ones((2, 2, 16), np.float32)
PLANES = np.ones((2, 3, 2, 16), np.float32)   # caches [pages, page_size, heads, head_dim], partials [splits, ...]
TABLE, LENGTHS = np.int32([[0], [1]]), np.int32([2, 1])


def _rms_norm(out=None, residual=None):
    cupyattn.rms_norm(X, X[0], residual=residual, out=out)


def _rope(out):
    cupyattn.rope(HEADS, cos=X[:, :8], sin=X[:, :8], positions=np.int32([0, 1]), out=out)


def _kv_append(k_cache=None, v_cache=None):
    k_cache, v_cache = (np.zeros_like(PLANES) if cache is None else cache for cache in (k_cache, v_cache))
    cupyattn.kv_append(HEADS, HEADS, k_cache, v_cache, slots=np.int32([0, 4]))


def _kv_flatten(out):
    cupyattn.kv_flatten(PLANES, PLANES, block_table=TABLE, cu_seqlens_k=np.int32([0, 2, 3]), out=out)


def _paged_decode(out=None, lse=None):
    out = np.empty_like(HEADS) if out is None else out
    cupyattn.paged_decode(HEADS, PLANES, PLANES, block_table=TABLE, cache_seqlens=LENGTHS,
                          out=out if lse is None else (out, lse), return_lse=lse is not None)


def _split_reduce(out=None, lse=None):
    out = np.empty(PLANES.shape[1:], np.float32) if out is None else out
    cupyattn.split_reduce(PLANES, PLANES[..., 0].copy(), out=out if lse is None else (out, lse),
                          return_lse=lse is not None)


def _conv_update(state=None, out=None):
    cupyattn.causal_conv1d_update(X, np.zeros((2, 16, 3), np.float32) if state is None else state, X.T, out=out)


def _lightning_attention(out=None, state=None):
    state = np.zeros((2, 2, 16, 16), np.float32) if state is None else state
    cupyattn.lightning_attention(HEADS, HEADS, HEADS, state, X[0, :2], out=out)


def _page_move(pools):
    pools[1] = 1
    cupyattn.page_move(pools, np.int32([1]), np.int32([0]))


def _state_update(state=None, out=None):
    state = np.zeros((2, 16, 4), np.float32) if state is None else state
    cupyattn.selective_state_update(state, X, X, X.T[:, :1] - np.ones(4, np.float32), X[:, :4], X[:, :4], out=out)


def _scan(state=None, out=None):
    state = np.zeros((2, 16, 4), np.float32) if state is None else state
    cupyattn.selective_scan(X, X, X.T[:, :1] - np.ones(4, np.float32), X[:, :4], X[:, :4], state=state, out=out)


CASES = {
    "rms_norm out": (_rms_norm, X.shape),
    "rms_norm residual": (lambda a: _rms_norm(residual=a), X.shape),
    "layer_norm out": (lambda a: cupyattn.layer_norm(X, X[0], out=a), X.shape),
    "rope out": (_rope, HEADS.shape),
    "silu_mul out": (lambda a: cupyattn.silu_mul(X, X, out=a), X.shape),
    "causal_conv1d out": (lambda a: cupyattn.causal_conv1d(X, X.T[:, :1], out=a), X.shape),
    "causal_conv1d_update out": (lambda a: _conv_update(out=a), X.shape),
    "causal_conv1d_update conv_state": (lambda a: _conv_update(state=a), (2, 16, 3)),
    "selective_scan out": (lambda a: _scan(out=a), X.shape),
    "selective_scan state": (lambda a: _scan(state=a), (2, 16, 4)),
    "selective_state_update out": (lambda a: _state_update(out=a), X.shape),
    "selective_state_update state": (lambda a: _state_update(state=a), (2, 16, 4)),
    "embedding out": (lambda a: cupyattn.embedding(np.int32([0, 1]), X, out=a), X.shape),
    "quant_gemm out": (lambda a: cupyattn.quant_gemm(X, cupyattn.QMatrix.from_dense(X), out=a), (2, 2)),
    "kv_append k_cache": (_kv_append, PLANES.shape),
    "kv_append v_cache": (lambda a: _kv_append(v_cache=a), PLANES.shape),
    "kv_flatten out": (_kv_flatten, (2, 2, 3, 16)),
    "page_move pools": (_page_move, PLANES.shape),
    "paged_decode out": (_paged_decode, HEADS.shape),
    "paged_decode lse": (lambda a: _paged_decode(lse=a), HEADS.shape[:2]),
    "lightning_attention out": (_lightning_attention, HEADS.shape),
    "lightning_attention state": (lambda a: _lightning_attention(state=a), (2, 2, 16, 16)),
    "split_reduce out": (_split_reduce, PLANES.shape[1:]),
    "split_reduce lse": (lambda a: _split_reduce(lse=a), PLANES.shape[1:3]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_written_array_repeats_no_element(name):
    call, shape = CASES[name]
    whole = np.zeros(shape, np.float32)
    call(whole)
    assert whole.any()
    op, argument = name.split()
    with pytest.raises(ValueError, match=f"{op}: {argument} must not repeat elements, got strides"):
        call(as_strided(whole, shape, (0, *whole.strides[1:])))


def test_a_stride_of_zero_on_an_axis_of_one_is_fine():
    out = as_strided(np.zeros((1, 16), np.float32), strides=(0, 4))
    assert cupyattn.silu_mul(X[:1], X[:1], out=out) is out and out.all()
