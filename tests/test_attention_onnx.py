# SPDX-License-Identifier: Apache-2.0
"""Prefill on tensor cores against onnxruntime's CPU provider; the fixture `blocks` takes the kernel everywhere."""

from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close
from test_attention import NUMPY, SINKS, TOLERANCE, attend, grouped_query_attention, make, onnx_run, paged_like
from test_attention_mma import blocks  # noqa: F401

import cupyattn

rng = np.random.default_rng(41)


def wide(array):
    """As onnxruntime can take it: float32 for bfloat16, which its CPU provider lacks."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("lengths, q_len", [([37, 1, 128], 1), ([140], 70), ([70], 70)])
@pytest.mark.parametrize("options", [{}, {"window_size": 33}, {"softcap": 2.0}, {"sinks": SINKS[:3].repeat(2)},
                                     {"window_size": 20, "softcap": 5.0}], ids=str)
def test_group_query_attention(dtype, lengths, q_len, options):
    case = make(lengths, [q_len] * len(lengths), heads=6, dtype=dtype)
    theirs = {"window" if name == "window_size" else name: value for name, value in options.items()}
    like = replace(case, q=wide(case.q), k=wide(case.k), v=wide(case.v))
    want = grouped_query_attention(*paged_like(like, q_len), case.lengths, **theirs)[0]
    assert_close(attend(case, **options)[0], want.reshape(case.q.shape), *TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 2.0, "softmax_scale": 0.2}, {"mask": "bool"},
                                     {"mask": "float32", "causal": False}], ids=str)
def test_attention_23(options):
    """Head dims that differ; it computes in float32 here, from the same float16."""
    from onnx import helper

    tokens = 70
    case = make([tokens], [tokens], heads=6, head_dim_v=48, dtype="float16")
    k, v, where = case.keys(NUMPY, "ragged")
    feeds = {name: a.astype(np.float32).transpose(1, 0, 2)[None] for name, a in (("q", case.q), ("k", k), ("v", v))}
    options = dict(options)
    if "mask" in options:
        mask = rng.standard_normal((1, 6, tokens, tokens)).astype(np.float32)
        if options["mask"] == "bool":
            mask = np.maximum(mask, 0) + np.eye(tokens) > 0.5
        feeds["mask"] = options["mask"] = mask
    node = helper.make_node("Attention", list(feeds), ["out"], is_causal=int(options.get("causal", True)),
                            softcap=options.get("softcap", 0.0), scale=options.get("softmax_scale", 0.125))
    want = onnx_run(node, feeds, {"out": np.float32})[0][0].transpose(1, 0, 2)
    got = cupyattn.attention(case.q, k, v, cu_seqlens_q=case.cu, **where, **options)
    assert_close(got, want, *TOLERANCE["float16"])
