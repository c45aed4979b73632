# SPDX-License-Identifier: Apache-2.0
"""QMatrix: a weight [out_features, in_features], quantized or not, packed for the kernels."""

import functools
import sys
from dataclasses import replace

import numpy as np

from . import gguf, layout, packed_file, shards
from .coded import FLOAT8
from .constructors import Constructors
from .experts import QExperts

_CHUNK_BYTES = 1 << 19   # of codes read at a time, so that reader and packer meet in the cache


class QMatrix(Constructors):
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

    def __init__(self, format, shape, segments, order=None):
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.segments = tuple(segments)
        self.order = order

    @classmethod
    def from_gguf(cls, data, type, shape, *, xp=None):
        """From the raw bytes of a GGUF tensor.

        Parameters
        ----------
        data : ndarray, uint8
            Blocks of N rows, any shape in that order: of one axis, or with the rows in front. Not changed. (F16, BF16
            and F32: the values' bytes.)
        type : GGMLQuantizationType, int or str
            Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4, F16, BF16 or F32.
        shape : (int, int)
            (out_features, in_features): GGUF's ``ne`` reversed.
        xp : module, optional
            numpy or cupy; default the kind of `data`.

        Raises
        ------
        NotImplementedError
            Another type.
        ValueError
            `data` and `shape` disagree, in bytes or rows (a `shape` that is ``ne`` not reversed), or in_features is no
            multiple of the block's numbers (8 for F16, BF16, F32).
        """
        shape = _shape(shape)
        name = gguf.type_name(type)
        host, xp = _host(data, xp)
        if host.dtype.itemsize != 1:
            raise TypeError(f"QMatrix: data must be uint8, got {host.dtype.name}")
        host = host.view(np.uint8)
        gguf.check_rows(host, shape)
        if name in gguf.DENSE:
            dtype = layout.dtype(gguf.DENSE[name])
            if host.size != shape[0] * shape[1] * dtype.itemsize:
                raise ValueError(f"QMatrix: data must hold {shape[0] * shape[1] * dtype.itemsize} bytes, "
                                 f"got {host.size}")
            return cls.from_dense(np.ascontiguousarray(host).reshape(-1).view(dtype).reshape(shape), xp=xp)
        blocks = gguf.blocks(host, name, shape)
        step = max(1, _CHUNK_BYTES // (16 * shape[1])) * 16
        some = (blocks[start:start + step] for start in range(0, shape[0], step))
        parts = (layout.pack(gguf.read(rows, name, (len(rows), shape[1])))[0][0] for rows in some)
        return cls(name, shape, (layout.pack_by_rows(shape[0], parts),)).to(xp)

    @classmethod
    def from_dense(cls, w, *, xp=None):
        """From an array [out_features, in_features], float16, bfloat16 or float32, kept in that type.

        in_features must be a multiple of 8. `xp` as in `from_gguf`.
        """
        cupy = _cupy_of(w)
        w = w if cupy else np.asarray(w)
        if w.ndim != 2:
            raise ValueError(f"QMatrix: w must be [out_features, in_features], got shape {list(w.shape)}")
        if w.dtype.name not in layout.DENSE:
            raise TypeError(f"QMatrix: w must be {' or '.join(layout.DENSE)}, got {w.dtype.name}")
        _check_columns("w", w.shape)
        shape, xp = _shape(w.shape), xp or cupy or np
        if xp is np:
            segment = layout.pack_dense(np.ascontiguousarray(w if cupy is None else cupy.asnumpy(w)))
        else:
            segment = _repack(xp.asarray(w))
        return cls(w.dtype.name, shape, (segment,))

    @classmethod
    def from_coded(cls, weight, *, xp=None):
        """From a ``cupyattn.quant.coded.CodedWeight`` of NumPy arrays, whose in_features must be a multiple of 8.

        `xp` is numpy or cupy, default numpy; with cupy the packing is done on the device. ValueError for FP8 codes
        that are no finite numbers.
        """
        _check_columns("weight", weight.shape)
        _check_finite(weight)
        if xp is None or xp is np:
            return cls(weight.format, _shape(weight.shape), *layout.pack(weight))
        segments, order = layout.pack(weight, lambda segment: _repacked(segment, xp))
        return cls(weight.format, _shape(weight.shape), segments, None if order is None else xp.asarray(order))

    @classmethod
    def concat(cls, matrices):
        """One matrix with the rows of all, in order (q, k and v become one product).

        Raises
        ------
        ValueError
            Formats, in_features or the orders of columns differ, or a matrix but the last has out_features no
            multiple of 16.
        """
        matrices = list(matrices)
        if not matrices:
            raise ValueError("QMatrix: matrices must hold at least one QMatrix, got none")
        first = matrices[0]
        for m in matrices[1:]:
            if (m.format, m.shape[1], m._forms) != (first.format, first.shape[1], first._forms):
                raise ValueError(f"QMatrix: matrices must agree in format and in_features, got {first!r} and {m!r}")
            if m.order is not first.order and (m.order is None or first.order is None or not np.array_equal(
                    _host(m.order, np)[0], _host(first.order, np)[0])):
                raise ValueError(f"QMatrix: matrices must agree in the order of their columns, got {first!r} and {m!r} "
                                 "of different orders")
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

    def save(self, path):
        """Write the packed matrix to a .safetensors file that `load` maps into memory.

        Parameters
        ----------
        path : str or Path
        """
        here = self.to(np)
        packed_file.save(path, self.format, self.shape, here.segments, here.order)

    @classmethod
    def load(cls, path, *, xp=None):
        """The matrix `save` wrote.

        Parameters
        ----------
        path : str or Path
        xp : module, optional
            numpy, the default: arrays are read-only and mapped, read as they are used; or cupy.

        Raises
        ------
        ValueError
            Not such a file, a damaged one, or one of another version of the layout.
        """
        return cls(*packed_file.load(path)).to(xp or np)

    def matmul(self, x, /, *, bias=None, accumulate=False, invariant=False, out=None):
        """``x @ W.T``: the same as `cupyattn.quant_gemm` ``(x, self, ...)``."""
        from ..ops.quant_gemm import quant_gemm

        return quant_gemm(x, self, bias=bias, accumulate=accumulate, invariant=invariant, out=out)

    def reconstruct(self, *, out_dtype=np.float32):
        """The weight as an array [out_features, in_features] of this matrix's kind: `cupyattn.dequantize`."""
        from ..ops.dequantize import dequantize

        return dequantize(self, out_dtype=out_dtype)

    def to(self, xp):
        """This matrix with its arrays on `xp` (numpy or cupy); itself when it is there."""
        here = self.xp
        if here is xp:
            return self
        move = here.asnumpy if xp is np else xp.asarray
        return QMatrix(self.format, self.shape, [segment.with_arrays(move) for segment in self.segments],
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

    @functools.cached_property
    def kinds(self):
        """Kinds of the segments' codes."""
        return tuple({segment.form.kind: None for segment in self.segments})

    @property
    def _forms(self):
        return [(segment.form, segment.columns) for segment in self.segments]

    def __repr__(self):
        bits = sum(s.columns * s.form.bits_per_weight for s in self.segments) / sum(s.columns for s in self.segments)
        return (f"QMatrix({self.format}, {self.shape[0]}x{self.shape[1]}, {bits:.4g} bits per weight, "
                f"{self.nbytes} bytes)")


def _host(array, xp):
    """`array` on the host, and the module its matrix shall live in."""
    if isinstance(array, np.ndarray):
        return array, xp or np
    cupy = _cupy_of(array)
    if cupy is not None:
        return cupy.asnumpy(array), xp or cupy
    return np.asarray(array), xp or np


def _cupy_of(array):
    """cupy if `array` is one of its arrays, else None."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else None


def _repack(weights, **keywords):
    from ..ops.repack import repack

    return repack(weights, **keywords)


def _repacked(segment, cupy):
    """A Segment of NumPy arrays as a PackedSegment on the device: moved as it is and packed there."""
    segment = layout.with_whole_supers(segment)
    arrays = {name: getattr(segment, name) for name in shards.SEGMENT_ARRAYS if getattr(segment, name) is not None}
    scale_dtype = segment.scale.dtype.name if segment.scale.dtype.name.startswith("float8") else None
    if scale_dtype is not None:   # CuPy has no such dtype
        arrays["scale"] = segment.scale.view(np.uint8)
    moved = {name: cupy.asarray(array) for name, array in arrays.items()}
    return _repack(replace(segment, **moved), scale_dtype=scale_dtype)


def _shape(shape):
    if len(shape) != 2 or any(int(n) < 1 for n in shape):
        raise ValueError(f"QMatrix: shape must be (out_features, in_features), both at least 1, got {shape}")
    return tuple(int(n) for n in shape)


def _check_finite(weight):
    """Kernels on tensor cores read FP8 codes as if all were finite."""
    for segment in weight.segments:
        if segment.kind in FLOAT8:
            codes, least = segment.codes & np.uint8(127), {"e4m3": 127, "e5m2": 124}[segment.kind]
            if codes.max(initial=0) >= least:
                raise ValueError(f"QMatrix: weight must hold finite numbers only, got {(codes >= least).sum()} codes "
                                 f"of {codes.size} that are NaN{' or infinity' if least == 124 else ''}")


def _check_columns(name, shape):
    if shape[1] % 8:
        raise ValueError(f"QMatrix: {name} must have in_features a multiple of 8, got {list(shape)}")
