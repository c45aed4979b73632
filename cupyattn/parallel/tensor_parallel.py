# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which rank has which heads of an attention layer, and its part of the weights."""

import math
import numbers
from collections.abc import Mapping

import numpy as np

from ..q_attn.lora import PROJECTIONS, LoRA
from ..quant import QMatrix
from ..quant.shards import shard_range
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_number
from .communicators import Communicator


def split_heads(num_heads, weights):
    """Heads for each rank in proportion to its weight: rounded down, then one more by the largest remainders.

    Parameters
    ----------
    num_heads : int
    weights : sequence of float
        One per rank, not negative: free memory, say.

    Returns
    -------
    list of int
        Of equal remainders the first ranks'.

    Examples
    --------
    >>> from cupyattn import split_heads
    >>> split_heads(8, [24, 8]), split_heads(8, [1, 1, 1]), split_heads(7, [1, 1])
    ([6, 2], [3, 3, 2], [4, 3])
    """
    check_number("split_heads", "num_heads", num_heads, least=0, integer=True)
    if isinstance(weights, str) or not np.iterable(weights):
        raise TypeError(f"split_heads: weights must be a sequence of numbers, got {weights!r}")
    weights = list(weights)
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"split_heads: weights must be numbers, got {weight!r}")
    weights = [float(weight) for weight in weights]
    total = sum(weights)
    if not weights or min(weights) < 0 or not 0 < total < math.inf:
        raise ValueError(f"split_heads: weights must be numbers of at least 0, not all 0, got {weights}")
    shares = [num_heads * weight / total for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda rank: counts[rank] - shares[rank])
    for rank in by_remainder[:num_heads - sum(counts)]:
        counts[rank] += 1
    return counts


class TPContext:
    """The heads of an attention layer dealt out to ranks, for all layers of a model.

    A rank has some KV heads and all query heads that look at them.

    Parameters
    ----------
    communicator : Communicator
    num_heads, num_kv_heads, head_dim, hidden_size : int
        Of the whole layer.
    weights : sequence of float, optional
        How much of it each rank takes, see `split_heads`. Default: all the same.

    Attributes
    ----------
    kv_heads, q_heads : list of int
        Heads of every rank.
    kv_split, q_split : list of (device, first, last)
        Heads ``first .. last - 1`` of the ranks of this process: what ``Params.prep_tp(context)`` looks at.

    Raises
    ------
    NotImplementedError
        A rank would have no head: there are fewer KV heads than ranks, or its weight is too small.

    Examples
    --------
    >>> import cupyattn
    >>> context = cupyattn.TPContext(cupyattn.InProcessCommunicator(3), num_heads=16, num_kv_heads=8, head_dim=64,
    ...                              hidden_size=1024)
    >>> context.kv_heads, context.kv_split[1], context.q_split[1]
    ([3, 3, 2], ('cpu', 3, 6), ('cpu', 6, 12))
    """

    def __init__(self, communicator, *, num_heads, num_kv_heads, head_dim, hidden_size, weights=None):
        if not isinstance(communicator, Communicator):
            raise TypeError(f"TPContext: communicator must be a Communicator, got {type(communicator).__name__}")
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim),
                            ("hidden_size", hidden_size)):
            check_number("TPContext", name, value, least=1, integer=True)
        if num_heads % num_kv_heads:
            raise ValueError(f"TPContext: num_heads must be a multiple of num_kv_heads, got {num_heads} and "
                             f"{num_kv_heads}")
        weights = [1] * communicator.size if weights is None else weights
        self.communicator, self.head_dim, self.hidden_size = communicator, int(head_dim), int(hidden_size)
        self.num_heads, self.num_kv_heads = int(num_heads), int(num_kv_heads)
        self.kv_heads = split_heads(num_kv_heads, weights)
        if len(self.kv_heads) != communicator.size:
            raise ValueError(f"TPContext: weights must hold one for each of the {communicator.size} ranks, got "
                             f"{len(self.kv_heads)}")
        if 0 in self.kv_heads:
            raise NotImplementedError(f"TPContext: weights must give every rank a KV head, got {self.kv_heads} heads; "
                                      "make the communicator of fewer ranks")
        self.layers = {}   # of tp_attn_forward_: what is made of a layer's weights, once
        group = num_heads // num_kv_heads
        self.q_heads = [group * heads for heads in self.kv_heads]
        self.kv_split, self.q_split = ([(device, *self.heads(rank, kind)) for rank, device in
                                        zip(communicator.ranks, communicator.devices, strict=True)]
                                       for kind in ("kv", "q"))

    def heads(self, rank, kind):
        """First head of a rank, and the one after its last; `kind` is "q" or "kv"."""
        if kind not in ("q", "kv"):
            raise ValueError(f"TPContext: kind must be 'q' or 'kv', got {kind!r}")
        counts = self.q_heads if kind == "q" else self.kv_heads
        if not 0 <= rank < len(counts):
            raise ValueError(f"TPContext: rank must be from 0 to {len(counts) - 1}, got {rank}")
        first = sum(counts[:rank])
        return first, first + counts[rank]

    def shard_heads(self, array, rank, kind, *, name="array"):
        """The part of a rank of an array [heads, ...] or [heads * head_dim]: head norms, sinks, biases.

        Parameters
        ----------
        array : ndarray or None
        rank : int
        kind : "q" or "kv"
        name : str
            What messages call the array.

        Returns
        -------
        ndarray
            A view. None stays None.
        """
        if array is None:
            return None
        array_namespace("TPContext", **{name: array})
        first, last = self.heads(rank, kind)
        heads = self.num_heads if kind == "q" else self.num_kv_heads
        unit = {heads: 1, heads * self.head_dim: self.head_dim}.get(array.shape[0] if array.ndim else None)
        if unit is None:
            raise ValueError(f"TPContext: {name} must be [{heads} heads, ...] or [{heads * self.head_dim}, ...], got "
                             f"{list(array.shape)}")
        return array[first * unit:last * unit]

    def shard_rows(self, weight, rank, kind, *, name="weight"):
        """The rows of a rank of the q, k or v projection: those of its heads.

        Parameters
        ----------
        weight : QMatrix or ndarray [heads * head_dim, hidden_size]
        rank : int
        kind : "q" or "kv"
        name : str
            What messages call the weight.

        Returns
        -------
        QMatrix or ndarray
            A view where the borders are multiples of 16, which for a head_dim of such they are.
        """
        first, last = self.heads(rank, kind)
        heads = self.num_heads if kind == "q" else self.num_kv_heads
        _check_weight(name, weight, (heads * self.head_dim, self.hidden_size))
        return _rows(weight, first * self.head_dim, last * self.head_dim)

    def shard_columns(self, weight, rank, *, name="weight"):
        """The columns of a rank of the o projection: they multiply the attention of its heads, to be summed up.

        Parameters
        ----------
        weight : QMatrix or ndarray [hidden_size, num_heads * head_dim]
        rank : int
        name : str
            What messages call the weight.

        Returns
        -------
        QMatrix or ndarray
            A copy; see the notes of ``QMatrix.column_shard``.
        """
        first, last = self.heads(rank, "q")
        _check_weight(name, weight, (self.hidden_size, self.num_heads * self.head_dim))
        start, stop = first * self.head_dim, last * self.head_dim
        if isinstance(weight, QMatrix):
            return weight.column_range(start, stop)
        return array_namespace("TPContext", weight=weight).ascontiguousarray(weight[:, start:stop])

    def hidden_range(self, rank):
        """The features of the hidden state whose rows of the o projection a rank has when attention is gathered."""
        return shard_range(self.hidden_size, rank, self.communicator.size)

    def shard_output_rows(self, weight, rank):
        """The rows of a rank of the o projection, for attention gathered from all ranks; see `tp_attn_forward_`.

        Parameters
        ----------
        weight : QMatrix or ndarray [hidden_size, num_heads * head_dim]
        rank : int

        Returns
        -------
        QMatrix or ndarray
            A view. Its features of the hidden state are ``hidden_range(rank)``.
        """
        _check_weight("weight", weight, (self.hidden_size, self.num_heads * self.head_dim))
        return _rows(weight, *self.hidden_range(rank))

    def shard_loras(self, adapters, rank, *, features=None):
        """The part of a rank of the adapters of a layer.

        Parameters
        ----------
        adapters : dict of name to (dict of "q", "k", "v" or "o" to LoRA)
            Of the whole layer.
        rank : int
        features : (int, int), optional
            First row of the o projection that the rank has, and the one after its last; default: it has columns.

        Returns
        -------
        dict
        """
        for loras in (adapters, *(adapters.values() if isinstance(adapters, Mapping) else ())):
            if not isinstance(loras, Mapping):
                raise TypeError("TPContext: adapters must be a dict of names to dicts of projections to LoRA, got "
                                f"{type(loras).__name__}")
        return {name: {projection: self._shard_lora(lora, projection, rank, features)
                       for projection, lora in loras.items()} for name, loras in adapters.items()}

    def _shard_lora(self, lora, projection, rank, features):
        if projection not in PROJECTIONS or not isinstance(lora, LoRA):
            raise ValueError(f"TPContext: adapters must hold a LoRA for {', '.join(PROJECTIONS)}, got "
                             f"{type(lora).__name__} for {projection!r}")
        kind = {"q": "q", "o": "q"}.get(projection, "kv")
        first, last = (self.head_dim * n for n in self.heads(rank, kind))
        size = self.head_dim * (self.num_heads if kind == "q" else self.num_kv_heads)
        inputs, outputs = (size, self.hidden_size) if projection == "o" else (self.hidden_size, size)
        if not (hasattr(lora.a, "shape") and hasattr(lora.b, "shape")):
            raise TypeError(f"TPContext: adapters must have arrays a and b for {projection!r}, got "
                            f"{type(lora.a).__name__} and {type(lora.b).__name__}")
        if lora.a.ndim != 2 or lora.b.ndim != 2 or (lora.a.shape[1], lora.b.shape[0]) != (inputs, outputs) \
                or lora.a.shape[0] != lora.b.shape[1]:
            raise ValueError(f"TPContext: adapters must have a [rank, {inputs}] and b [{outputs}, rank] for "
                             f"{projection!r}, got {list(lora.a.shape)} and {list(lora.b.shape)}")
        if projection != "o":
            return lora._replace(b=lora.b[first:last])
        if features is not None:
            return lora._replace(b=lora.b[slice(*features)])
        return lora._replace(a=lora.a[:, first:last])

    def __repr__(self):
        return (f"TPContext({self.communicator!r}, heads {'+'.join(map(str, self.q_heads))}, KV heads "
                f"{'+'.join(map(str, self.kv_heads))} of {self.head_dim}, hidden_size {self.hidden_size})")


def _check_weight(name, weight, shape):
    if not isinstance(weight, QMatrix):
        array_namespace("TPContext", **{name: weight})
    if tuple(weight.shape) != shape:
        raise ValueError(f"TPContext: {name} must be [out_features, in_features] = {list(shape)}, got "
                         f"{list(weight.shape)}")


def _rows(weight, start, stop):
    return weight.row_range(start, stop) if isinstance(weight, QMatrix) else weight[start:stop]
