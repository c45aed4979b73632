# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.lightning_attention` in plain NumPy, float64 inside: the recurrence, token by token."""

import numpy as np


def lightning_attention(q, k, v, state, slopes, /, *, scale=1.0, cu_seqlens=None, slots=None, has_state=None, mask=None,
                        block_size=None, out=None):
    """state <- exp(-slope) * state + outer(k, v),  out = scale * q @ state; `state` is updated in place.

    The result is float64 unless `out` is given; `block_size` means nothing here.
    """
    tokens = q.shape[0]
    starts = np.arange(tokens + 1) if cu_seqlens is None else np.asarray(cu_seqlens)
    result = np.zeros(v.shape) if out is None else out
    result[...] = 0
    decay = np.exp(-slopes.astype(np.float64))[:, None, None]
    for b, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        slot = b if slots is None else slots[b]
        if slot < 0 or begin == end:
            continue
        fresh = has_state is not None and not has_state[b]
        kept = np.zeros(state.shape[1:]) if fresh else state[slot].astype(np.float64)
        for t in range(begin, end):
            kept = decay * kept
            if mask is None or mask[t]:
                kept += k[t].astype(np.float64)[:, :, None] * v[t].astype(np.float64)[:, None, :]
            result[t] = scale * np.einsum("hd,hdv->hv", q[t].astype(np.float64), kept)
        state[slot] = kept.astype(state.dtype)
    return result
