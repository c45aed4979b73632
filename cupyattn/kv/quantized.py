# SPDX-License-Identifier: Apache-2.0
"""Keys or values as caches hold them: plain arrays, quantized arrays, and rows inside memory blocks."""

import copy
from typing import NamedTuple

import numpy as np

from ..runtime.arrays import alignment, array_namespace, dtype_name, dtype_of, strides
from ..runtime.checks import FLOATS, check_array
from ..runtime.plan import CUDA_TYPES
from .blocks import BlockKV, BlockLayer
from .formats import FORMATS, NO_SCALE, PLAIN_TAGS, check_format, check_head_dim, scale_shape

__all__ = ["FORMATS", "PLAIN_TAGS", "BlockKV", "BlockLayer", "KvSide", "QuantizedKV", "kv_side"]


class KvSide(NamedTuple):
    """K or V as a kernel takes it, whatever holds it."""

    tag: str           # C++ type in kv_format.cuh
    format: str        # key of FORMATS, or the dtype of a plain array
    shape: tuple       # pages, page_size, num_kv_heads, head_dim; pages is None inside blocks
    view: dict         # fields of KvView
    scale: dict        # fields of KvScale
    alignment: int     # largest power of two ≤ 16 bytes that divides the address of every row
    row_align: int     # what it must be at least for wide accesses
    arrays: dict       # name of the argument or of its part -> array


class QuantizedKV:
    """Keys or values of all pages in a quantized format; K and V are two objects, their formats may differ.

    Stands where a kernel's `k_cache` or `v_cache` may be an array. Holds the arrays given, copies nothing.

    Parameters
    ----------
    codes : ndarray [pages, page_size, num_kv_heads, row], uint8 or the format's dtype
        `row` is head_dim, head_dim / 2 in the 4-bit and 3 * head_dim / 4 in the 6-bit formats. Any strides with a
        contiguous last axis.
    scale : ndarray
        | int8, int4: [pages, page_size, num_kv_heads], float16, bfloat16 or float32
        | hadamard8, hadamard6, hadamard4: [pages, page_size, num_kv_heads, head_dim / 32], float16
        | int8_symmetric: float32 [1] or [num_kv_heads]
        | int8_channel: float32 [num_kv_heads, head_dim]
        | fp8_e4m3, fp8_e5m2: float32 [1], [num_kv_heads] or [pages, page_size, num_kv_heads]

        Any strides.
    zero : ndarray, optional
        int8 and int4: the minimum of each row, with the scale's shape, dtype and strides.
    format : str
        One of ``int8 int4 int8_symmetric int8_channel fp8_e4m3 fp8_e5m2 hadamard8 hadamard6 hadamard4``.

    Attributes
    ----------
    shape : tuple
        (pages, page_size, num_kv_heads, head_dim).
    bits : int
        Per element, scales not counted.
    granularity : str
        What has a scale of its own: "token" (and head), "group" (32 dims of a token and head), "tensor", "head" or
        "channel" (a dim of a head, for all tokens).
    nbytes : int
        Codes, scales and zeros.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or a dtype the format does not have.
    ValueError
        An unknown format, or shapes or strides that do not fit.

    Notes
    -----
    x = code * scale + zero for int8 and int4, x = code * scale for int8_symmetric, int8_channel and fp8. The hadamard
    formats rotate every 32 dims, so that outliers spread out, and put each on 2^bits levels between -scale and scale;
    scale is a float16, so rotated values beyond 65504 are clipped there (none are while |x| ≤ 11579).
    Exactly: ``cupyattn.reference.kv_codec``.

    Examples
    --------
    >>> import cupyattn
    >>> cupyattn.QuantizedKV.empty(10, 16, 8, 128, format="int4")
    QuantizedKV(int4, pages=10, page_size=16, num_kv_heads=8, head_dim=128, scale=float16 per token, 4.25 bits)
    """

    PARTS = ("codes", "scale", "zero")   # see runtime.Prepared

    def __init__(self, codes, scale, zero=None, *, format):
        kind = check_format(format)
        self.xp = array_namespace("QuantizedKV", codes=codes, scale=scale, zero=zero)
        if codes.ndim != 4:
            raise ValueError("QuantizedKV: codes must be [pages, page_size, num_kv_heads, row], got "
                             f"{list(codes.shape)}")
        if dtype_name(codes) not in kind.dtypes:
            raise TypeError(f"QuantizedKV: codes must be {' or '.join(kind.dtypes)} in format {format}, got "
                            f"{dtype_name(codes)}")
        if codes.size and codes.shape[3] > 1 and codes.strides[3] != 1:
            raise ValueError(f"QuantizedKV: codes must have a contiguous last axis, got strides {codes.strides} bytes")
        row = codes.shape[3]
        head_dim = row * 8 // kind.bits
        if kind.row_codes(head_dim) != row or head_dim % kind.multiple:
            raise ValueError(f"QuantizedKV: codes must have rows of whole {kind.multiple * kind.bits // 8} bytes in "
                             f"format {format}, got {row}")
        self.codes, self.scale, self.zero, self.format = codes, scale, zero, format
        self.shape = (*codes.shape[:3], head_dim)
        self.bits = kind.bits
        self._check_scale(kind)

    def _check_scale(self, kind):
        scale, zero = self.scale, self.zero
        if dtype_name(scale) not in kind.scale_dtypes:
            raise TypeError(f"QuantizedKV: scale must be {' or '.join(kind.scale_dtypes)} in format {self.format}, got "
                            f"{dtype_name(scale)}")
        shapes = {name: scale_shape(*self.shape, name) for name in kind.granularities}
        self.granularity = next((name for name, shape in shapes.items() if scale.shape == shape), None)
        if self.granularity is None:
            raise ValueError(f"QuantizedKV: scale must be {' or '.join(str(list(s)) for s in shapes.values())} in "
                             f"format {self.format}, got {list(scale.shape)}")
        if any(s % scale.itemsize for s in scale.strides):
            raise ValueError("QuantizedKV: scale must have strides that are multiples of its itemsize "
                             f"{scale.itemsize}, got {scale.strides}")
        if (zero is not None) != kind.has_zero:
            raise ValueError(f"QuantizedKV: zero must be {'given' if kind.has_zero else 'None'} in format "
                             f"{self.format}, got {'none' if zero is None else 'an array'}")
        if zero is not None and (dtype_name(zero), zero.shape, zero.strides) != (dtype_name(scale), scale.shape,
                                                                                 scale.strides):
            raise ValueError("QuantizedKV: zero must have the dtype, shape and strides of scale, "
                             f"{dtype_name(scale)} {list(scale.shape)} {scale.strides}, got {dtype_name(zero)} "
                             f"{list(zero.shape)} {zero.strides}")

    @classmethod
    def empty(cls, num_pages, page_size, num_kv_heads, head_dim, *, format, dtype="float16", granularity=None,
              scale=None, xp=np):
        """A cache of zeros.

        Parameters
        ----------
        num_pages, page_size, num_kv_heads, head_dim : int
        format : str
        dtype : dtype
            Of scale and zero of int8 and int4: the activations' dtype keeps the zero exact.
        granularity : str, optional
            "tensor" (the default), "head" or "token" for fp8; "tensor" or "head" for int8_symmetric.
        scale : ndarray or float, optional
            Scales known in advance, for int8_symmetric, int8_channel and fp8 but per token. Default 1.
        xp : module
            numpy or cupy.

        Returns
        -------
        QuantizedKV
        """
        kind = check_format(format)
        check_head_dim(format, head_dim)
        given = scale if hasattr(scale, "shape") else None
        sizes = num_pages, page_size, num_kv_heads, head_dim
        if granularity is None:   # the shape of the scale tells, where there is one
            fits = (g for g in kind.granularities if given is not None and given.shape == scale_shape(*sizes, g))
            granularity = next(fits, kind.granularities[0])
        if granularity not in kind.granularities:
            raise ValueError(f"QuantizedKV: granularity must be {' or '.join(kind.granularities)} in format {format}, "
                             f"got {granularity!r}")
        by_token = granularity in ("token", "group")
        if by_token and scale is not None:
            raise ValueError(f"QuantizedKV: scale must be None per {granularity}, as it is written with the tokens, "
                             f"got {scale!r}")
        codes = xp.zeros((num_pages, page_size, num_kv_heads, kind.row_codes(head_dim)),
                         "int8" if kind.dtypes == ("int8",) else "uint8")
        if given is not None:
            return cls(codes, given, format=format)
        shape = scale_shape(*sizes, granularity)
        scale_dtype = dtype_of(dtype if len(kind.scale_dtypes) > 1 else kind.scale_dtypes[0])
        made = xp.zeros(shape, scale_dtype) if by_token else xp.full(shape, 1 if scale is None else scale, scale_dtype)
        return cls(codes, made, xp.zeros(shape, scale_dtype) if kind.has_zero else None, format=format)

    def to(self, xp):
        """This cache with its arrays on `xp` (numpy or cupy); itself when it is there."""
        if xp is self.xp:
            return self
        codes = self.codes if self.codes.dtype.kind in "iu" else self.codes.view("uint8")   # CuPy has no fp8
        move = self.xp.asnumpy if xp is np else xp.asarray
        return QuantizedKV(*(None if a is None else move(a) for a in (codes, self.scale, self.zero)),
                           format=self.format)

    @property
    def signature(self):
        return self.format

    def with_parts(self, codes, scale, zero):
        """This object with other arrays alike."""
        made = copy.copy(self)
        made.codes, made.scale, made.zero = codes, scale, zero
        return made

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @property
    def tag(self):
        """C++ type that reads the rows."""
        return FORMATS[self.format].tag.format(CUDA_TYPES.get(dtype_name(self.scale)))

    @property
    def alignment(self):
        """Largest power of two ≤ 16 (bytes) that divides the address of every row of codes."""
        return alignment(self.codes)

    @property
    def arrays(self):
        """The arrays behind the object, by name."""
        found = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def arrays_in_pages(self):
        """Those of `arrays` that are [pages, page_size, ...]: scales that all pages share are not."""
        return self.arrays if self.granularity in ("token", "group") else {"codes": self.codes}

    def view(self):
        """Fields of KvView and of KvScale.

        Returns
        -------
        (dict, dict)
        """
        page, token, head, _ = self.codes.strides
        return ({"data": self.codes, "stride_page": page, "stride_token": token, "stride_head": head, "offset": 0},
                {**NO_SCALE, "scale": self.scale, "zero": self.zero, **self._scale_strides()})

    def _scale_strides(self):
        strides = [s // self.scale.itemsize for s in self.scale.strides]
        names = {"token": ("page", "token", "head"), "group": ("page", "token", "head", "group"), "head": ("head",),
                 "tensor": (), "channel": ("head", "group")}[self.granularity]
        return {f"stride_{name}": stride for name, stride in zip(names, strides, strict=False)}

    def dequantize(self, dtype="float32"):
        """All pages as plain numbers, in NumPy.

        Parameters
        ----------
        dtype : dtype

        Returns
        -------
        ndarray [pages, page_size, num_kv_heads, head_dim]
        """
        from ..reference.kv_codec import dequantize

        parts = [a if a is None or isinstance(a, np.ndarray) else a.get() for a in (self.codes, self.scale, self.zero)]
        return dequantize(*parts, format=self.format).astype(dtype_of(dtype))

    def __repr__(self):
        pages, page_size, num_kv_heads, head_dim = self.shape
        bits = f", {8 * self.nbytes / np.prod(self.shape):.4g} bits" if np.prod(self.shape) else ""
        return (f"QuantizedKV({self.format}, pages={pages}, page_size={page_size}, num_kv_heads={num_kv_heads}, "
                f"head_dim={head_dim}, scale={dtype_name(self.scale)} per {self.granularity}{bits})")


def kv_side(op, name, cache):
    """`cache` of op's argument `name` (an array, a QuantizedKV or a BlockKV) as a KvSide.

    Raises
    ------
    TypeError
        It is none of these, or an array of another dtype than float16, bfloat16 and float32.
    ValueError
        An array that is not [pages, page_size, num_kv_heads, head_dim] with a contiguous last axis.
    """
    if isinstance(cache, (QuantizedKV, BlockKV)):
        row_align = FORMATS[cache.format].row_align if cache.format in FORMATS else 16
        return KvSide(cache.tag, cache.format, cache.shape, *cache.view(), cache.alignment, row_align,
                      {f"{name}.{part}": array for part, array in cache.arrays.items()})
    array_namespace(op, **{name: cache})
    found, shape = dtype_name(cache), cache.shape
    if found not in FLOATS:
        raise TypeError(f"{op}: {name} must be {', '.join(FLOATS)} or a QuantizedKV, got {found}")
    check_array(op, name, cache, found, (None,) * 4, "[pages, page_size, num_kv_heads, head_dim]")
    page, token, head, _ = strides(cache)
    view = {"data": cache, "stride_page": page, "stride_token": token, "stride_head": head, "offset": 0}
    return KvSide(PLAIN_TAGS[found], found, shape, view, NO_SCALE, alignment(cache), 16, {name: cache})
