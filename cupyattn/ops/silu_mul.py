# SPDX-License-Identifier: Apache-2.0
"""The gated activation of a feed-forward layer. Kernel: ``cuda_src/silu_mul.cu``."""

import functools

from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import FLOATS, check_dtype, check_shape, check_writeable


def _spec(dtype, vec):
    return Specialisation("silu_mul", "silu_mul", "SiluMulArgs", {"T": dtype, "VEC": vec})


CORE = [_spec("float16", 8), _spec("bfloat16", 8), _spec("float32", 4),
        _spec("float16", 1), _spec("bfloat16", 1), _spec("float32", 1)]


@functools.lru_cache(maxsize=4096)
def _plan_silu_mul(rows, cols, dtype, align, arch):
    """Plan from sizes, the dtype's name, the common alignment in bytes, and arch."""
    wide = 4 if dtype == "float32" else 8
    vec = wide if align == 16 and cols % wide == 0 else 1
    if arch == "cpu":
        threads, blocks = 1, -(-cols // 8192)   # nothing is shared between threads: one fiber per stretch of a row
    else:
        threads = min(256, -(-cols // (32 * vec)) * 32)
        blocks = min(65535, -(-cols // (threads * vec)))
    note = f"{vec} elements per load" if vec > 1 else f"one element per load: alignment {align}, {cols} columns"
    return Plan(_spec(dtype, vec), arch, (rows, blocks), (threads,), note=note)


def silu_mul(gate, up, /, *, out=None):
    """SiLU of `gate` times `up`, as in SwiGLU feed-forward layers.

    out = gate * sigmoid(gate) * up

    Parameters
    ----------
    gate, up : ndarray [..., cols], float16, bfloat16 or float32
        One dtype. Rows may be strided, e.g. the two halves of a fused projection's output
        ``gate_up[:, :cols], gate_up[:, cols:]``; the last axis is contiguous.
    out : ndarray [..., cols], dtype of gate, optional
        Where to write. Must be `gate` or `up` itself or overlap neither.

    Returns
    -------
    out : ndarray [..., cols], dtype of gate
        Same kind (NumPy or CuPy) as `gate`.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, or a last axis that is not contiguous.

    Notes
    -----
    Computed in float32 with one rounding on store. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/silu_mul.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> gate_up = np.float32([[0, 2, 5, 10]])
    >>> cupyattn.silu_mul(gate_up[:, :2], gate_up[:, 2:])
    array([[ 0.     , 17.61594]], dtype=float32)
    """
    if out is None:
        out = array_namespace("silu_mul", gate=gate).empty(gate.shape, gate.dtype)
    _prepared.launch((gate, up, out))
    return out


@Prepared
def _prepared(gate, up, out):
    """The launch for arrays of these kinds; None where there is nothing to do."""
    xp = array_namespace("silu_mul", gate=gate, up=up, out=out)
    dtype = check_dtype("silu_mul", "gate", gate, FLOATS)
    rows = {"gate": gate, "up": up, "out": out}
    for name, array in rows.items():
        check_dtype("silu_mul", name, array, dtype)
        check_shape("silu_mul", name, array, gate.shape, "[..., cols]")
        rows[name] = as_rows("silu_mul", name, array)
    check_writeable("silu_mul", "out", out)
    if gate.size == 0:
        return None
    num_rows, cols = rows["gate"].shape
    plan = _plan_silu_mul(num_rows, cols, dtype, min(alignment(a) for a in rows.values()), arch_of(xp))
    return Template(plan, make_args(plan, gate=row_view(rows["gate"]), up=row_view(rows["up"]),
                                    out=row_view(rows["out"]), rows=num_rows, cols=cols))
