# SPDX-License-Identifier: Apache-2.0
"""Merging of attention results over disjoint key sets. Kernel: ``cuda_src/split_reduce.cu``."""

import functools

import numpy as np

from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, strides
from ..runtime.checks import (
    FLOATS,
    check_array,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
)

MAX_PARTS = 8   # fields of PartialList
_NO_PART = {"out": None, "lse": None, "sum": None, "stride_split": 0, "stride_token": 0, "stride_head": 0,
            "lse_split": 0, "lse_token": 0, "lse_head": 0, "sum_split": 0, "sum_token": 0, "sum_head": 0}


def _spec(out, vec):
    return Specialisation("split_reduce", "split_reduce", "SplitReduceArgs", {"U": out, "VEC": vec})


CORE = [_spec(out, vec) for out in FLOATS for vec in (4, 1)]


@functools.lru_cache(maxsize=4096)
def _plan_split_reduce(rows, head_dim, out, align, out_align, arch):
    """Plan from row count, row length, the dtype name of out, alignments in bytes of partials and out, and arch."""
    item = 4 if out == "float32" else 2
    vec = 4 if head_dim % 4 == 0 and align == 16 and out_align >= 4 * item else 1
    note = f"{vec} outputs per thread"
    if vec == 1:
        note += f": alignment {align} of partials, {out_align} of out, head_dim {head_dim}"
    items = rows * (head_dim // vec)
    threads = 32 if arch == "cpu" else 128
    per_thread = 16 if arch == "cpu" else 1   # a fiber costs more than a few more outputs
    return Plan(_spec(out, vec), arch, (-(-items // (threads * per_thread)),), (threads,), note=note)


def _part(out, lse, total=None):
    """PartialView of out [splits, tokens, heads, head_dim], lse and sum [splits, tokens, heads]."""
    fields = {"out": out, "lse": lse, "sum": total}
    for prefix, array in (("stride", out), ("lse", lse), ("sum", total)):
        steps = (0, 0, 0) if array is None else strides(array)
        fields |= zip((f"{prefix}_split", f"{prefix}_token", f"{prefix}_head"), steps[:3], strict=True)
    return fields


def launch_split_reduce(arch, parts, sinks, out, lse, lse_scale=1.0, split_counts=None):
    """Merge `parts`, tuples (out [splits, tokens, heads, head_dim], lse[, sum]), into [batch, q_len, heads, head_dim].

    Arguments are taken as they are: callers have checked them.
    """
    splits, tokens, heads, head_dim = parts[0][0].shape
    seq, token, head, _ = strides(out)
    plan = _plan_split_reduce(tokens * heads, head_dim, out.dtype.name, min(alignment(p[0]) for p in parts),
                              alignment(out), arch)
    views = [_part(*part) for part in parts] + [_NO_PART] * (MAX_PARTS - len(parts))
    launch(plan, make_args(
        plan, parts={f"part{i}": view for i, view in enumerate(views)},
        out={"data": out, "stride_seq": seq, "stride_token": token, "stride_head": head}, lse=lse, sinks=sinks,
        split_counts=split_counts, stride_counts=0 if split_counts is None else strides(split_counts)[0],
        num_parts=len(parts), splits=splits, tokens=tokens, heads=heads, head_dim=head_dim, q_len=out.shape[1],
        lse_scale=lse_scale, reserved=0))


def split_reduce(partial_out, partial_lse, /, *, partial_sum=None, lse_scale=1.0, split_counts=None, sinks=None,
                 out=None, return_lse=False):
    """Attention over a union of disjoint key sets, from the attention over each set.

    lse = log(sum_s w[s]),   out = sum_s w[s] * partial_out[s] / exp(lse),   w[s] = exp(partial_lse[s]),
    and with sinks out is multiplied by exp(lse) / (exp(lse) + exp(sink))

    Parameters
    ----------
    partial_out : ndarray [splits, tokens, heads, head_dim], float32, or a list of up to 8 of them
        Normalised attention over each key set. Any strides with a contiguous last axis; a list is read in place, and
        its arrays may be [tokens, heads, head_dim].
    partial_lse : ndarray [splits, tokens, heads], float32, or a list like partial_out
        Natural log-sum-exp of each key set. Where it is ``-inf``, `partial_out` may be anything.
    partial_sum : ndarray [splits, tokens, heads], float32, or a list like partial_out, optional
        For partials that are not normalised: what `partial_out` is yet to be divided by, when `partial_lse` is only the
        largest score of each key set. Their share in lse is ``partial_sum[s] * exp(partial_lse[s])``.
    lse_scale : float
        Positive; `partial_lse` is multiplied by it. Default 1.
    split_counts : ndarray [tokens], int32, optional
        How many of the splits count, from the first; rows of a token with 0 stay as they are. Needs `out`.
    sinks : ndarray [heads], float32, optional
        One more logit per head that takes probability and adds no value. Only for partials that do not hold it yet.
    out : ndarray [tokens, heads, head_dim], or with ``return_lse=True`` the pair ``(out, lse)``, optional
        Where to write; float16, bfloat16 or float32. Must overlap no input. Default: a new float32 array.
    return_lse : bool
        Also return the merged lse.

    Returns
    -------
    out : ndarray [tokens, heads, head_dim]
        Zeros where every split is empty.
    lse : ndarray [tokens, heads], float32, natural log
        Only with ``return_lse=True``. Of the keys alone, never the sink; ``-inf`` where every split is empty.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, or a last axis that is not contiguous.
    NotImplementedError
        A list of more than 8 partials; stack them in one array.

    Notes
    -----
    Splits are added in their order, so results are the same on every run; merging one partial returns its bits.
    On CuPy arrays asynchronous on the current stream. Kernel: ``cuda_src/split_reduce.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> partial_out = np.float32([1, 4]).reshape(2, 1, 1, 1)
    >>> partial_lse = np.log(np.float32([2, 1])).reshape(2, 1, 1)
    >>> cupyattn.split_reduce(partial_out, partial_lse)   # (2 * 1 + 1 * 4) / 3
    array([[[2.]]], dtype=float32)
    """
    op = "split_reduce"
    parts = _parts(partial_out, partial_lse, partial_sum)
    splits, tokens, heads, head_dim = parts[0][0].shape
    out, lse = split_out(op, out, return_lse)
    xp = array_namespace(op, partial_out=parts[0][0], sinks=sinks, split_counts=split_counts, out=out, lse=lse)
    check_number(op, "lse_scale", lse_scale)
    if lse_scale <= 0:
        raise ValueError(f"{op}: lse_scale must be greater than 0, got {lse_scale}")
    if split_counts is not None:
        check_dtype(op, "split_counts", split_counts, "int32")
        check_shape(op, "split_counts", split_counts, (tokens,), "[tokens]")
        check_element_strides(op, "split_counts", split_counts)
        if out is None or (return_lse and lse is None):
            raise ValueError(f"{op}: out must be given with split_counts, whose zeros leave rows as they are, got None")
    if out is None:
        out = xp.empty((tokens, heads, head_dim), np.float32)
    if return_lse and lse is None:
        lse = xp.empty((tokens, heads), np.float32)
    check_outputs(op, out, lse, (tokens, heads, head_dim), "[tokens, heads, head_dim]", FLOATS)
    check_sinks(op, sinks, heads)
    if out.size:
        launch_split_reduce(arch_of(xp), parts, sinks, out[:, None], lse, lse_scale, split_counts)
    return (out, lse) if return_lse else out


def _parts(partial_out, partial_lse, partial_sum):
    """Checked tuples (out [splits, tokens, heads, head_dim], lse, sum or None [splits, tokens, heads])."""
    op = "split_reduce"
    given = {"partial_out": partial_out, "partial_lse": partial_lse, "partial_sum": partial_sum}
    given = {name: arrays for name, arrays in given.items() if arrays is not None}
    if isinstance(partial_out, (list, tuple)):
        counts = {len(a) if isinstance(a, (list, tuple)) else type(a).__name__ for a in given.values()}
        if counts != {len(partial_out)} or not partial_out:
            raise ValueError(f"{op}: {' and '.join(given)} must be lists of the same length ≥ 1, got "
                             f"{' and '.join(str(c) for c in counts)}")
        if len(partial_out) > MAX_PARTS:
            raise NotImplementedError(f"{op}: a list of partials may hold up to {MAX_PARTS}, got {len(partial_out)}; "
                                      "stack them in one array")
    else:
        given = {name: [array] for name, array in given.items()}
    array_namespace(op, **{f"{name}[{i}]": a for name, arrays in given.items() for i, a in enumerate(arrays)})
    listed = isinstance(partial_out, (list, tuple))
    parts = []
    for part in zip(*given.values(), strict=True):
        if listed and part[0].ndim == 3:   # one split
            part = tuple(array[None] for array in part)
        parts.append(part)
    if parts[0][0].ndim != 4:
        raise ValueError(f"{op}: partial_out must be [splits, tokens, heads, head_dim], got {list(parts[0][0].shape)}")
    shape = parts[0][0].shape
    if shape[0] == 0:
        raise ValueError(f"{op}: partial_out must hold at least one split, got {list(shape)}")
    for part in parts:
        for name, array in zip(given, part, strict=True):
            whole = name == "partial_out"
            check_shape(op, name, array, shape if whole else shape[:3],
                        "[splits, tokens, heads, head_dim]" if whole else "[splits, tokens, heads]")
            check_dtype(op, name, array, "float32")
            check_element_strides(op, name, array)
        check_last_axis(op, "partial_out", part[0])
    return parts


def split_out(op, out, return_lse):
    """(out, lse) from the `out` argument of an op: with ``return_lse=True`` it is a pair."""
    if not return_lse or out is None:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"{op}: out must be the pair (out, lse) with return_lse=True, got {type(out).__name__}")
    return out


def check_outputs(op, out, lse, shape, axes, dtypes):
    """out has `shape` and one of `dtypes`; lse, if any, is contiguous float32 of `shape` without the last axis."""
    check_array(op, "out", out, dtypes, shape, axes)
    check_writeable(op, "out", out)
    if lse is not None:
        check_dtype(op, "lse", lse, "float32")
        check_shape(op, "lse", lse, shape[:-1], axes.replace(", head_dim", ""))
        check_writeable(op, "lse", lse)
        if not lse.flags.c_contiguous:
            raise ValueError(f"{op}: lse must be contiguous, got strides {lse.strides}")


def check_sinks(op, sinks, heads):
    """sinks, if any, is contiguous float32 [heads]."""
    if sinks is not None:
        check_dtype(op, "sinks", sinks, "float32")
        check_shape(op, "sinks", sinks, (heads,), "[heads]")
        check_last_axis(op, "sinks", sinks)
