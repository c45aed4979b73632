# SPDX-License-Identifier: Apache-2.0
"""QMatrix: a weight [out_features, in_features], quantized or not, packed for the kernels."""

import numpy as np

from . import layout, shards
from .constructors import Constructors
from .experts import QExperts
from .packed import Packed, check_alike


class QMatrix(Constructors, Packed):
    """A weight matrix in the kernels' layout; ``y = x @ W.T`` by `matmul`.

    Made from a checkpoint by `from_safetensors`, or from arrays by the `from_` of their format; from numbers by
    `quantize` and `from_dense`; from others by `concat`, `row_shard`, `row_range`, `column_shard` and `column_range`;
    from a file by `load`.

    Attributes
    ----------
    format : str
        Name of the checkpoint's format, ``"q4_0"`` for instance, or the dtype of an uncompressed weight.
    shape : (int, int)
        (out_features, in_features), padding not counted.
    segments : tuple of PackedSegment
        Columns that are coded alike, side by side; see ``cupyattn/quant/layout.py``.
    order : ndarray [columns of all segments], int32, optional
        Column of x that each multiplies, -1 for 0. None: as they are.
    """

    @classmethod
    def concat(cls, matrices):
        """One matrix with the rows of all, in order (q, k and v become one product).

        Raises
        ------
        ValueError
            Formats, in_features or the orders of columns differ, or a matrix but the last has out_features no
            multiple of 16.
        """
        matrices = check_alike(matrices, QMatrix, rows=False)
        first = matrices[0]
        odd = next((m for m in matrices[:-1] if m.shape[0] % layout.TILE_ROWS), None)
        if odd is not None:
            raise ValueError(f"QMatrix: matrices but the last must have out_features a multiple of 16, got {odd!r}")
        return cls(first.format, (sum(m.shape[0] for m in matrices), first.shape[1]),
                   [layout.stacked(first.xp, parts) for parts in zip(*(m.segments for m in matrices), strict=True)],
                   first.order)

    @staticmethod
    def stack(matrices):
        """The weights of a mixture of experts, for one launch of `cupyattn.quant_gemm`.

        Parameters
        ----------
        matrices : sequence of QMatrix
            Of one shape, format and order of columns.

        Returns
        -------
        QExperts
            Copies, [experts, out_features, in_features].

        Raises
        ------
        ValueError
            Shapes, formats or the orders of columns differ.
        """
        return QExperts.stack(matrices)

    def row_shard(self, rank, size):
        """The rows of one of `size` ranks: tensor parallel over out_features.

        Parameters
        ----------
        rank : int
            0 to size - 1.
        size : int
            At most out_features / 16.

        Returns
        -------
        QMatrix
            Rows in sixteens, as evenly as they go: all ranks have as many where 16 * size divides out_features.
            A view of this matrix's arrays. It multiplies all of x, and gives the columns of y it has the rows of.

        Notes
        -----
        Take shards of q, k and v, gate and up before `concat`, not after.
        """
        return self.row_range(*shards.shard_range(self.shape[0], rank, size))

    def row_range(self, start, stop):
        """The rows `start` up to `stop`: what multiplies x to columns `start` up to `stop` of y.

        Parameters
        ----------
        start, stop : int
            With both multiples of 16, or `stop` out_features, the result is a view of this matrix's arrays; otherwise
            the rows are packed anew.
        """
        shards.check_range(self.shape[0], start, stop, "out_features")
        shape, tile = (stop - start, self.shape[1]), layout.TILE_ROWS
        if start % tile == 0 and (stop % tile == 0 or stop == self.shape[0]):
            return QMatrix(self.format, shape, shards.slice_rows(self.segments, start, stop), self.order)
        first = start // tile * tile
        last = min(-(-stop // tile) * tile, self.shape[0])
        return self.row_range(first, last)._packed_anew(slice(start - first, stop - first), slice(0, self.shape[1]))

    def column_shard(self, rank, size):
        """The columns of one of `size` ranks: tensor parallel over in_features.

        Parameters
        ----------
        rank : int
            0 to size - 1.
        size : int
            At most in_features / 16.

        Returns
        -------
        QMatrix
            It multiplies ``x[..., start:stop]``, columns in x's own order also with act-order: the very columns a
            layer before it with out_features = in_features gives as its ``row_shard(rank, size)``. The sum of all
            ranks' results is y. ``[start, stop)`` are sixteens, as evenly as they go.

        Notes
        -----
        `order` of the shard counts within that slice. Groups that are cut keep their scales, by repeating them; the
        parts of groups in act-order, of any size, are filled up to a multiple of 32 columns each, so such a shard is
        larger than its share.
        """
        return self.column_range(*shards.shard_range(self.shape[1], rank, size))

    def column_range(self, start, stop):
        """The columns `start` up to `stop`, a multiple of 8 many: what multiplies ``x[..., start:stop]``.

        See the notes of `column_shard`.
        """
        shards.check_range(self.shape[1], start, stop, "in_features")
        return self._packed_anew(slice(0, self.shape[0]), slice(start, stop))

    def _packed_anew(self, rows, columns):
        """A copy of some rows and columns of x."""
        here = self.to(np)
        if here.segments[0].form.kind in layout.DENSE:
            (segment,) = here.segments
            return QMatrix.from_dense(layout.unpack_codes(segment.codes, segment.form)[rows, columns], xp=self.xp)
        weight = layout.unpack(here.segments, here.order, self.format, self.shape)
        if rows != slice(0, self.shape[0]):
            weight = shards.slice_coded_rows(weight, rows.start, rows.stop)
        if columns != slice(0, self.shape[1]):
            weight = shards.slice_columns(weight, columns.start, columns.stop)
        return QMatrix.from_coded(weight, xp=self.xp)

    def matmul(self, x, /, *, bias=None, accumulate=False, invariant=False, out=None):
        """``x @ W.T``: the same as `cupyattn.quant_gemm` ``(x, self, ...)``."""
        from ..ops.quant_gemm import quant_gemm

        return quant_gemm(x, self, bias=bias, accumulate=accumulate, invariant=invariant, out=out)

    def reconstruct(self, *, out_dtype=np.float32):
        """The weight as an array [out_features, in_features] of this matrix's kind: `cupyattn.dequantize`."""
        from ..ops.dequantize import dequantize

        return dequantize(self, out_dtype=out_dtype)

    def __repr__(self):
        bits = sum(s.columns * s.form.bits_per_weight for s in self.segments) / sum(s.columns for s in self.segments)
        return (f"QMatrix({self.format}, {self.shape[0]}x{self.shape[1]}, {bits:.4g} bits per weight, "
                f"{self.nbytes} bytes)")
