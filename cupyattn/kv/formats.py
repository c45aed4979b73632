# SPDX-License-Identifier: Apache-2.0
"""The formats of KV caches: what each stores and which C++ type reads it."""

from typing import NamedTuple

from ..runtime.checks import FLOATS
from ..runtime.plan import CUDA_TYPES

PLAIN_TAGS = {name: f"KvPlain<{CUDA_TYPES[name]}>" for name in FLOATS}   # C++ types of arrays' rows
_FP8_DTYPES = {"fp8_e4m3": ("uint8", "float8_e4m3fn"), "fp8_e5m2": ("uint8", "float8_e5m2")}


class Format(NamedTuple):
    """How a quantized format stores rows; `cupyattn.reference.kv_codec` says what the numbers mean."""

    bits: int              # per element, scales not counted
    tag: str               # C++ type in kv_format.cuh; {} is the scale's type
    dtypes: tuple          # of the codes
    scale_dtypes: tuple
    granularities: tuple   # what may have a scale of its own, the default first
    multiple: int = 8      # head_dim is a multiple of it
    has_zero: bool = False
    rotated: bool = False

    @property
    def row_align(self):
        """ROW_ALIGN of the tag."""
        return 8 if self.bits == 8 else 4

    def row_codes(self, head_dim):
        """Elements of the codes of a row."""
        return head_dim * self.bits // 8


_BY_HAND = ("tensor", "head")
FORMATS = {
    "int8": Format(8, "KvInt8<{}>", ("uint8",), FLOATS, ("token",), has_zero=True),
    "int4": Format(4, "KvInt4<{}>", ("uint8",), FLOATS, ("token",), has_zero=True),
    "int8_symmetric": Format(8, "KvInt8Sym", ("int8",), ("float32",), _BY_HAND),
    "int8_channel": Format(8, "KvInt8Channel", ("int8",), ("float32",), ("channel",)),
    "fp8_e4m3": Format(8, "KvE4M3", _FP8_DTYPES["fp8_e4m3"], ("float32",), (*_BY_HAND, "token")),
    "fp8_e5m2": Format(8, "KvE5M2", _FP8_DTYPES["fp8_e5m2"], ("float32",), (*_BY_HAND, "token")),
    "hadamard8": Format(8, "KvHadamard8", ("uint8",), ("float16",), ("group",), 32, rotated=True),
    "hadamard6": Format(6, "KvHadamard6", ("uint8",), ("float16",), ("group",), 32, rotated=True),
    "hadamard4": Format(4, "KvHadamard4", ("uint8",), ("float16",), ("group",), 32, rotated=True),
}
NO_SCALE = {"scale": None, "zero": None, "stride_page": 0, "stride_token": 0, "stride_head": 0, "stride_group": 0,
            "scale_offset": 0, "zero_offset": 0}


def scale_shape(pages, page_size, num_kv_heads, head_dim, granularity):
    """Shape of the scale of a cache."""
    return {"token": (pages, page_size, num_kv_heads), "head": (num_kv_heads,), "tensor": (1,),
            "group": (pages, page_size, num_kv_heads, head_dim // 32), "channel": (num_kv_heads, head_dim)}[granularity]


def check_format(format, owner="QuantizedKV"):
    if format not in FORMATS:
        raise ValueError(f"{owner}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def check_head_dim(format, head_dim, owner="QuantizedKV"):
    if head_dim % FORMATS[format].multiple:
        raise ValueError(f"{owner}: head_dim must be a multiple of {FORMATS[format].multiple} in format {format}, got "
                         f"{head_dim}")
