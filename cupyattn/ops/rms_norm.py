# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation. Kernel: ``cuda_src/rms_norm.cu``."""

import functools
import itertools

from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import (
    FLOATS,
    check_dtype,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
    out_dtype_or,
)


def _spec(x, weight, residual, out, vec):
    return Specialisation("rms_norm", "rms_norm", "RmsNormArgs",
                          {"T": x, "W": weight, "R": residual or "float32", "U": out, "VEC": vec,
                           "RESIDUAL": int(residual is not None)})


CORE = [_spec(*case) for case in (
    ("float16", "float32", None, "float16", 8), ("bfloat16", "float32", "float32", "bfloat16", 8),
    ("float32", "float32", "float32", "float16", 4), ("float32", "float32", None, "float32", 4),
    ("float16", "float16", "float16", "float16", 8), ("bfloat16", "bfloat16", "bfloat16", "bfloat16", 8),
    ("float16", "float16", "float32", "float32", 1), ("float32", "float32", "float32", "bfloat16", 1),
    ("bfloat16", "bfloat16", None, "float32", 4),
)]


def more_specs():
    """Every legal one."""
    for x, out, vec in itertools.product(FLOATS, FLOATS, (1, 4, 8)):
        for weight, residual in itertools.product(dict.fromkeys((x, "float32")), dict.fromkeys((None, x, "float32"))):
            yield _spec(x, weight, residual, out, vec)


@functools.lru_cache(maxsize=4096)
def _plan_rms_norm(rows, hidden, x, weight, residual, out, align, arch):
    """Plan from sizes, dtype names, the common alignment in bytes, and arch."""
    widest = max(4 if name == "float32" else 2 for name in (x, weight, residual or x, out))
    vec = 16 // widest if align == 16 and hidden % (16 // widest) == 0 else 1
    if arch == "cpu":
        threads = 32   # a fiber costs more than a few more elements
    else:
        threads = min(1024, -(-hidden // (32 * vec)) * 32)
    note = f"{vec} elements per load" if vec > 1 else f"one element per load: alignment {align}, hidden {hidden}"
    return Plan(_spec(x, weight, residual, out, vec), arch, (rows,), (threads,), shared_bytes=128, note=note)


def rms_norm(x, weight, /, *, eps=1e-6, residual=None, out_dtype=None, out=None):
    """Root-mean-square normalisation over the last axis, optionally after adding to a residual stream.

    out = h * weight / sqrt(mean(h**2, axis=-1) + eps),   h = x, or residual after ``residual += x``

    Parameters
    ----------
    x : ndarray [..., hidden], float16, bfloat16 or float32
        Rows may be strided (a slice of a wider array); the last axis is contiguous.
    weight : ndarray [hidden], float32 or x.dtype
        Gain per channel.
    eps : float
        Added to the mean square. Default 1e-6, at least 0.
    residual : ndarray [..., hidden], float32 or x.dtype, optional
        Updated in place: ``residual += x``, rounded to its dtype; the norm is taken of the updated values.
        Must overlap no other array.
    out_dtype : dtype, optional
        Default ``x.dtype``; ignored when `out` is given.
    out : ndarray [..., hidden], optional
        Where to write; float16, bfloat16 or float32. Must be `x` itself or overlap no input.

    Returns
    -------
    out : ndarray [..., hidden]
        Same kind (NumPy or CuPy) as `x`.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or an `eps` that is no number.
    ValueError
        Shapes that do not fit, a last axis that is not contiguous, or an `eps` that is negative or not finite.

    Notes
    -----
    Computed in float32 with one rounding on store. An infinity in float16, what a sum there overflows to, counts as
    65504 with its sign, so that the rest of its row remains; in `residual` it stays infinite. Of other dtypes it gives
    NaN and makes the rest of its row 0. NaN makes a row NaN. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/rms_norm.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cupyattn.rms_norm(np.float32([[3, 4]]), np.ones(2, np.float32), eps=0.0)
    array([[0.84852815, 1.1313709 ]], dtype=float32)
    """
    if out is None:
        xp = array_namespace("rms_norm", x=x)
        out = xp.empty(x.shape, out_dtype_or("rms_norm", out_dtype, x.dtype))
    _prepared.launch((x, weight, residual, out), eps)
    return out


@Prepared
def _prepared(x, weight, residual, out, eps):
    """The launch for arrays of these kinds; None where there is nothing to do."""
    xp = array_namespace("rms_norm", x=x, weight=weight, residual=residual, out=out)
    x_type = check_dtype("rms_norm", "x", x, FLOATS)
    hidden = x.shape[-1] if x.ndim else 0
    check_shape("rms_norm", "weight", weight, (hidden,), "[hidden]")
    weight_type = check_dtype("rms_norm", "weight", weight, ("float32", x_type))
    out_type = check_dtype("rms_norm", "out", out, FLOATS)
    rows, residual_type = {"x": x, "out": out}, None
    if residual is not None:
        residual_type = check_dtype("rms_norm", "residual", residual, ("float32", x_type))
        check_writeable("rms_norm", "residual", residual)
        rows["residual"] = residual
    for name, array in rows.items():
        check_shape("rms_norm", name, array, x.shape, "[..., hidden]")
        rows[name] = as_rows("rms_norm", name, array)
    check_writeable("rms_norm", "out", out)
    check_number("rms_norm", "eps", eps, least=0)
    check_last_axis("rms_norm", "weight", weight)
    if x.size == 0:
        return None
    plan = _plan_rms_norm(
        rows["x"].shape[0], hidden, x_type, weight_type, residual_type, out_type,
        min(alignment(a) for a in (*rows.values(), weight)), arch_of(xp))
    return Template(plan, make_args(
        plan, x=row_view(rows["x"]), weight=weight, residual=row_view(rows.get("residual")), out=row_view(rows["out"]),
        rows=rows["x"].shape[0], hidden=hidden, eps=eps, reserved=0))
