# SPDX-License-Identifier: Apache-2.0
"""EXL2 (ExLlamaV2): w[k, n] = (code[k, n] - 2^(bits-1)) * scale[group of k, n], rows k permuted.

    q_weight       int32 [words, Npad]    for each group in turn a stream down its rows
    q_groups       int16 [2 * groups]     (bits, first row of q_weight) of each group
    q_scale        int32 [groups, Npad / 8]    stream of 4-bit codes c along N
    q_scale_max    float16 [groups]
    q_invperm      int32 [K]    row of the packed matrix that holds row k of the weight

scale = half((c + 1)^2) * half(q_scale_max / 256), the product rounded to half as well. (The product with the code,
which ExLlamaV2 rounds too, is left exact.)
"""

import math
from itertools import pairwise

import numpy as np

from .bit_stream import unpack_stream
from .coded import CodedWeight, Segment
from .tensors import WORDS, check_shape, take

BITS = (2, 3, 4, 5, 6, 8)


def read(tensors, out_features=None):
    """An EXL2 weight: a segment for each run of groups of as many bits.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``q_weight``, ``q_groups``, ``q_scale``, ``q_scale_max``, ``q_invperm``.
    out_features : int, optional
        N; columns of ``q_weight`` past it are padding. Default all of them.

    Returns
    -------
    CodedWeight

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    """
    if "trellis" in tensors:
        raise NotImplementedError("QMatrix: tensors must be of EXL2, got 'trellis', which is EXL3's; EXL3 is not read")
    q_weight = take(tensors, "q_weight", WORDS, (None, None))
    padded = q_weight.shape[1]
    rows = padded if out_features is None else out_features
    if rows > padded:
        raise ValueError(f"QMatrix: q_weight must have {rows} columns, got {list(q_weight.shape)}")
    invperm = take(tensors, "q_invperm", ("int32", "int64", "int16"), (None,))
    shape = check_shape((rows, len(invperm)))
    bits, words, sizes = _groups(tensors, len(q_weight), len(invperm))
    scale = _scales(tensors, len(bits), padded)[:, :rows]

    segments = []
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))   # between runs of equal bits
    for first, last in pairwise(edges.tolist()):
        stream = q_weight[words[first]:words[last], :rows]
        run = sizes[first:last]
        group = math.gcd(*run[:-1].tolist()) or int(run[0])
        codes = np.ascontiguousarray(unpack_stream(stream, int(bits[first]), 0, int(run.sum())).T)
        spread = np.repeat(scale[first:last], -(-run // group), axis=0)
        segments.append(Segment(codes, int(bits[first]), "int", group, np.ascontiguousarray(spread.T),
                                1 << int(bits[first]) - 1))
    return CodedWeight("exl2", shape, tuple(segments), _order(invperm))


def _groups(tensors, num_words, in_features):
    """Of each group its bits, first row of q_weight (one more at the end) and number of rows of the weight."""
    pairs = take(tensors, "q_groups", ("int16", "uint16", "int32"), (None,))
    if pairs.size == 0 or pairs.size % 2:
        raise ValueError(f"QMatrix: q_groups must be pairs, got shape {list(pairs.shape)}")
    pairs = (pairs.view(np.uint16) if pairs.itemsize == 2 else pairs).astype(np.int64).reshape(-1, 2)
    bits, words = pairs[:, 0], np.append(pairs[:, 1], num_words)
    odd = set(bits.tolist()) - set(BITS)
    if odd:
        raise ValueError(f"QMatrix: q_groups must have bits in {BITS}, got {sorted(odd)}")
    held = np.diff(words) * 32   # bits of a column
    if words[0] != 0 or (held <= 0).any():
        raise ValueError(f"QMatrix: q_groups must start at row 0 and rise below {num_words}, got {words[:-1].tolist()}")
    if (held % bits)[:-1].any():
        raise ValueError("QMatrix: q_groups must give each group a whole number of rows, got "
                         f"{(held // 32).tolist()} words of {bits.tolist()} bits")
    sizes = held // bits
    rest = in_features - sizes[:-1].sum()
    if not 0 < rest <= sizes[-1] or -(-rest * bits[-1] // 32) * 32 != held[-1]:
        raise ValueError(f"QMatrix: q_weight must have words for {in_features} rows, the length of q_invperm, "
                         f"got {num_words}, of which the last group of {rest} rows has {held[-1] // 32}")
    sizes[-1] = rest
    return bits, words, sizes


def _scales(tensors, groups, columns):
    """float16 [groups, Npad]."""
    codes = unpack_stream(take(tensors, "q_scale", WORDS, (groups, -(-columns // 8))), 4, 1, columns)
    largest = take(tensors, "q_scale_max", ("float16",), (groups,))
    squares = ((np.arange(16) + 1) ** 2).astype(np.float16)
    return squares[codes] * (largest * np.float16(1 / 256))[:, None]


def _order(invperm):
    """Rows of the weight in the order they are packed; None when that is their own."""
    if not np.array_equal(np.sort(invperm), np.arange(len(invperm))):
        raise ValueError(f"QMatrix: q_invperm must be a permutation of {len(invperm)} rows, got another array")
    order = np.argsort(invperm).astype(np.int32)
    return None if (order == np.arange(len(order))).all() else order
