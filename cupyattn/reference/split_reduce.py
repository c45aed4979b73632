# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.split_reduce` in plain NumPy, float64 inside."""

import numpy as np


def split_reduce(partial_out, partial_lse, /, *, partial_sum=None, lse_scale=1.0, split_counts=None, sinks=None,
                 return_lse=False):
    """Attention over the union of several key sets, from the attention over each: float64 in, float64 out.

    w[s] = exp(lse_scale * partial_lse[s]);  lse = log(sum_s w[s] * partial_sum[s]),
    out = sum_s w[s] * partial_out[s] / exp(lse)
    and, with a sink, out is multiplied by exp(lse) / (exp(lse) + exp(sink)). Of a token only the first split_counts
    splits count; without any its out is NaN here, standing for "as it was".
    """
    values = np.stack([np.asarray(p, np.float64) for p in partial_out])  # [splits, tokens, heads, head_dim]
    weights = np.stack([np.asarray(p, np.float64) for p in partial_lse]) * lse_scale  # [splits, tokens, heads]
    sums = np.ones_like(weights) if partial_sum is None else np.stack([np.asarray(p, np.float64) for p in partial_sum])
    if split_counts is not None:
        weights[np.arange(len(weights))[:, None] >= np.asarray(split_counts)] = -np.inf
    top = weights.max(axis=0)
    safe_top = np.where(np.isneginf(top), 0.0, top)
    factor = np.exp(weights - safe_top)
    total = np.where(np.isneginf(weights), 0.0, factor * sums).sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = safe_top + np.log(total)
    # A split without keys has no say, whatever its data.
    values = np.where(np.isneginf(weights)[..., None], 0.0, values)
    out = (factor[..., None] * values).sum(axis=0) / np.where(total == 0, 1.0, total)[..., None]
    if sinks is not None:
        with np.errstate(over="ignore"):
            out = out / (1.0 + np.exp(np.asarray(sinks, np.float64) - np.where(np.isneginf(lse), 0.0, lse)))[..., None]
    if split_counts is not None:
        out[np.asarray(split_counts) == 0] = np.nan
    return (out, lse) if return_lse else out
