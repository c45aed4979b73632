# SPDX-License-Identifier: Apache-2.0
"""QExperts: the weights of a mixture of experts, one behind another."""

import sys

import numpy as np


class QExperts:
    """Weights [experts, out_features, in_features] of one form, which `cupyattn.quant_gemm` multiplies in one launch.

    Made by ``QMatrix.stack(matrices)``.

    Attributes
    ----------
    format : str
    shape : (int, int, int)
        (experts, out_features, in_features), padding not counted.
    segments : tuple of PackedSegment
        Those of a QMatrix, their arrays with an axis of experts in front.
    order : ndarray [columns of all segments], int32, optional
        Column of x that each multiplies, the same for all experts; -1 for 0.
    """

    def __init__(self, format, shape, segments, order=None):
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.segments = tuple(segments)
        self.order = order
        self.kinds = tuple(segment.form.kind for segment in self.segments)

    @classmethod
    def stack(cls, matrices):
        """What ``QMatrix.stack(matrices)`` returns."""
        matrices = list(matrices)
        if not matrices:
            raise ValueError("QMatrix: matrices must hold at least one QMatrix, got none")
        first = matrices[0]
        forms = [(segment.form, segment.columns) for segment in first.segments]
        for m in matrices[1:]:
            if (m.format, m.shape, [(segment.form, segment.columns) for segment in m.segments]) != (
                    first.format, first.shape, forms):
                raise ValueError(f"QMatrix: matrices must agree in format and shape, got {first!r} and {m!r}")
            if m.xp is not first.xp:
                raise TypeError("QMatrix: matrices must be of one kind, got NumPy and CuPy arrays")
            if m.order is not first.order and (m.order is None or first.order is None or not np.array_equal(
                    _host(m.order), _host(first.order))):
                raise ValueError("QMatrix: matrices must agree in the order of their columns, got different orders")
        def joined(arrays):
            return None if arrays[0] is None else first.xp.stack(arrays)

        segments = [parts[0].of_arrays(*map(joined, zip(*(part.arrays for part in parts), strict=True)))
                    for parts in zip(*(m.segments for m in matrices), strict=True)]
        return cls(first.format, (len(matrices), *first.shape), segments, first.order)

    def expert(self, index):
        """One expert's weight, a QMatrix over the same memory."""
        from .qmatrix import QMatrix

        return QMatrix(self.format, self.shape[1:], [segment.with_arrays(lambda array: array[index])
                                                     for segment in self.segments], self.order)

    def matmul(self, x, /, *, expert_offsets, bias=None, accumulate=False, out=None):
        """``x[offsets[e]:offsets[e + 1]] @ W[e].T``: the same as `cupyattn.quant_gemm` ``(x, self, ...)``."""
        from ..ops.quant_gemm import quant_gemm

        return quant_gemm(x, self, expert_offsets=expert_offsets, bias=bias, accumulate=accumulate, out=out)

    def to(self, xp):
        """These weights with their arrays on `xp` (numpy or cupy); themselves when they are there."""
        here = self.xp
        if here is xp:
            return self
        move = here.asnumpy if xp is np else xp.asarray
        return QExperts(self.format, self.shape, [segment.with_arrays(move) for segment in self.segments],
                        None if self.order is None else move(self.order))

    @property
    def xp(self):
        """numpy or cupy, where the arrays are."""
        return np if isinstance(self.segments[0].codes, np.ndarray) else sys.modules["cupy"]

    @property
    def nbytes(self):
        """Bytes of all arrays, padding included."""
        arrays = [self.order, *(array for segment in self.segments for array in segment.arrays)]
        return sum(array.nbytes for array in arrays if array is not None)

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        experts, rows, columns = self.shape
        return f"QExperts({self.format}, {experts} of {rows}x{columns}, {self.nbytes} bytes)"


def _host(array):
    return array if isinstance(array, np.ndarray) else array.get()
