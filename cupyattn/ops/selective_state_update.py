# SPDX-License-Identifier: Apache-2.0
"""The next token of a selective state space model. Kernel: ``cuda_src/selective_state_update.cu``."""

import functools
import itertools

from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, head_view, strides
from ..runtime.checks import FLOATS, check_array, check_writeable
from ..selective_inputs import check_inputs, find_sizes, with_heads
from ..state_slots import check_pool, check_slots

ROWS = 4   # dims of a thread at a time


def _spec(x, dt, state, vec, lanes, state_decays):
    return Specialisation("selective_state_update", "selective_state_update", "SelectiveStateUpdateArgs",
                          {"T": x, "DT": dt, "S": state, "VEC": vec, "LANES": lanes, "ROWS": ROWS,
                           "STATE_DECAYS": int(state_decays)})


CORE = [_spec(*case) for case in (
    ("float16", "float16", "float32", 4, 4, True), ("bfloat16", "float32", "float32", 4, 32, False),
    ("bfloat16", "bfloat16", "bfloat16", 8, 16, False), ("float16", "float32", "float16", 8, 2, True),
    ("float32", "float32", "float32", 8, 1, True), ("float32", "float32", "float32", 8, 1, False),
    ("float32", "float32", "float32", 1, 32, True), ("float16", "float32", "float32", 1, 1, False),
    ("bfloat16", "float32", "float32", 8, 1, True), ("float32", "float32", "float16", 8, 32, False),
)]
_SHAPES = (*((1, lanes) for lanes in (4, 32)), *((4, lanes) for lanes in (4, 8, 16, 32)),
           *((8, lanes) for lanes in (2, 4, 8, 16, 32)))   # (VEC, LANES)


def more_specs():
    """What plans pick on a GPU: every type with two shapes of work, and every shape with three choices of types."""
    for x, state, decays in itertools.product(FLOATS, FLOATS, (True, False)):
        for dt in dict.fromkeys((x, "float32")):
            wide = 4 if state == "float32" else 8
            yield from (_spec(x, dt, state, vec, lanes, decays) for vec, lanes in ((wide, 16), (1, 32)))
    for (vec, lanes), decays in itertools.product(_SHAPES, (True, False)):
        for x, state in (("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
            if vec == 1 or (vec == 4) == (state == "float32"):
                yield _spec(x, x, state, vec, lanes, decays)


def _power_of_two(n):
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _plan_selective_state_update(batch, heads, head_dim, state_size, x, dt, state, state_decays, align, arch):
    """Plan from sizes, dtype names, the common alignment in bytes, and arch."""
    vec = 4 if state == "float32" else 8
    if arch == "cpu" and state_size % 8 == 0:
        vec = 8
    if align < 16 or state_size % vec:
        vec = 1
    if arch == "cpu":   # a fiber should have 32768 states to go through
        lanes = threads = 1
        each = head_dim * state_size
        y = max(1, min(heads, heads * each // 32768))
        z = max(1, min(-(-head_dim // ROWS), each // 32768))
    else:
        lanes = min(32, _power_of_two(-(-state_size // vec)))
        lanes = max(2 if vec == 8 else 4, lanes) if vec > 1 else 32 if lanes > 4 else 4
        threads = 128
        y, z = min(heads, 65535), min(65535, -(-head_dim * lanes // (ROWS * threads)))
    note = (f"{vec} states per access" if vec > 1 else f"one state per access: alignment {align}, {state_size} states")
    return Plan(_spec(x, dt, state, vec, lanes, state_decays), arch, (batch, y, z), (threads,), note=note)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
                           state_batch_indices=None, dt_limit=None, out=None):
    """The next token of a selective state space model (Mamba, Mamba-2), whose state is updated in place.

    step = dt + dt_bias, with dt_softplus log1p(exp(step)), then limited to dt_limit
    state[p,n] <- exp(step[p] * A[p,n]) * state[p,n] + step[p] * x[p] * B[n]
    out[p] = (sum_n state[p,n] * C[n] + D[p] * x[p]) * z[p] * sigmoid(z[p])

    Mamba-1 has channels p; Mamba-2 has dims p of heads h, one A, dt and D for a head, and B and C of group
    ``h // (heads // groups)``.

    Parameters
    ----------
    state : ndarray [slots, channels, state_size] or [slots, heads, head_dim, state_size]
        A pool of states, float32 (recommended: 16 bits drift), float16 or bfloat16; updated in place. Any strides
        with a contiguous last axis.
    x : ndarray [batch, channels] or [batch, heads, head_dim], float16, bfloat16 or float32
    dt : ndarray, shape of x, or [batch, heads]; float32 or x.dtype
        The raw step, before bias and softplus. May repeat a head's step over its dims by a stride of 0.
    A : ndarray [channels, state_size], or [heads] or [heads, head_dim, state_size], float32
        Negative. With heads, the axes after the first may repeat it by strides of 0, which is as fast as [heads].
    B, C : ndarray [batch, state_size] or [batch, groups, state_size], dtype of x
    D : ndarray [channels], or [heads] or [heads, head_dim], float32, optional
        Adds ``D * x``.
    z : ndarray, shape and dtype of x, optional
        Gate, applied last.
    dt_bias : ndarray, as D, optional
    dt_softplus : bool
        A step above 20 is its own softplus.
    state_batch_indices : ndarray [batch], int32, optional
        Slot of each row; a negative one skips the row: its out is zeros. Default: row b has slot b.
    dt_limit : (float, float), optional
        Smallest and largest step. Default: none, also for negative steps.
    out : ndarray, shape and dtype of x, optional
        Overlaps no input.

    Returns
    -------
    out : ndarray, shape and dtype of x

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or an option of the wrong kind.
    ValueError
        Shapes or strides that do not fit. For NumPy arrays also a slot past the pool and one named twice; for CuPy
        arrays only with ``CUPYATTN_CHECK=1``, else a row with a slot past the pool is skipped.

    Notes
    -----
    Computed in float32; out is summed from the new state before that is rounded to its dtype. Bound by memory
    bandwidth: every element of the state is read once and written once. On CuPy arrays asynchronous on the current
    stream. Kernel: ``cuda_src/selective_state_update.cu``. Mamba: arXiv:2312.00752, Mamba-2: arXiv:2405.21060.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> state, one = np.float32([[[8, 4]]]), np.ones((1, 1), np.float32)
    >>> A = -np.log(np.float32([[2, 4]]))    # a step of 1 halves and quarters
    >>> cupyattn.selective_state_update(state, 3 * one, one, A, np.float32([[1, 0]]), np.float32([[1, 10]]))
    array([[17.]], dtype=float32)
    >>> state
    array([[[7., 1.]]], dtype=float32)
    """
    op = "selective_state_update"
    xp = array_namespace(op, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
                         state_batch_indices=state_batch_indices, out=out)
    sizes = find_sizes(op, x, A, B, "batch")
    found = check_inputs(op, sizes, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, rows="batch")
    axes = "[slots, heads, head_dim, state_size]" if sizes.with_heads else "[slots, channels, state_size]"
    state_type = check_pool(op, "state", state, FLOATS, (None, *sizes.dims, sizes.state_size), axes, contiguous=True)
    batch, num_slots = x.shape[0], state.shape[0]
    check_slots(op, xp, "state_batch_indices", state_batch_indices, batch, num_slots)
    if out is None:
        out = xp.empty(x.shape, x.dtype)
    check_array(op, "out", out, found.x_type, x.shape, "the shape of x")
    check_writeable(op, "out", out)
    if x.size:
        pool = with_heads(state, sizes.with_heads)
        slot, head, dim, _ = strides(pool)
        plan = _plan_selective_state_update(
            batch, sizes.heads, sizes.head_dim, sizes.state_size, found.x_type, found.dt_type, state_type,
            found.state_decays, min(found.align, alignment(state)), arch_of(xp))
        launch(plan, make_args(plan, **{"in": found.fields}, out=head_view(with_heads(out, sizes.with_heads)),
                               state=state, slots=state_batch_indices, stride_slot=slot, stride_head=head,
                               stride_dim=dim, batch=batch, num_slots=num_slots))
    return out
