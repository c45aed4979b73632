# SPDX-License-Identifier: Apache-2.0
"""Keys or values inside memory blocks that are reached by their addresses."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..runtime.arrays import dtype_name
from ..runtime.checks import FLOATS
from ..runtime.plan import CUDA_TYPES
from .formats import FORMATS, NO_SCALE, PLAIN_TAGS, check_head_dim, scale_shape


class BlockLayer(NamedTuple):
    """K and V of one layer inside memory blocks, and the bytes of a block that the layer takes."""

    k: "BlockKV"
    v: "BlockKV"
    nbytes: int


@dataclass(frozen=True)
class BlockKV:
    """Where the keys or values of one layer lie in memory blocks that are reached by their addresses.

    Array-free: stands where a `k_cache` or `v_cache` may be an array, with a ``PageTable.pointers`` that has the
    addresses. A block holds `page_size` tokens.

    Parameters
    ----------
    format : str
        Key of ``quantized_kv.FORMATS``, or float16, bfloat16, float32.
    page_size, num_kv_heads, head_dim : int
    offset : int
        Bytes from a block's start to token 0, head 0.
    stride_token, stride_head : int
        In elements of the codes (bytes in a quantized format).
    scale_dtype : str, optional
        float16, bfloat16 or float32 for int8 and int4; the other formats have one.
    scale_offset, zero_offset : int
        Bytes from a block's start to the first scale and zero.
    scale_stride_token, scale_stride_head, scale_stride_group : int
        In elements of the scale, for the zero as well.
    scale : ndarray, optional
        Scales that do not lie in the blocks: float32 [1], [num_kv_heads], or [num_kv_heads, head_dim] for int8_channel.
    """

    format: str
    page_size: int
    num_kv_heads: int
    head_dim: int
    offset: int = 0
    stride_token: int = 0
    stride_head: int = 0
    scale_dtype: str | None = None
    scale_offset: int = 0
    zero_offset: int = 0
    scale_stride_token: int = 0
    scale_stride_head: int = 0
    scale_stride_group: int = 0
    scale: object = None

    PARTS = ("scale",)   # see runtime.Prepared

    def __post_init__(self):
        if self.format in FLOATS:
            return
        if self.format not in FORMATS:
            raise ValueError(f"BlockKV: format must be one of {', '.join((*FLOATS, *FORMATS))}, got {self.format!r}")
        kind = FORMATS[self.format]
        check_head_dim(self.format, self.head_dim, "BlockKV")
        if len(kind.scale_dtypes) == 1 and self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", kind.scale_dtypes[0])
        if self.scale_dtype not in kind.scale_dtypes:
            raise ValueError(f"BlockKV: scale_dtype must be {' or '.join(kind.scale_dtypes)} in format {self.format}, "
                             f"got {self.scale_dtype!r}")
        itemsize = 4 if self.scale_dtype == "float32" else 2
        for name in ("scale_offset", "zero_offset"):
            if getattr(self, name) % itemsize:
                raise ValueError(f"BlockKV: {name} must be a multiple of the scale's {itemsize} bytes, got "
                                 f"{getattr(self, name)}")
        if self.scale is None:
            if self.format == "int8_channel":
                raise ValueError("BlockKV: scale must be given in format int8_channel, got None")
            return
        shapes = {name: scale_shape(0, 0, self.num_kv_heads, self.head_dim, name)
                  for name in kind.granularities if name in ("tensor", "head", "channel")}
        if self.scale.shape not in shapes.values() or dtype_name(self.scale) != "float32":
            raise ValueError("BlockKV: scale must be "
                             f"{' or '.join(f'float32 {list(s)}' for s in shapes.values()) or 'in the blocks'} in "
                             f"format {self.format}, got {dtype_name(self.scale)} {list(self.scale.shape)}")

    @classmethod
    def turbomind(cls, num_kv_heads, head_dim, page_size, *, quant_policy=0, dtype="float16", layer=0, offset=None,
                  one_copy=False):
        """K and V of a layer in LMDeploy TurboMind's blocks.

        A layer is its data, [num_kv_heads][K, V][page_size][head_dim] elements, and with a quant_policy its
        parameters, [num_kv_heads][K, V][page_size][scale, zero] of `dtype`.

        Parameters
        ----------
        num_kv_heads, head_dim, page_size : int
        quant_policy : int
            0 none, 8 int8, 4 int4.
        dtype : str
            float16, bfloat16 or float32: of plain data, and of the parameters.
        layer : int
            Layers before this one in a block, when all are alike.
        offset : int, optional
            Bytes from a block's start to the layer, instead of `layer`.
        one_copy : bool
            K and V share one copy (multi-head latent attention).

        Returns
        -------
        BlockLayer
            k, v and nbytes, the layer's size in a block.
        """
        formats = {0: dtype, 8: "int8", 4: "int4"}
        if type(quant_policy) is bool or quant_policy not in formats:
            raise ValueError(f"BlockKV: quant_policy must be 0, 4 or 8, got {quant_policy!r}")
        if dtype not in FLOATS:
            raise ValueError(f"BlockKV: dtype must be {' or '.join(FLOATS)}, got {dtype!r}")
        itemsize, copies = (4 if dtype == "float32" else 2), (1 if one_copy else 2)
        row = head_dim * (quant_policy or 8 * itemsize) // 8       # bytes of a token and head
        data = page_size * row                                     # of a head's K
        parameters = page_size * 2 * itemsize if quant_policy else 0
        nbytes = num_kv_heads * copies * (data + parameters)
        start = layer * nbytes if offset is None else offset
        unit = 1 if quant_policy else itemsize
        sides = []
        for copy in range(2):
            at = copy % copies
            first = start + num_kv_heads * copies * data + at * parameters
            places = {"scale_dtype": dtype, "scale_offset": first, "zero_offset": first + itemsize,
                      "scale_stride_token": 2, "scale_stride_head": copies * 2 * page_size} if quant_policy else {}
            sides.append(cls(formats[quant_policy], page_size, num_kv_heads, head_dim, offset=start + at * data,
                             stride_token=row // unit, stride_head=copies * data // unit, **places))
        return BlockLayer(*sides, nbytes)

    @property
    def signature(self):
        return tuple(value for name, value in vars(self).items() if name != "scale")

    def with_parts(self, scale):
        """This object with other scales."""
        return replace(self, scale=scale)

    @property
    def shape(self):
        """(None, page_size, num_kv_heads, head_dim)."""
        return (None, self.page_size, self.num_kv_heads, self.head_dim)

    @property
    def tag(self):
        """C++ type that reads the rows."""
        if self.format in FLOATS:
            return PLAIN_TAGS[self.format]
        return FORMATS[self.format].tag.format(CUDA_TYPES[self.scale_dtype])

    @property
    def alignment(self):
        """Largest power of two ≤ 16 (bytes) that divides the place of every row in a block."""
        itemsize = 1 if self.format in FORMATS else 4 if self.format == "float32" else 2
        bits = self.offset | self.stride_token * itemsize | self.stride_head * itemsize | 16
        return bits & -bits

    @property
    def arrays(self):
        """The arrays behind the object, by name."""
        return {} if self.scale is None else {"scale": self.scale}

    def nbytes_needed(self):
        """Bytes a block must have for this side: one past the last code, scale and zero."""
        def end(offset, itemsize, count, *strides):
            steps = zip(strides, (self.page_size, self.num_kv_heads, self.head_dim // 32), strict=False)
            return offset + itemsize * (sum(s * max(0, n - 1) for s, n in steps) + count)

        if self.format in FLOATS:
            return end(self.offset, 4 if self.format == "float32" else 2, self.head_dim, self.stride_token,
                       self.stride_head)
        kind = FORMATS[self.format]
        ends = [end(self.offset, 1, kind.row_codes(self.head_dim), self.stride_token, self.stride_head)]
        if self.scale is None:
            strides = [self.scale_stride_token, self.scale_stride_head]
            strides += [self.scale_stride_group] if kind.rotated else []
            itemsize = 4 if self.scale_dtype == "float32" else 2
            ends += [end(at, itemsize, 1, *strides) for at in (self.scale_offset, self.zero_offset)[:1 + kind.has_zero]]
        return max(ends)

    def view(self):
        """Fields of KvView and of KvScale.

        Returns
        -------
        (dict, dict)
        """
        view = {"data": None, "stride_page": 0, "stride_token": self.stride_token, "stride_head": self.stride_head,
                "offset": self.offset}
        if self.scale is not None:
            strides = [s // 4 for s in self.scale.strides] if self.scale.size > 1 else []
            return view, {**NO_SCALE, "scale": self.scale, **dict(zip(("stride_head", "stride_group"), strides,
                                                                      strict=False))}
        return view, {**NO_SCALE, "stride_token": self.scale_stride_token, "stride_head": self.scale_stride_head,
                      "stride_group": self.scale_stride_group, "scale_offset": self.scale_offset,
                      "zero_offset": self.zero_offset}
