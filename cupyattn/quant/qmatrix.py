# SPDX-License-Identifier: Apache-2.0
"""QMatrix: a weight [out_features, in_features], quantized or not, packed for the kernels."""

import sys

import numpy as np

from . import dense, gguf, layout


class QMatrix:
    """A weight matrix in the kernels' layout; ``y = x @ W.T`` by `matmul`.

    Made by `from_gguf`, `from_dense` or `concat`.

    Attributes
    ----------
    format : str
        ``"q4_0"``, ``"q4_1"``, ``"q8_0"``, ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    shape : (int, int)
        (out_features, in_features), padding not counted.
    packed : ndarray [row tiles, column tiles, tile bytes], uint8
        See ``cupyattn/quant/layout.py``.
    """

    def __init__(self, format, shape, packed):
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.packed = packed

    @classmethod
    def from_gguf(cls, data, type, shape, *, xp=None):
        """From the raw bytes of a GGUF tensor.

        Parameters
        ----------
        data : ndarray, uint8
            Blocks of N rows, K/32 blocks each, any shape in that order. Not changed. (F16, BF16 and F32: the
            values' bytes.)
        type : GGMLQuantizationType, int or str
            Q4_0, Q4_1, Q8_0, F16, BF16 or F32.
        shape : (int, int)
            (out_features, in_features): GGUF's ``ne`` reversed.
        xp : module, optional
            numpy or cupy; default the kind of `data`.

        Raises
        ------
        NotImplementedError
            Another type.
        ValueError
            `data` and `shape` disagree, or in_features is no multiple of 32 (8 for F16, BF16, F32).
        """
        shape = _shape(shape)
        name = gguf.type_name(type)
        host, xp = _host(data, xp)
        if host.dtype.itemsize != 1:
            raise TypeError(f"QMatrix: data must be uint8, got {host.dtype.name}")
        host = host.view(np.uint8)
        if name in gguf.DENSE:
            dtype = _dtype(gguf.DENSE[name])
            if host.size != shape[0] * shape[1] * dtype.itemsize:
                raise ValueError(f"QMatrix: data must hold {shape[0] * shape[1] * dtype.itemsize} bytes, "
                                 f"got {host.size}")
            return cls.from_dense(np.ascontiguousarray(host).reshape(-1).view(dtype).reshape(shape), xp=xp)
        return cls(name, shape, gguf.pack(host, name, shape)).to(xp)

    @classmethod
    def from_dense(cls, w, *, xp=None):
        """From an array [out_features, in_features], float16, bfloat16 or float32, kept in that type.

        in_features must be a multiple of 8. `xp` as in `from_gguf`.
        """
        host, xp = _host(w, xp)
        if host.ndim != 2:
            raise ValueError(f"QMatrix: w must be [out_features, in_features], got shape {list(host.shape)}")
        return cls(host.dtype.name, _shape(host.shape), dense.pack(host)).to(xp)

    @classmethod
    def concat(cls, matrices):
        """One matrix with the rows of all, in order (q, k and v become one product).

        Raises
        ------
        ValueError
            Formats or in_features differ, or a matrix but the last has out_features no multiple of 16.
        """
        matrices = list(matrices)
        if not matrices:
            raise ValueError("QMatrix: matrices must hold at least one QMatrix, got none")
        first = matrices[0]
        for m in matrices[1:]:
            if (m.format, m.shape[1]) != (first.format, first.shape[1]):
                raise ValueError(f"QMatrix: matrices must agree in format and in_features, got {first!r} and {m!r}")
        odd = next((m for m in matrices[:-1] if m.shape[0] % layout.TILE_ROWS), None)
        if odd is not None:
            raise ValueError(f"QMatrix: matrices but the last must have out_features a multiple of 16, got {odd!r}")
        xp = _module(first.packed)
        return cls(first.format, (sum(m.shape[0] for m in matrices), first.shape[1]),
                   xp.concatenate([m.packed for m in matrices]))

    def matmul(self, x, /, *, bias=None, accumulate=False, out=None):
        """``x @ W.T``: the same as `cupyattn.quant_gemm` ``(x, self, ...)``."""
        from ..ops.quant_gemm import quant_gemm

        return quant_gemm(x, self, bias=bias, accumulate=accumulate, out=out)

    def reconstruct(self):
        """The weight as a float32 array [out_features, in_features] of the same kind as `packed`.

        Computed on the host: for looking at a weight, not for use in a step.
        """
        xp = _module(self.packed)
        packed = self.packed if xp is np else xp.asnumpy(self.packed)
        form = layout.FORMATS[self.format]
        if form.scales == 0:
            values = layout.get_codes(packed, _dtype(self.format)).astype(np.float32)
        elif form.code_bits == 4:
            values = layout.get_nibbles(packed).astype(np.float32)
        else:
            values = layout.get_codes(packed, np.int8).astype(np.float32)
        if self.format == "q4_0":
            values -= 8
        if form.scales:
            scale, *minimum = layout.get_scales(packed, form).astype(np.float32)
            groups = values.reshape(*scale.shape, layout.GROUP)
            groups *= scale[..., None]
            if minimum:
                groups += minimum[0][..., None]
        values = np.ascontiguousarray(values[:self.shape[0], :self.shape[1]])
        return values if xp is np else xp.asarray(values)

    def to(self, xp):
        """This matrix with its array on `xp` (numpy or cupy); itself when it is there."""
        here = _module(self.packed)
        if here is xp:
            return self
        return QMatrix(self.format, self.shape, here.asnumpy(self.packed) if xp is np else xp.asarray(self.packed))

    @property
    def nbytes(self):
        """Bytes of the packed array, padding included."""
        return self.packed.nbytes

    def __repr__(self):
        bits = 8 * layout.FORMATS[self.format].tile_bytes / (layout.TILE_ROWS * layout.TILE_COLUMNS)
        return f"QMatrix({self.format}, {self.shape[0]}x{self.shape[1]}, {bits:g} bits per weight)"


def _module(array):
    return np if isinstance(array, np.ndarray) else sys.modules["cupy"]


def _host(array, xp):
    """`array` on the host, and the module its matrix shall live in."""
    if isinstance(array, np.ndarray):
        return array, xp or np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.asnumpy(array), xp or cupy
    return np.asarray(array), xp or np


def _shape(shape):
    if len(shape) != 2 or any(int(n) < 1 for n in shape):
        raise ValueError(f"QMatrix: shape must be (out_features, in_features), both at least 1, got {shape}")
    return tuple(int(n) for n in shape)


def _dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
