# SPDX-License-Identifier: Apache-2.0
import numpy as np


def _per_head(values, heads, dims, with_heads):
    """`values` [channels], [heads] or [heads, head_dim] as float64 [heads, head_dim]; zeros for None."""
    if values is None:
        return np.zeros((heads, dims))
    values = values.astype(np.float64)
    if with_heads and values.ndim == 1:
        values = values[:, None]
    return np.broadcast_to(values.reshape(heads, -1), (heads, dims))


def softplus(x):
    """log(1 + exp(x)), of large x itself."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None, dt_limit=None):
    """One step of the recurrence in float64; `state` is updated in place."""
    out = np.zeros(x.shape)
    with_heads = x.ndim == 3
    heads, dims = x.shape[1:] if with_heads else (1, x.shape[1])
    states = B.shape[-1]
    rates = A.astype(np.float64).reshape((heads, 1, 1) if A.ndim == 1 else (heads, dims, states))
    bias, skip = (_per_head(v, heads, dims, with_heads) for v in (dt_bias, D))
    for b in range(len(x)):
        slot = b if state_batch_indices is None else state_batch_indices[b]
        if slot < 0:
            continue
        step = _per_head(dt[b], heads, dims, with_heads) + bias
        if dt_softplus:
            step = softplus(step)
        if dt_limit is not None:
            step = np.clip(step, *dt_limit)
        step = step[:, :, None]
        inputs = x[b].astype(np.float64).reshape(heads, dims, 1)
        into, out_of = (np.repeat(groups, heads // len(groups), axis=0)
                        for groups in (m[b].astype(np.float64).reshape(-1, 1, states) for m in (B, C)))
        with np.errstate(over="ignore", invalid="ignore"):
            new = np.exp(step * rates) * state[slot].astype(np.float64).reshape(heads, dims, states)
            new = new + step * inputs * into
            y = (new * out_of).sum(-1) + skip * inputs[:, :, 0]
            if z is not None:
                gate = z[b].astype(np.float64).reshape(heads, dims)
                y = y * gate / (1 + np.exp(-gate))
        state[slot] = new.reshape(state[slot].shape).astype(state.dtype)
        out[b] = y.reshape(x.shape[1:])
    return out
