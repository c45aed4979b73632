# SPDX-License-Identifier: Apache-2.0
"""Quantized matrices of random codes."""

import numpy as np

from cupyattn import QMatrix
from cupyattn.quant.bit_stream import pack_stream
from cupyattn.quant.coded import CodedWeight
from cupyattn.quant.quantize import quantize

RNG = np.random.default_rng(7)


def gptq(rows, columns, group=64):
    """GPTQ tensors of random codes, and what they stand for."""
    codes = RNG.integers(0, 16, (columns, rows), np.uint8)
    zeros = RNG.integers(1, 16, (columns // group, rows), np.uint8)
    scales = RNG.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
    tensors = {"qweight": pack_stream(codes, 4, axis=0), "qzeros": pack_stream(zeros - 1, 4, axis=1), "scales": scales}
    spread = lambda a: np.repeat(a.astype(np.float64), group, axis=0)  # noqa: E731
    return tensors, ((codes - spread(zeros)) * spread(scales)).T


def mixed():
    """Two segments of 4 and 8 bits, columns in a random order."""
    four, eight = (quantize(RNG.standard_normal((40, columns)).astype(np.float32), scheme)
                   for columns, scheme in ((160, "int4-g64-asym"), (96, "int8-g32")))
    order = RNG.permutation(256).astype(np.int32)
    return QMatrix.from_coded(CodedWeight("mixed", (40, 256), (*four.segments, *eight.segments), order))
