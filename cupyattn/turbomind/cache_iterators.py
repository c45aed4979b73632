# SPDX-License-Identifier: Apache-2.0
"""Where TurboMind's kernels find keys and values: one linear buffer, or memory blocks that hold all layers."""

import copy
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from ..devices import to_host
from ..kv.quantized import FORMATS, BlockKV, BlockLayer
from ..paging.table import PageTable
from ..runtime.arrays import array_namespace
from ..runtime.checks import FLOATS, check_dtype, check_element_strides, check_number, check_shape
from ..runtime.structs import address


class QuantPolicy(IntEnum):
    """How a KV cache is stored: LMDeploy's numbers, compared as a whole and never bit by bit."""

    NONE = 0        # the activations' dtype
    INT4 = 4        # 4-bit codes, scale and minimum per token and head
    INT8 = 8        # 8-bit codes, scale and minimum per token and head
    FP8_E4M3 = 16   # one float32 scale for all keys and one for all values, or one per head
    FP8_E5M2 = 17

    @property
    def is_fp8(self):
        """Whether the scales lie outside the blocks."""
        return self in (QuantPolicy.FP8_E4M3, QuantPolicy.FP8_E5M2)

    def format(self, dtype):
        """Name of the format of the rows, for activations of `dtype`."""
        return {0: dtype, 4: "int4", 8: "int8", 16: "fp8_e4m3", 17: "fp8_e5m2"}[self]


@dataclass(frozen=True, eq=False)
class LinearIteratorParams:
    """Contiguous keys and values of a batch, [num_kv_heads][K, V][tokens][head_dim].

    Parameters
    ----------
    kv_cache : ndarray, float16, bfloat16 or float32
        Contiguous; `from_array` derives the strides.
    stride_h : int
        Elements from one KV head to the next.
    key_to_val : int
        Elements from a key to its value; 0 where K and V share one copy.

    Notes
    -----
    Key (sequence b, head h, token t, d) is element ``h*stride_h + (cu_k_len[b] - cu_k_len[0] + t)*head_dim + d``.
    """

    kv_cache: object
    stride_h: int
    key_to_val: int

    def __post_init__(self):
        op = type(self).__name__
        array_namespace(op, kv_cache=self.kv_cache)
        check_dtype(op, "kv_cache", self.kv_cache, FLOATS)
        if not self.kv_cache.flags.c_contiguous:
            raise ValueError(f"{op}: kv_cache must be contiguous, got strides {self.kv_cache.strides}")
        check_number(op, "stride_h", self.stride_h, least=0, integer=True)
        check_number(op, "key_to_val", self.key_to_val, least=0, integer=True)

    @classmethod
    def from_array(cls, kv_cache, /):
        """From an array [num_kv_heads, 2, tokens, head_dim], with 1 in place of 2 where K and V are one copy."""
        op = cls.__name__
        array_namespace(op, kv_cache=kv_cache)
        if kv_cache.ndim != 4 or kv_cache.shape[1] not in (1, 2):
            raise ValueError(f"{op}: kv_cache must be [num_kv_heads, 2 or 1, tokens, head_dim], got "
                             f"{list(kv_cache.shape)}")
        _, copies, tokens, head_dim = kv_cache.shape
        return cls(kv_cache, copies * tokens * head_dim, (copies - 1) * tokens * head_dim)

    @classmethod
    def empty(cls, num_kv_heads, tokens, head_dim, *, dtype, xp=np):
        """A buffer of zeros for `tokens` tokens, what ``flatten_kv`` writes into."""
        return cls.from_array(xp.zeros((num_kv_heads, 2, tokens, head_dim), dtype))

    def views(self, num_kv_heads, tokens, head_dim):
        """Keys and values as arrays [tokens, num_kv_heads, head_dim] over the buffer.

        Raises
        ------
        ValueError
            The buffer is too small.
        """
        need = max(num_kv_heads - 1, 0) * self.stride_h + self.key_to_val + tokens * head_dim
        if self.kv_cache.size < need:
            raise ValueError(f"LinearIteratorParams: kv_cache must hold {need} elements for {num_kv_heads} heads of "
                             f"{tokens} tokens, got {self.kv_cache.size}")
        flat = self.kv_cache.reshape(-1)
        as_strided = array_namespace("LinearIteratorParams", kv_cache=flat).lib.stride_tricks.as_strided
        strides = tuple(n * flat.itemsize for n in (head_dim, self.stride_h, 1))
        return tuple(as_strided(flat[start:], (tokens, num_kv_heads, head_dim), strides)
                     for start in (0, min(self.key_to_val, flat.size)))


@dataclass(frozen=True, eq=False)
class BlockIteratorParams:
    """Keys and values in memory blocks of `block_len` tokens that are reached by their addresses.

    A block holds all layers; token t of sequence b lies in slot ``t % block_len`` of the block at
    ``block_ptrs[cu_block_nums[b] + t // block_len]``. What lies where inside a block follows from the heads, the dtype
    and the quant policy: see `BlockKV.turbomind`.

    Parameters
    ----------
    block_ptrs : ndarray [blocks], uint64 or int64
        Addresses, sequence after sequence. NumPy for memory of the host, CuPy for memory of the GPU.
    cu_block_nums : ndarray [batch + 1], int32
        First entry of each sequence.
    layer_id : int
        Layers of the same size before this one in a block.
    block_len : int
        Tokens per block; any number ≥ 1. Default 64.
    offset : int, optional
        Bytes from a block's start to the layer, instead of `layer_id`.
    buffers : sequence of ndarray, optional
        The arrays the blocks lie in. They are kept alive and checked.
    trusted_pointers : bool
        Say True when there are no arrays to name; then nothing checks the addresses.

    Raises
    ------
    TypeError, ValueError
        A field of the wrong kind or out of range; neither `buffers` nor `trusted_pointers`.
    """

    block_ptrs: object
    cu_block_nums: object
    layer_id: int = 0
    block_len: int = 64
    offset: int | None = None
    buffers: tuple | None = None
    trusted_pointers: bool = False

    def __post_init__(self):
        op = type(self).__name__
        check_number(op, "layer_id", self.layer_id, least=0, integer=True)
        check_number(op, "block_len", self.block_len, least=1, integer=True)
        if self.offset is not None:
            check_number(op, "offset", self.offset, least=0, integer=True)
        array_namespace(op, block_ptrs=self.block_ptrs, cu_block_nums=self.cu_block_nums)
        check_dtype(op, "block_ptrs", self.block_ptrs, ("uint64", "int64"))
        check_shape(op, "block_ptrs", self.block_ptrs, (None,), "[blocks]")
        check_dtype(op, "cu_block_nums", self.cu_block_nums, "int32")
        check_shape(op, "cu_block_nums", self.cu_block_nums, (None,), "[batch + 1]")
        for name in ("block_ptrs", "cu_block_nums"):
            check_element_strides(op, name, getattr(self, name))
        if self.buffers is None and self.trusted_pointers is not True:
            raise ValueError(f"{op}: buffers must be given, or trusted_pointers=True, got neither; a wrong address "
                             "would read or overwrite any memory")
        starts, pointers = (to_host(a).astype(np.int64) for a in (self.cu_block_nums, self.block_ptrs))
        if len(starts) == 0 or starts[0] < 0 or (np.diff(starts) < 0).any() or starts[-1] > len(pointers):
            raise ValueError(f"{op}: cu_block_nums must not decrease and lie within the {len(pointers)} entries of "
                             f"block_ptrs, got {starts.tolist()}")
        bits = int(np.bitwise_or.reduce(pointers, initial=16))
        buffers = None if self.buffers is None else tuple(self.buffers)
        table = PageTable.pointers(self.block_ptrs, self.cu_block_nums, buffers=buffers, alignment=bits & -bits,
                                   trusted_pointers=self.trusted_pointers)
        for name, value in (("buffers", buffers), ("table", table), ("starts_host", starts),
                            ("pointers_host", pointers)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_pool(cls, pool, block_table, num_blocks=None, /, *, layer_id=0, block_len=64, offset=None):
        """Blocks that are the rows of one array.

        Parameters
        ----------
        pool : ndarray [pool_blocks, ...]
            Every entry of the first axis is a block; contiguous within a block.
        block_table : int array [batch, max_blocks]
            Ids of the blocks of each sequence.
        num_blocks : int array [batch], optional
            How many of its ids a sequence uses; default all.

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit, or a used id that is no block of the pool.
        """
        table = PageTable.from_pool(pool, block_table, num_blocks)
        return cls(table.block_ptrs, table.indptr, layer_id, block_len, offset, buffers=(pool,))

    def at_layer(self, layer_id=0, *, offset=None):
        """The same blocks for another layer; no pointer is read again."""
        new = copy.copy(self)
        for name, value in (("layer_id", layer_id), ("offset", offset)):
            if value is not None:
                check_number(type(self).__name__, name, value, least=0, integer=True)
            object.__setattr__(new, name, value)
        return new

    def host_table(self):
        """The addresses as a PageTable in host memory, to be compared but not followed."""
        return PageTable.pointers(self.pointers_host, self.starts_host.astype(np.int32), trusted_pointers=True,
                                  alignment=self.table.alignment)

    def layer(self, num_kv_heads, head_dim, *, dtype="float16", quant_policy=QuantPolicy.NONE, kv_scale=None):
        """How K and V of the layer lie in a block.

        Parameters
        ----------
        num_kv_heads, head_dim : int
        dtype : str
            Of the activations.
        quant_policy : QuantPolicy
        kv_scale : pair of ndarray, optional
            float32 [1] or [num_kv_heads] for K and for V, with the fp8 policies.

        Returns
        -------
        BlockLayer
            BlockKV of K and of V, and the bytes of the layer.
        """
        shape = num_kv_heads, head_dim, self.block_len
        policy = QuantPolicy(quant_policy)
        if not policy.is_fp8:
            return BlockKV.turbomind(*shape, quant_policy=int(policy), dtype=dtype, layer=self.layer_id,
                                     offset=self.offset)
        # the same order of heads, K and V with one byte per element and no parameters
        plain = BlockKV.turbomind(*shape, dtype="float16")
        nbytes = plain.nbytes // 2
        start = self.layer_id * nbytes if self.offset is None else self.offset
        sides = [replace(side, format=policy.format(dtype), offset=start + side.offset // 2, scale=scale)
                 for side, scale in zip(plain[:2], kv_scale, strict=True)]
        return BlockLayer(*sides, nbytes)


class LinearCacheIter:
    """Byte addresses of keys and values in the buffer of a LinearIteratorParams, resolved on the host.

    Parameters
    ----------
    params : LinearIteratorParams
    cu_k_len : int array [batch + 1]
    head_dim : int
    """

    def __init__(self, params, cu_k_len, head_dim):
        self.params, self.head_dim = params, head_dim
        self.starts = to_host(cu_k_len).astype(np.int64)
        self.starts -= self.starts[0]
        self.itemsize = params.kv_cache.itemsize

    def key_address(self, sequence, head, token):
        """Address of a key's first element; ints or arrays of them."""
        at = head * self.params.stride_h + (self.starts[sequence] + token) * self.head_dim
        return address(self.params.kv_cache) + at * self.itemsize

    def value_address(self, sequence, head, token):
        """Address of a value's first element."""
        return self.key_address(sequence, head, token) + self.params.key_to_val * self.itemsize


class BlockCacheIter:
    """Byte addresses of keys, values and their parameters in the blocks of a BlockIteratorParams, on the host.

    Parameters
    ----------
    params : BlockIteratorParams
    layer : BlockLayer
        From ``params.layer(...)``.
    """

    def __init__(self, params, layer):
        self.params, self.layer = params, layer
        self.pointers, self.starts = params.pointers_host, params.starts_host

    def _slot(self, sequence, token):
        block = self.starts[sequence] + token // self.params.block_len
        if (block >= self.starts[sequence + 1]).any():
            raise IndexError(f"BlockCacheIter: token must lie in the blocks of its sequence, got {token}")
        return self.pointers[block], token % self.params.block_len

    def _data(self, side, sequence, head, token):
        block, slot = self._slot(sequence, token)
        itemsize = 1 if side.format in FORMATS else 4 if side.format == "float32" else 2
        return block + side.offset + (head * side.stride_head + slot * side.stride_token) * itemsize

    def _parameters(self, side, sequence, head, token):
        if side.scale_dtype is None or side.scale is not None:
            raise ValueError("BlockCacheIter: quant_policy must keep parameters in the blocks, got format "
                             f"{side.format}")
        block, slot = self._slot(sequence, token)
        itemsize = 4 if side.scale_dtype == "float32" else 2
        at = head * side.scale_stride_head + slot * side.scale_stride_token
        return block + side.scale_offset + at * itemsize

    def key_address(self, sequence, head, token):
        """Address of a key's first element; ints or arrays of them."""
        return self._data(self.layer.k, sequence, head, token)

    def value_address(self, sequence, head, token):
        """Address of a value's first element."""
        return self._data(self.layer.v, sequence, head, token)

    def key_params_address(self, sequence, head, token):
        """Address of a key's scale; its minimum follows."""
        return self._parameters(self.layer.k, sequence, head, token)

    def value_params_address(self, sequence, head, token):
        """Address of a value's scale; its minimum follows."""
        return self._parameters(self.layer.v, sequence, head, token)


def create_cache_iter_factory(params):
    """The iterator over the keys and values that ``invoke_attention(params)`` reads.

    Parameters
    ----------
    params : AttentionParams

    Returns
    -------
    LinearCacheIter or BlockCacheIter
        Linear where `linear_iter_params` is set.

    Raises
    ------
    TypeError, ValueError
        No AttentionParams, or neither `linear_iter_params` nor `block_iter_params` is set.
    """
    from .attention_params import check_params  # which imports this module

    check_params("create_cache_iter_factory", params)
    if params.linear_iter_params is not None:
        return LinearCacheIter(params.linear_iter_params, params.cu_k_len, params.size_per_head)
    if params.block_iter_params is None:
        raise ValueError("create_cache_iter_factory: params must have linear_iter_params or block_iter_params, got "
                         "neither")
    return BlockCacheIter(params.block_iter_params, params.block_layer)
