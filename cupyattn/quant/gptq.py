# SPDX-License-Identifier: Apache-2.0
"""GPTQ (AutoGPTQ, GPTQModel): w[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]).

    qweight    int32 [ceil(K * bits / 32), N]    stream down K
    scales     [groups, N]
    qzeros     int32 [groups, ceil(N * bits / 32)]    stream along N
    g_idx      int32 [K], optional    group of each column

Two conventions of the fields of qzeros: "gptq" (v1) stores zero - 1, "gptq_v2" stores zero.
"""

import warnings

import numpy as np

from .bit_stream import unpack_stream
from .coded import CodedWeight, Segment
from .groups import group_columns
from .tensors import SCALES, WORDS, check_shape, only, take, zero_points

BITS = (2, 3, 4, 8)
CONVENTIONS = ("gptq", "gptq_v2")


def read(tensors, bits=None, group_size=None, *, checkpoint_format=None, sym=None, zero_wrap=True, in_features=None):
    """A GPTQ weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``qweight``, ``scales`` (float16, bfloat16 or float32), ``qzeros`` and perhaps ``g_idx``.
    bits : int, optional
        2, 3, 4 or 8. Default what the shapes say.
    group_size : int, optional
        -1 for all of K. Default what the shapes say; not looked at for act-order, where ``g_idx`` says all.
    checkpoint_format : str, optional
        ``"gptq"``, the default, or ``"gptq_v2"``. Warned of and overruled when every field says the other one:
        2^(bits-1) - 1 is what v1 stores for a symmetric weight, 2^(bits-1) what v2 does.
    sym : bool, optional
        False: not symmetric, so the label is believed whatever the fields.
    zero_wrap : bool or "word"
        For v1, what field 2^bits - 1 stands for: zero point 0, whose ``zero - 1`` wrapped around (True), or 2^bits,
        as kernels read it that add 1 and wrap nothing (False). "word": the writer subtracted 1 from all fields of a
        word at once, as GPTQModel does, and a zero point of 0 borrowed from the next field; not for 3 bits, whose
        fields it takes one by one.
    in_features : int, optional
        K. Default the length of ``g_idx``, else what the words of ``qweight`` hold.

    Returns
    -------
    CodedWeight

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    NotImplementedError
        Another `checkpoint_format` or number of bits.
    """
    if zero_wrap not in (True, False, "word"):
        raise ValueError(f"QMatrix: zero_wrap must be True, False or 'word', got {zero_wrap!r}")
    if checkpoint_format not in (None, *CONVENTIONS):
        raise NotImplementedError(f"QMatrix: checkpoint_format must be one of {', '.join(CONVENTIONS)}, "
                                  f"got {checkpoint_format!r}")
    qweight = take(tensors, "qweight", WORDS, (None, None))
    scales = take(tensors, "scales", SCALES, (None, qweight.shape[1]))
    groups, rows = scales.shape
    qzeros = take(tensors, "qzeros", WORDS, (groups, None))
    g_idx = take(tensors, "g_idx", ("int32", "int64"), (in_features,)) if "g_idx" in tensors else None
    in_features = len(g_idx) if g_idx is not None else in_features
    bits = _bits(bits, qweight, qzeros, in_features)
    if in_features is None:
        in_features = only("in_features", [len(qweight) * 32 // bits] if len(qweight) * 32 % bits == 0 else [],
                           f"{len(qweight)} words of {bits}-bit codes")
    shape = check_shape((rows, in_features))

    group, index, order = group_columns(in_features, groups, group_size, g_idx)
    codes = unpack_stream(qweight, bits, 0, in_features).T
    codes = np.ascontiguousarray(codes) if order is None else np.take(codes, order, axis=1, mode="wrap")
    zero = _zeros(qzeros, bits, rows, checkpoint_format or "gptq", sym, zero_wrap)
    centre = 1 << bits - 1
    scale = np.ascontiguousarray(scales[index].T)
    zero = zero_points(np.ascontiguousarray((zero - centre)[index].T), scale)
    return CodedWeight("gptq", shape, (Segment(codes, bits, "int", group, scale, centre, zero),), order)


def _bits(bits, qweight, qzeros, in_features):
    """The number of bits that gives both tensors their shape; if several do, one that fills the words of a row."""
    if bits is not None and bits not in BITS:
        raise NotImplementedError(f"QMatrix: bits must be one of {BITS} for gptq, got {bits!r}")
    rows, width = qweight.shape[1], qzeros.shape[1]
    fit = [b for b in BITS if bits in (None, b) and width == -(-rows * b // 32)
           and (in_features is None or len(qweight) == -(-in_features * b // 32))]
    full = [b for b in fit if rows * b == 32 * width]
    columns = "" if in_features is None else f" and K = {in_features}"
    return only("bits", full or fit, f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}{columns}")


def _zeros(words, bits, rows, convention, sym, zero_wrap):
    """Zero points, int16 [groups, rows], of the words of qzeros."""
    fields = unpack_stream(words, bits, 1, rows).astype(np.int16)
    centre = 1 << bits - 1
    other = {"gptq": centre, "gptq_v2": centre - 1}[convention]   # all fields of a symmetric weight saved the other way
    if sym is not False and (fields == other).all():
        actual = "gptq_v2" if convention == "gptq" else "gptq"
        warnings.warn(f"QMatrix: qzeros: every field is {other}, which {actual!r} stores for a symmetric weight, in a "
                      f"checkpoint labelled {convention!r}; read as {actual!r} (sym=False to believe the label)",
                      stacklevel=3)
        convention = actual
    if convention == "gptq" and zero_wrap == "word" and bits != 3:
        ones = np.uint32(0xFFFFFFFF // ((1 << bits) - 1))   # 1 in every field
        return unpack_stream(words.view(np.uint32) + ones, bits, 1, rows).astype(np.int16)
    if convention == "gptq":
        fields += 1
        if zero_wrap:
            fields &= (1 << bits) - 1
    return fields
