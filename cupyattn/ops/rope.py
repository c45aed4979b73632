# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding. Kernel: ``cuda_src/rope.cu``."""

import functools
import itertools

import numpy as np

from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, env, make_args
from ..runtime.arrays import alignment, array_namespace, head_view, strides
from ..runtime.checks import (
    FLOATS,
    check_array,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
    value_range,
)

STYLES = ("neox", "interleaved")
TABLES = ("float32", "float16")


def _spec(x, table, style, table_stride, vec):
    return Specialisation("rope", "rope", "RopeArgs",
                          {"T": x, "TABLE": table, "VEC": vec, "TABLE_STRIDE": table_stride,
                           "INTERLEAVED": int(style == "interleaved")})


CORE = [_spec(*case) for case in (
    ("float16", "float32", "neox", 1, 8), ("float16", "float32", "interleaved", 1, 8),
    ("bfloat16", "float32", "neox", 1, 8), ("bfloat16", "float16", "interleaved", 2, 8),
    ("float32", "float32", "neox", 1, 4), ("float32", "float32", "interleaved", 1, 4),
    ("float32", "float16", "interleaved", 2, 1), ("float16", "float16", "neox", 1, 1),
    ("bfloat16", "float32", "interleaved", 1, 1), ("float32", "float32", "neox", 1, 1),
)]


def more_specs():
    """Every legal one."""
    for x, table, (style, stride) in itertools.product(FLOATS, TABLES, (
            ("neox", 1), ("interleaved", 1), ("interleaved", 2))):
        for vec in (1, 4 if x == "float32" else 8):
            yield _spec(x, table, style, stride, vec)


@functools.lru_cache(maxsize=4096)
def _plan_rope(tokens, heads, head_dim, rotary_dim, x, table, style, table_stride, align, arch):
    """Plan from sizes, dtype names, the common alignment in bytes, and arch."""
    vec = 16 // (4 if x == "float32" else 2)
    note = f"{vec} elements per access"
    if align < 16 or (rotary_dim // 2) % vec or head_dim % vec:
        vec, note = 1, f"one element per access: alignment {align}, head_dim {head_dim}, rotary_dim {rotary_dim}"
    spec = _spec(x, table, style, table_stride, vec)
    if arch == "cpu":  # one thread strides over everything: a second one must be worth its start
        return Plan(spec, arch, (min(tokens, -(-tokens * heads * head_dim // 16384)),), (1,), note=note)
    pairs = vec // 2 if style == "interleaved" and vec > 1 else vec   # of a thread at a time
    lanes = min(128, rotary_dim // 2 // pairs)
    rows = min(heads, 128 // lanes)
    depth = min(tokens, 64, max(1, 128 // (lanes * rows)))   # a block is at most 64 deep
    # many tokens: a thread keeps its part of the tables for up to four heads; few tokens: more blocks instead
    heads_per_thread = 4 if tokens >= 1024 else 1
    grid = (-(-tokens // depth), -(-heads // (rows * heads_per_thread)))
    return Plan(spec, arch, grid, (lanes, rows, depth), note=note)


def _check_table(name, table, rotary_dim):
    """Check a table; returns its dtype's name."""
    dtype = check_dtype("rope", name, table, TABLES)
    if table.ndim != 2 or table.shape[1] not in (rotary_dim // 2, rotary_dim):
        raise ValueError(f"rope: {name} must be [max_pos, {rotary_dim // 2}] or [max_pos, {rotary_dim}], got "
                         f"{list(table.shape)}; give rotary_dim= when fewer dims than head_dim are rotated")
    check_last_axis("rope", name, table)
    check_element_strides("rope", name, table)
    return dtype


def _check_positions(positions, max_pos):
    low, high = value_range(positions)
    if low < 0 or high >= max_pos:
        raise ValueError(f"rope: positions must be in [0, {max_pos}), the rows of cos and sin, got "
                         f"{low if low < 0 else high}")


def rope(x, /, *, cos, sin, positions, style="neox", rotary_dim=None, out=None):
    """Rotary position embedding of every head of every token.

    For pair j of a head, with elements (x0, x1) and p = positions[t]:

    out0 = x0 * cos[p, j] - x1 * sin[p, j],   out1 = x1 * cos[p, j] + x0 * sin[p, j]

    Parameters
    ----------
    x : ndarray [tokens, num_heads, head_dim], float16, bfloat16 or float32
        Queries or keys. Tokens and heads may be strided (a slice of a fused projection); the last axis is contiguous.
    cos, sin : ndarray [max_pos, rotary_dim / 2], float32 or float16
        Tables, e.g. of ``RopeParams.tables(max_pos)``. Full-width tables [max_pos, rotary_dim], which hold every pair
        twice, are read in place: their first half for "neox", every second column for "interleaved".
    positions : ndarray [tokens], int32
        Table row of each token. Out of range: ValueError for NumPy arrays, a row of NaN for CuPy arrays.
    style : "neox" or "interleaved"
        Pair j is elements (j, j + rotary_dim/2) for "neox", (2j, 2j + 1) for "interleaved" (GPT-J, GGUF's llama).
    rotary_dim : int, optional
        Rotated elements, the first ones of a head; even. The others are copied. Default ``head_dim``.
    out : ndarray [tokens, num_heads, head_dim], dtype of x, optional
        Where to write. Must be `x` itself or overlap no input.

    Returns
    -------
    out : ndarray [tokens, num_heads, head_dim], dtype of x

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, a last axis that is not contiguous, or a position out of range.

    Notes
    -----
    Computed in float32 with one rounding on store. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/rope.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> quarter_turn = np.float32([[1], [0]]), np.float32([[0], [1]])   # cos and sin at positions 0 and 1
    >>> x = np.float32([[[3, 4]], [[3, 4]]])
    >>> cupyattn.rope(x, cos=quarter_turn[0], sin=quarter_turn[1], positions=np.int32([0, 1]))
    array([[[ 3.,  4.]],
    <BLANKLINE>
           [[-4.,  3.]]], dtype=float32)
    """
    if out is None:
        out = array_namespace("rope", x=x).empty(x.shape, x.dtype)
    found, *where = _prepared((x, cos, sin, positions, out), style, rotary_dim)
    if found is not None:
        if isinstance(x, np.ndarray) or env.check():
            _check_positions(positions, len(cos))
        found.launch(*where)
    return out


@Prepared
def _prepared(x, cos, sin, positions, out, style, rotary_dim):
    """The launch for arrays of these kinds; None where there is nothing to do."""
    xp = array_namespace("rope", x=x, cos=cos, sin=sin, positions=positions, out=out)
    dtype = check_dtype("rope", "x", x, FLOATS)
    check_shape("rope", "x", x, (None, None, None), "[tokens, num_heads, head_dim]")
    tokens, heads, head_dim = x.shape
    if style not in STYLES:
        raise ValueError(f"rope: style must be one of {STYLES}, got {style!r}")
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_number("rope", "rotary_dim", rotary_dim, integer=True)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"rope: rotary_dim must be even and in [2, head_dim={head_dim}], got {rotary_dim}")
    check_dtype("rope", "out", out, dtype)
    check_shape("rope", "out", out, x.shape, "[tokens, num_heads, head_dim]")
    check_writeable("rope", "out", out)
    for name, array in (("x", x), ("out", out)):
        check_last_axis("rope", name, array)
        check_element_strides("rope", name, array)
    table = _check_table("cos", cos, rotary_dim)
    check_shape("rope", "sin", sin, cos.shape, "the shape of cos")
    check_dtype("rope", "sin", sin, table)
    _check_table("sin", sin, rotary_dim)
    max_pos, width = cos.shape
    table_stride = 2 if style == "interleaved" and width == rotary_dim else 1
    check_array("rope", "positions", positions, "int32", (tokens,), "[tokens]", contiguous=False)
    if x.size == 0:
        return None
    plan = _plan_rope(tokens, heads, head_dim, rotary_dim, dtype, table, style, table_stride,
                      min(alignment(a) for a in (x, out, cos, sin)), arch_of(xp))
    return Template(plan, make_args(
        plan, x=head_view(x), out=head_view(out), cos=cos, sin=sin, positions=positions, stride_cos=strides(cos)[0],
        stride_sin=strides(sin)[0], stride_position=strides(positions)[0], tokens=tokens, heads=heads,
        head_dim=head_dim, rotary_dim=rotary_dim, max_pos=max_pos, reserved=0))
