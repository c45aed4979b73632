# SPDX-License-Identifier: Apache-2.0
"""What both attention ops share: what K and V are made of, checks, and the argument struct of the kernels."""

from typing import NamedTuple

from ..kv.quantized import BlockKV, QuantizedKV, kv_side
from ..runtime.arrays import address, alignment, strides
from ..runtime.checks import (
    check_array,
    check_dtype,
    check_element_strides,
    check_flag,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
    value_range,
)

MAX_HEAD_DIM = 256
STEP = 8   # elements a thread handles at a time; STEP of the kernels
NO_MASK = {"data": None, "stride_seq": 0, "stride_head": 0, "stride_query": 0, "stride_key": 0, "queries": 0, "keys": 0,
           "kind": 0}
_MASK_KINDS = {"bool": 1, "float32": 2, "float16": 3, "bfloat16": 4}
NO_PARTIALS = {"out": None, "lse": None, "sum": None, "split_count": None, "stride_split": 0, "stride_token": 0,
                "stride_head": 0, "lse_split": 0, "lse_token": 0, "lse_head": 0}


# ---- keys and values -------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """K and V of a call and where the tokens of each sequence lie in them."""

    k: object        # KvSide
    v: object
    pages: object    # PageTable, None for ragged arrays
    table: dict      # fields of the kernels' PageTable
    capacity: int    # tokens no sequence exceeds, in ragged arrays those of all
    block_bytes: int   # of a memory block that are used, behind block pointers


def ragged_side(op, name, array):
    """KvSide of a Known `array` [tokens_k, num_kv_heads, head_dim]: one page."""
    if isinstance(array, (QuantizedKV, BlockKV)):
        raise TypeError(f"{op}: {name} must be an array with cu_seqlens_k, got {type(array).__name__}; quantized keys "
                        "go with block_table")
    check_shape(op, name, array, (None, None, None), "[tokens_k, num_kv_heads, head_dim]")
    return kv_side(op, name, array.with_axis(0))


def check_sides(op, num_heads, head_dim, k, v, names):
    """K and V fit each other and the heads of q."""
    k_name, v_name = names
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % STEP:
        raise ValueError(f"{op}: q must have a head_dim that is a multiple of {STEP} up to {MAX_HEAD_DIM}, got "
                         f"{head_dim}")
    if k.shape[3] != head_dim:
        raise ValueError(f"{op}: {k_name} must have q's head_dim {head_dim}, got {k.shape[3]}")
    if not 0 < v.shape[3] <= MAX_HEAD_DIM or v.shape[3] % STEP:
        raise ValueError(f"{op}: {v_name} must have a head_dim that is a multiple of {STEP} up to {MAX_HEAD_DIM}, got "
                         f"{v.shape[3]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{op}: {v_name} must have the pages, page_size and num_kv_heads of {k_name}, "
                         f"{list(k.shape[:3])}, got {list(v.shape[:3])}")
    _, page_size, num_kv_heads, _ = k.shape
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: {k_name} must have a num_kv_heads that divides the {num_heads} heads of q, got "
                         f"{num_kv_heads}")
    if k.tag.startswith("KvPlain") and v.tag.startswith("KvPlain") and k.tag != v.tag:
        raise TypeError(f"{op}: {v_name} must be {k.format} like {k_name}, got {v.format}")


# ---- arguments -------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """Where the results of splits go instead of out: arrays [splits, tokens, heads(, head_dim_v)], any strides.

    Parameters
    ----------
    out, lse : ndarray float32
        Normalised outputs; natural log-sum-exp times `lse_factor`, -inf for a split that sees no key.
    sum : ndarray float32, optional
        1 where a split saw a key, 0 where not.
    split_count : ndarray [tokens], int32, optional
        Number of splits of each token; 0 when its result is in out.
    lse_factor : float
    count_sinks : bool
        The last split counts the sink.
    """

    out: object
    lse: object
    sum: object = None
    split_count: object = None
    lse_factor: float = 1.0
    count_sinks: bool = False

    PARTS = ("out", "lse", "sum", "split_count")   # see runtime.Prepared

    @property
    def signature(self):
        return self.lse_factor, self.count_sinks

    def with_parts(self, *arrays):
        """With other arrays alike."""
        return Partials(*arrays, *self.signature)

    def fields(self):
        """Of PartialRows."""
        split, token, head, _ = strides(self.out)
        lse_split, lse_token, lse_head = strides(self.lse)
        return {"out": self.out, "lse": self.lse, "sum": self.sum, "split_count": self.split_count,
                "stride_split": split, "stride_token": token, "stride_head": head, "lse_split": lse_split,
                "lse_token": lse_token, "lse_head": lse_head}


def as_partials(op, partials):
    """`partials` of a call as Partials, None for none."""
    if partials is None or isinstance(partials, Partials):
        return partials
    if not isinstance(partials, tuple) or len(partials) != 2:
        raise TypeError(f"{op}: partials must be the pair (partial_out, partial_lse), got {type(partials).__name__}")
    return Partials(*partials)


def check_partials(op, partials, num_splits, tokens, num_heads, head_dim_v):
    """The arrays of Partials fit."""
    if num_splits is None:
        raise ValueError(f"{op}: num_splits must be given with partials, got None")
    for name, array, tail in (("out", partials.out, (head_dim_v,)), ("lse", partials.lse, ()),
                              ("sum", partials.sum, ())):
        if array is None and name == "sum":
            continue
        name = f"partials.{name}"
        check_dtype(op, name, array, "float32")
        check_shape(op, name, array, (num_splits, tokens, num_heads, *tail),
                    "[splits, tokens, num_heads, head_dim_v]" if tail else "[splits, tokens, num_heads]")
        check_element_strides(op, name, array)
        check_writeable(op, name, array)
    check_last_axis(op, "partials.out", partials.out)
    if partials.out.size and alignment(partials.out) < 16:
        raise ValueError(f"{op}: partials.out must have rows at multiples of 16 bytes, got strides "
                         f"{partials.out.strides}")


def sequence_view(array, uniform):
    """SequenceView of [batch, q_len, heads, head_dim] (uniform) or [tokens, heads, head_dim]."""
    *seq, token, head, _ = strides(array)
    return {"data": array, "stride_seq": seq[0] if uniform else 0, "stride_token": token, "stride_head": head}


def mask_view(op, mask, batch, num_heads, max_q_len):
    """MaskView of `mask`, broadcastable to [batch, num_heads, max_q_len, keys]; None for none."""
    if mask is None:
        return NO_MASK
    kind = check_dtype(op, "mask", mask, tuple(_MASK_KINDS))
    if not 1 <= mask.ndim <= 4:
        raise ValueError(f"{op}: mask must be broadcastable to [batch, num_heads, max_q_len, keys], got "
                         f"{list(mask.shape)}")
    check_element_strides(op, "mask", mask)
    shape = (1,) * (4 - mask.ndim) + mask.shape
    steps = (0,) * (4 - mask.ndim) + strides(mask)
    for axis, size, found in zip(("batch", "num_heads", "max_q_len"), (batch, num_heads, max_q_len), shape[:3],
                                 strict=True):
        if found != 1 and (found < size if axis == "max_q_len" else found != size):
            raise ValueError(f"{op}: mask must be broadcastable to [batch, num_heads, max_q_len, keys] = "
                             f"[{batch}, {num_heads}, {max_q_len}, *], got {list(mask.shape)} ({axis} {found})")
    seq, head, query, key = (0 if n == 1 else s for n, s in zip(shape, steps, strict=True))
    return {"data": mask, "stride_seq": seq, "stride_head": head, "stride_query": query,
            "stride_key": steps[3] if shape[3] > 1 else key, "queries": shape[2] if shape[2] > 1 else 2**31,
            "keys": shape[3], "kind": _MASK_KINDS[kind]}


def check_options(op, causal, softmax_scale, window_size, softcap, head_dim):
    """Numbers are of their kind and range; returns softmax_scale, by default ``head_dim ** -0.5``."""
    check_flag(op, "causal", causal)
    check_number(op, "window_size", window_size, least=0, integer=True)
    check_number(op, "softcap", softcap, least=0)
    if softmax_scale is None:
        return head_dim ** -0.5
    check_number(op, "softmax_scale", softmax_scale)
    return softmax_scale


def check_per_sequence(op, batch, contiguous=True, dtype="int32", **arrays):
    """Arrays with one entry per sequence; None values are ignored."""
    for name, array in arrays.items():
        if array is not None:
            check_array(op, name, array, dtype, (batch,), "[batch]", contiguous=contiguous)


def check_shards(op, key_offsets, key_counts, key_stride, stride_name):
    """Shards of a sequence are contiguous, each with offset and count, or round robin."""
    if (key_offsets is None) != (key_counts is None) or (key_offsets is not None and key_stride > 1):
        raise ValueError(f"{op}: key_offsets and key_counts must come together and without {stride_name}, got "
                         f"key_offsets {'given' if key_offsets is not None else 'None'}, key_counts "
                         f"{'given' if key_counts is not None else 'None'}, {stride_name} {key_stride}")


def check_lengths(op, lengths, capacity=None):
    """Content of the arrays of `lengths`, in host memory: none is negative, none more than `capacity` keys if known."""
    seqlens, counts = lengths.seqlens(), lengths.key_counts
    if seqlens.size == 0:
        return
    least, longest = value_range(seqlens)
    most = None
    if capacity is not None and counts is None and lengths.row_starts is None:
        most = capacity * lengths.key_stride + lengths.key_offset
    if least < 0 or (most is not None and longest > most):
        rule = "≥ 0" if most is None else f"from 0 to {most} (max_pages * page_size)"
        raise ValueError(f"{op}: cache_seqlens must be {rule}, got {least} to {longest}")
    for name in ("cache_starts", "key_offsets", "key_counts"):
        array = getattr(lengths, name)
        if array is not None and array.min() < 0:
            raise ValueError(f"{op}: {name} must be ≥ 0, got {array.min()}")
    if counts is not None and capacity is not None and counts.max() > capacity:
        raise ValueError(f"{op}: key_counts must be from 0 to {capacity}, what the cache can hold, got "
                         f"{counts.min()} to {counts.max()}")


def check_per_head(op, num_heads, **arrays):
    """float32 arrays with one entry per head; None values are ignored."""
    for name, array in arrays.items():
        if array is not None:
            check_dtype(op, name, array, "float32")
            check_shape(op, name, array, (num_heads,), "[num_heads]")
            check_last_axis(op, name, array)


def check_workspace(op, scratch, nbytes):
    """`scratch` if `nbytes` fit in it."""
    check_dtype(op, "workspace", scratch, "uint8")
    check_last_axis(op, "workspace", scratch)
    if scratch.ndim != 1 or scratch.size < nbytes:
        raise ValueError(f"{op}: workspace must be [nbytes] with at least {nbytes} bytes, got {list(scratch.shape)}")
    if address(scratch) % 16:
        raise ValueError(f"{op}: workspace must start at a multiple of 16 bytes, got one {address(scratch) % 16} "
                         "bytes off")
    return scratch
