# SPDX-License-Identifier: Apache-2.0
"""The arguments both selective kernels share: checked, and brought from Mamba-1's shapes to those of heads."""

import math
from typing import NamedTuple

from .runtime.arrays import alignment, head_view, strides
from .runtime.checks import FLOATS, check_array, check_flag, check_number, check_shape

_NONE = {"data": None, "stride_head": 0, "stride_dim": 0}


class Sizes(NamedTuple):
    """Of one model: Mamba-1 is one head of all channels."""

    heads: int
    head_dim: int
    state_size: int
    groups: int
    with_heads: bool     # Mamba-2's shapes

    @property
    def dims(self):
        """Shape of a token of x."""
        return (self.heads, self.head_dim) if self.with_heads else (self.head_dim,)


class Selective(NamedTuple):
    """What `check_inputs` has found."""

    sizes: Sizes
    fields: dict          # of SelectiveInputs
    x_type: str
    dt_type: str
    state_decays: bool    # A has an axis of states
    align: int            # bytes, of B, C and A
    per_head: bool        # all dims of a head have one step and one rate


def with_heads(array, heads):
    """`array` [tokens, channels] as [tokens, 1, channels] if Mamba-1's, `heads` False."""
    return array if heads else array[:, None]


def _check_state_size(op, name, array):
    if not array.shape[-1]:
        raise ValueError(f"{op}: {name} must have a state_size of at least 1, got {list(array.shape)}")


def find_sizes(op, x, A, B, rows):
    """Sizes from the ranks of `x` and `A`; `rows` names the first axis of x."""
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: x must be [{rows}, channels] or [{rows}, heads, head_dim], got {list(x.shape)}")
    if x.ndim == 2:
        check_shape(op, "A", A, (x.shape[1], None), "[channels, state_size]")
        _check_state_size(op, "A", A)
        return Sizes(1, x.shape[1], A.shape[1], 1, False)
    heads, head_dim = x.shape[1:]
    if A.ndim not in (1, 3):
        raise ValueError(f"{op}: A must be [heads] or [heads, head_dim, state_size], got {list(A.shape)}")
    check_shape(op, "A", A, (heads,) if A.ndim == 1 else (heads, head_dim, None),
                "[heads]" if A.ndim == 1 else "[heads, head_dim, state_size]")
    check_shape(op, "B", B, (x.shape[0], None, None), f"[{rows}, groups, state_size]")
    _check_state_size(op, "B", B)
    groups = B.shape[1]
    if heads and (groups == 0 or heads % groups):
        raise ValueError(f"{op}: B must have a number of groups that divides the {heads} heads, got {groups}")
    return Sizes(heads, head_dim, B.shape[2], max(1, groups), True)


def _per_channel(op, name, array, sizes):
    """PerChannel of a float32 vector: [channels], [heads] or [heads, head_dim]."""
    if array is None:
        return _NONE
    if not sizes.with_heads:
        check_array(op, name, array, "float32", (sizes.head_dim,), "[channels]", contiguous=False)
        return {"data": array, "stride_head": 0, "stride_dim": strides(array)[0]}
    shape, axes = ((sizes.heads,), "[heads]") if array.ndim == 1 else (sizes.dims, "[heads, head_dim]")
    check_array(op, name, array, "float32", shape, axes, contiguous=False)
    head, *dim = strides(array)
    return {"data": array, "stride_head": head, "stride_dim": dim[0] if dim else 0}


def _rates(op, A, sizes):
    """PerChannel of A, and whether it has an axis of states; one that repeats its numbers counts as none."""
    if A.ndim == 1:
        check_array(op, "A", A, "float32", (sizes.heads,), "[heads]", contiguous=False)
        return {"data": A, "stride_head": strides(A)[0], "stride_dim": 0}, False
    shape = (sizes.heads, sizes.head_dim, sizes.state_size) if sizes.with_heads else (sizes.head_dim, sizes.state_size)
    repeats = A.strides[-1] == 0 or sizes.state_size == 1
    check_array(op, "A", A, "float32", shape, "[..., state_size]", contiguous=not repeats)
    *head, dim, _ = strides(A)
    if sizes.head_dim == 1 and repeats:
        dim = 0
    return {"data": A, "stride_head": head[0] if head else 0, "stride_dim": dim}, not repeats


def _steps(op, dt, x_type, sizes, tokens, rows):
    """StepView of dt, its dtype's name."""
    types = tuple(dict.fromkeys(("float32", x_type)))
    if sizes.with_heads and dt.ndim == 2:
        found = check_array(op, "dt", dt, types, (tokens, sizes.heads), f"[{rows}, heads]",
                            contiguous=False)
        return {"data": dt, **dict(zip(("stride_token", "stride_head"), strides(dt), strict=True)),
                "stride_dim": 0}, found
    found = check_array(op, "dt", dt, types, (tokens, *sizes.dims), "the shape of x", contiguous=False)
    token, *head, dim = strides(dt)
    return {"data": dt, "stride_token": token, "stride_head": head[0] if head else 0, "stride_dim": dim}, found


def _limits(op, dt_limit):
    if dt_limit is None:
        return -math.inf, math.inf
    try:
        low, high = dt_limit
    except (TypeError, ValueError):
        raise TypeError(f"{op}: dt_limit must be a pair (smallest, largest) or None, got {dt_limit!r}") from None
    for value in (low, high):
        if value not in (-math.inf, math.inf):
            check_number(op, "dt_limit", value)
    if not low <= high:
        raise ValueError(f"{op}: dt_limit must be (smallest, largest), got {dt_limit!r}")
    return low, high


def check_inputs(op, sizes, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, *, rows):
    """All inputs fit `sizes`; returns Selective. `rows` names the first axis: batch or tokens."""
    tokens = x.shape[0]
    x_type = check_array(op, "x", x, FLOATS, (tokens, *sizes.dims), f"[{rows}, ...]")
    if z is not None:
        check_array(op, "z", z, x_type, x.shape, "the shape of x")
    states = (sizes.groups, sizes.state_size) if sizes.with_heads else (sizes.state_size,)
    for name, array in (("B", B), ("C", C)):
        check_array(op, name, array, x_type, (tokens, *states),
                    f"[{rows}, groups, state_size]" if sizes.with_heads else f"[{rows}, state_size]")
    check_flag(op, "dt_softplus", dt_softplus)
    low, high = _limits(op, dt_limit)
    steps, dt_type = _steps(op, dt, x_type, sizes, tokens, rows)
    rates, state_decays = _rates(op, A, sizes)
    bias = _per_channel(op, "dt_bias", dt_bias, sizes)

    def heads(array):
        return None if array is None else head_view(with_heads(array, sizes.with_heads))

    fields = {"x": heads(x), "z": heads(z), "B": heads(B), "C": heads(C), "dt": steps, "A": rates,
              "D": _per_channel(op, "D", D, sizes), "dt_bias": bias, "heads": sizes.heads, "head_dim": sizes.head_dim,
              "state_size": sizes.state_size, "heads_per_group": sizes.heads // sizes.groups,
              "softplus": int(dt_softplus), "dt_min": low, "dt_max": high, "reserved": 0}
    align = min(alignment(array) for array in ((A, B, C) if state_decays else (B, C)))
    return Selective(sizes, fields, x_type, dt_type, state_decays, align,
                     not state_decays and not any(view["stride_dim"] for view in (steps, rates, bias)))
