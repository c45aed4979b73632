# SPDX-License-Identifier: Apache-2.0
"""QExperts: the weights of a mixture of experts, one behind another."""

from .packed import Packed, check_alike


class QExperts(Packed):
    """Weights [experts, out_features, in_features] of one form, which `cupyattn.quant_gemm` multiplies in one launch.

    Made by ``QMatrix.stack(matrices)``, or by `load` from a file. Experts that a checkpoint keeps in one tensor
    (gpt-oss) are read as one QMatrix with all their rows and cut up:

        whole = QMatrix.from_mxfp4(tensors)                     # blocks [experts, out, in / 32, 16]
        experts = QMatrix.stack([whole.row_range(e * out, e * out + out) for e in range(count)])

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

    @classmethod
    def stack(cls, matrices):
        """What ``QMatrix.stack(matrices)`` returns."""
        from .qmatrix import QMatrix

        matrices = check_alike(matrices, QMatrix, rows=True)
        first = matrices[0]

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

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        experts, rows, columns = self.shape
        return f"QExperts({self.format}, {experts} of {rows}x{columns}, {self.nbytes} bytes)"
