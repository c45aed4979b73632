# SPDX-License-Identifier: Apache-2.0
import numpy as np

from .selective_state_update import selective_state_update


def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, state=None, cu_seqlens=None,
                   slots=None, has_state=None, dt_limit=None):
    """Token by token in float64; `state` is updated in place."""
    out = np.zeros(x.shape)
    starts = [0, len(x)] if cu_seqlens is None else cu_seqlens
    for b in range(len(starts) - 1):
        slot = b if slots is None else slots[b]
        if slot < 0 or starts[b] == starts[b + 1]:
            continue
        begins = state is None or has_state is not None and not has_state[b]
        now = np.zeros((1, *x.shape[1:], B.shape[-1]))
        if not begins:
            now[0] = state[slot].astype(np.float64)
        for t in range(starts[b], starts[b + 1]):
            rows = (None if a is None else a[t:t + 1] for a in (x, dt, B, C, z))
            x_t, dt_t, B_t, C_t, z_t = rows
            out[t] = selective_state_update(now, x_t, dt_t, A, B_t, C_t, D, z_t, dt_bias, dt_softplus,
                                            dt_limit=dt_limit)[0]
        if state is not None:
            state[slot] = now[0].astype(state.dtype)
    return out
