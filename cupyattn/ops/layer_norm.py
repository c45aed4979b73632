# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation. Kernel: ``cuda_src/layer_norm.cu``."""

import functools
import itertools

from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import FLOATS, check_dtype, check_last_axis, check_number, check_shape, check_writeable


def _spec(x, weight, out, bias, vec):
    return Specialisation("layer_norm", "layer_norm", "LayerNormArgs",
                          {"T": x, "W": weight, "U": out, "BIAS": int(bias), "VEC": vec})


CORE = [_spec(*case) for case in (
    ("float16", "float16", "float16", True, 8), ("bfloat16", "bfloat16", "bfloat16", True, 8),
    ("float32", "float32", "float32", True, 4), ("float32", "float32", "float32", False, 4),
    ("float16", "float32", "float16", False, 4), ("bfloat16", "float32", "bfloat16", False, 1),
    ("float32", "float32", "float16", True, 1), ("float16", "float16", "float32", False, 1),
    ("bfloat16", "bfloat16", "float32", True, 4), ("float32", "float32", "bfloat16", True, 4),
)]


def more_specs():
    """Every legal one."""
    for x, out, bias in itertools.product(FLOATS, FLOATS, (False, True)):
        for weight in dict.fromkeys((x, "float32")):
            for vec in (1, 4 if "float32" in (x, weight, out) else 8):
                yield _spec(x, weight, out, bias, vec)


@functools.lru_cache(maxsize=4096)
def _plan_layer_norm(rows, hidden, x, weight, out, bias, align, arch):
    """Plan from sizes, dtype names, the presence of a bias, the common alignment in bytes, and arch."""
    wide = 4 if "float32" in (x, weight, out) else 8
    vec = wide if align == 16 and hidden % wide == 0 else 1
    if arch == "cpu":
        threads = 32   # a fiber costs more than a few more elements
    else:
        threads = min(1024, -(-hidden // (32 * vec)) * 32)
    note = f"{vec} elements per load" if vec > 1 else f"one element per load: alignment {align}, hidden {hidden}"
    return Plan(_spec(x, weight, out, bias, vec), arch, (rows,), (threads,), shared_bytes=256, note=note)


def layer_norm(x, weight, bias=None, /, *, eps=1e-5, out_dtype=None, out=None):
    """Layer normalisation over the last axis.

    out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias

    Parameters
    ----------
    x : ndarray [..., hidden], float16, bfloat16 or float32
        Rows may be strided (a slice of a wider array); the last axis is contiguous.
    weight : ndarray [hidden], float32 or x.dtype
        Gain per channel.
    bias : ndarray [hidden], weight.dtype, optional
        Added per channel.
    eps : float
        Added to the variance. Default 1e-5, at least 0.
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
    Computed in float32 with one rounding on store; the variance is taken around the mean in a second pass, so a large
    common offset costs no accuracy. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/layer_norm.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cupyattn.layer_norm(np.float32([[1, 3]]), np.ones(2, np.float32), np.float32([0, 10]), eps=0.0)
    array([[-1., 11.]], dtype=float32)
    """
    if out is None:
        xp = array_namespace("layer_norm", x=x)
        out = xp.empty(x.shape, x.dtype if out_dtype is None else out_dtype)
    _prepared.launch((x, weight, bias, out), eps)
    return out


@Prepared
def _prepared(x, weight, bias, out, eps):
    """The launch for arrays of these kinds; None where there is nothing to do."""
    xp = array_namespace("layer_norm", x=x, weight=weight, bias=bias, out=out)
    x_type = check_dtype("layer_norm", "x", x, FLOATS)
    hidden = x.shape[-1] if x.ndim else 0
    weight_type = check_dtype("layer_norm", "weight", weight, ("float32", x_type))
    channels = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, array in channels.items():
        check_shape("layer_norm", name, array, (hidden,), "[hidden]")
        check_dtype("layer_norm", name, array, weight_type)
        check_last_axis("layer_norm", name, array)
    out_type = check_dtype("layer_norm", "out", out, FLOATS)
    check_shape("layer_norm", "out", out, x.shape, "[..., hidden]")
    check_writeable("layer_norm", "out", out)
    check_number("layer_norm", "eps", eps, least=0)
    x_rows, out_rows = as_rows("layer_norm", "x", x), as_rows("layer_norm", "out", out)
    if x.size == 0:
        return None
    plan = _plan_layer_norm(
        x_rows.shape[0], hidden, x_type, weight_type, out_type, bias is not None,
        min(alignment(a) for a in (x_rows, out_rows, *channels.values())), arch_of(xp))
    return Template(plan, make_args(plan, x=row_view(x_rows), weight=weight, bias=bias, out=row_view(out_rows),
                                    rows=x_rows.shape[0], hidden=hidden, eps=eps, reserved=0))
