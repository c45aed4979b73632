# SPDX-License-Identifier: Apache-2.0
"""The float64 reference against the formula written out, one number at a time, and against onnxruntime."""

import math

import numpy as np
import pytest
from compare import assert_close
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_attention import MASK_SHAPES, NUMPY, SLOPES, make, onnx_run

rng = np.random.default_rng(43)


def entry(mask, *index):
    """mask[index] as broadcasting reads it; what lies past the last key hides nothing and adds nothing."""
    index = index[4 - mask.ndim:]
    if index[-1] >= mask.shape[-1]:
        return 0.0
    value = mask[tuple(0 if size == 1 and axis < mask.ndim - 1 else i
                       for axis, (i, size) in enumerate(zip(index, mask.shape, strict=True)))]
    return (0.0 if value else -math.inf) if mask.dtype == bool else float(value)


def written_out(case, *, causal=True, softcap=0.0, window_size=0, sinks=None, mask=None, tree_mask=None,
                alibi_slopes=None, finished=None, cache_starts=None):
    """(out, lse): for every row the sum over the tokens it sees."""
    tokens, heads, head_dim = case.q.shape
    page_size, kv_heads, head_dim_v = case.v.shape[1:]
    out, lse = np.zeros((tokens, heads, head_dim_v)), np.full((tokens, heads), -math.inf)
    row = -1
    for b, (length, q_len) in enumerate(zip(case.lengths.tolist(), case.q_lens.tolist(), strict=True)):
        for i in range(q_len):
            row += 1
            n = length - q_len + i
            if finished is not None and finished[b]:
                continue
            for h in range(heads):
                weights, values = [], []
                for t in range(0 if cache_starts is None else int(cache_starts[b]), length):
                    new = t - (length - q_len)   # its number among the new tokens
                    if tree_mask is not None:
                        if new >= 0 and not int(tree_mask[row, new >> 5]) >> (new & 31) & 1:
                            continue
                    elif causal and t > n:
                        continue
                    if window_size and not -window_size < t - n < window_size:
                        continue
                    at = case.table[b, t // page_size], t % page_size, h * kv_heads // heads
                    s = sum(float(x) * float(y) for x, y in zip(case.q[row, h], case.k[at], strict=True))
                    s /= math.sqrt(head_dim)
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    if alibi_slopes is not None:
                        s -= float(alibi_slopes[h]) * abs(n - t)
                    if mask is not None:
                        s += entry(mask, b, h, i, t)
                    weights.append(s)
                    values.append(case.v[at].astype(np.float64))
                total = math.fsum(math.exp(s) for s in weights)
                if total:
                    share = total + (0.0 if sinks is None else math.exp(float(sinks[h])))
                    out[row, h] = sum(math.exp(s) / share * v for s, v in zip(weights, values, strict=True))
                    lse[row, h] = math.log(total)
    return out, lse


def check(case, **options):
    for got, want in zip(case.expected(**options), written_out(case, **options), strict=True):
        assert_close(got, want, 1e-11, 1e-11)


@hypothesis_settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_formula(data):
    lengths = data.draw(st.lists(st.integers(0, 45), min_size=1, max_size=3))
    q_lens = [data.draw(st.integers(0, min(n + 2, 38))) for n in lengths]
    case = make(lengths, q_lens, heads=4, kv_heads=data.draw(st.sampled_from([1, 2, 4])), head_dim=8, page_size=7)
    batch, longest = len(lengths), max(1, *q_lens)
    every = {"causal": False, "window_size": data.draw(st.integers(1, 30)), "softcap": 2.0, "alibi_slopes": SLOPES,
             "sinks": np.float32([0.5, -3, 4, -np.inf]), "finished": rng.random(batch) < 0.3,
             "cache_starts": rng.integers(0, 12, batch),
             "tree_mask": rng.integers(0, 2**32, (len(case.q), 2), dtype=np.uint32)}
    shape = [n if data.draw(st.booleans()) else 1 for n in (batch, 4, longest)][data.draw(st.integers(0, 3)):]
    mask = rng.standard_normal((*shape, data.draw(st.integers(1, 60)))).astype(np.float32)
    mask[mask < -1.2] = -np.inf
    every["mask"] = mask > -1 if data.draw(st.booleans()) else mask
    check(case, **{name: value for name, value in every.items() if data.draw(st.booleans())})


@pytest.mark.parametrize("options", ["tree mask", "ALiBi", *MASK_SHAPES])
def test_onnxruntime(options):
    """One dense additive mask says the same to onnxruntime's Attention."""
    tokens, heads = 40, 4
    case = make([tokens], [tokens], heads=heads, head_dim=32)
    n, t = np.arange(tokens)[:, None], np.arange(tokens)
    dense = np.where(t <= n, 0, -np.inf)[None, None].repeat(heads, 1)
    if options == "tree mask":
        seen = rng.random((tokens, tokens)) < 0.5
        seen[:, 0] = True
        given_options = {"tree_mask": np.packbits(np.pad(seen, ((0, 0), (0, 24))), axis=1, bitorder="little")
                         .view(np.uint32)}
        dense = np.where(seen, 0, -np.inf)[None, None].repeat(heads, 1)
    elif options == "ALiBi":
        given_options = {"alibi_slopes": SLOPES}
        dense = dense - SLOPES[:, None, None] * np.abs(n - t)
    else:   # the axes that a shape repeats, for one sequence
        shape = [1 if n == 1 or axis == 0 else {1: heads, 2: tokens, 3: 33}[axis]
                 for axis, n in zip(range(4)[-len(MASK_SHAPES[options]):], MASK_SHAPES[options], strict=True)]
        mask = rng.standard_normal(shape).astype(np.float32)
        given_options = {"mask": mask}
        dense[..., :33] += mask
    k, v, _ = case.keys(NUMPY, "ragged")
    feeds = {name: a.transpose(1, 0, 2)[None] for name, a in (("q", case.q), ("k", k), ("v", v))}
    from onnx import helper

    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"])
    want, = onnx_run(node, {**feeds, "mask": dense.astype(np.float32)}, {"out": np.float32})
    assert_close(case.expected(**given_options)[0], want[0].transpose(1, 0, 2), 2e-6, 0)
