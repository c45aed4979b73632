# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank additions to the projections of attention, y += scale * (x @ aᵀ) @ bᵀ."""

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .devices import to_host
from .ops.quant_gemm import quant_gemm
from .quant import QMatrix
from .quant.safetensors_file import Safetensors
from .runtime import layer_workspace
from .runtime.arrays import dtype_name, dtype_of
from .runtime.checks import FLOATS, check_number

PROJECTIONS = ("q", "k", "v", "o")
_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|attention|attn)\.([qkvo])_proj"
                   r"\.lora_([AB])(?:\.\w+)?\.weight")
_STEP = 8   # what a rank is filled up to a multiple of


class LoRA(NamedTuple):
    """The addition to one projection.

    Parameters
    ----------
    a : ndarray [rank, in_features], float16, bfloat16 or float32
        As PEFT stores them; ExLlamaV2 has them transposed.
    b : ndarray [out_features, rank]
    scale : float
        alpha / rank, or alpha / sqrt(rank) for rsLoRA. Default 1: it is in `b` already.
    """

    a: object
    b: object
    scale: float = 1.0

    @property
    def rank(self):
        return self.a.shape[0]


class Group(NamedTuple):
    """Rows of a batch by adapter."""

    order: object     # int32 [tokens], rows in the order of their adapters, None where they are
    inverse: object   # int32 [tokens], where each row then is
    offsets: object   # int32 [adapters + 1], first of the ordered rows of each adapter


class Adapters:
    """All adapters of a layer, packed: each projection's of one rank, filled up with zeros.

    Parameters
    ----------
    given : dict of name to (dict of "q", "k", "v" or "o" to LoRA)
    sizes : dict of projection to (out_features, in_features)
    dtype : str
        Activations; `a` and `b` are rounded to it, `scale` is multiplied before.
    xp : numpy or cupy

    Attributes
    ----------
    names : dict of name to its number
    max_rank : int
        Over all projections and adapters, 0 for none.
    rank : int
        `max_rank` filled up.
    """

    def __init__(self, given, sizes, dtype, xp):
        if not isinstance(given, Mapping):
            raise TypeError(f"QAttn: adapters must be a dict of name to (dict of projection to LoRA), got "
                            f"{type(given).__name__}")
        given = dict(given)
        self.names = {name: n for n, name in enumerate(given)}
        self.xp, self.dtype = xp, dtype_of(dtype)
        for name, loras in given.items():
            _check(name, loras, sizes)
        self._has = [frozenset(loras) for loras in given.values()]
        self.max_rank = max((lora.rank for loras in given.values() for lora in loras.values()), default=0)
        self.rank = -(-self.max_rank // _STEP) * _STEP
        self._groups, self._a, self._b = {}, {}, {}
        for inputs in (("q", "k", "v"), ("o",)):
            used = [p for p in inputs if any(p in has for has in self._has)]
            if used:
                self._pack(inputs, used, list(given.values()), sizes)

    def _pack(self, inputs, used, given, sizes):
        """Weights of the projections of one input: `a` of all in one matrix of each adapter."""
        size = {p: n for n, p in enumerate(used)}
        a = np.zeros((len(given), len(used), self.rank, sizes[used[0]][1]), np.float32)
        b = {p: np.zeros((len(given), sizes[p][0], self.rank), np.float32) for p in used}
        for n, loras in enumerate(given):
            for p in set(used) & set(loras):
                lora = loras[p]
                a[n, size[p], :lora.rank] = to_host(lora.a)
                b[p][n, :, :lora.rank] = to_host(lora.b).astype(np.float32) * np.float32(lora.scale)
        self._a[inputs] = tuple(used), self._experts(a.reshape(len(given), -1, a.shape[-1]))
        self._b |= {p: self._experts(part) for p, part in b.items()}

    def _experts(self, weights):
        """(QExperts, its matrices one by one)"""
        stacked = QMatrix.stack([QMatrix.from_dense(w.astype(self.dtype)) for w in weights]).to(self.xp)
        return stacked, [stacked.expert(n) for n in range(len(stacked))]

    def numbers(self, names):
        """Numbers of adapters by name; ValueError for a name that is none."""
        for name in names:
            if name not in self.names:
                raise ValueError(f"QAttn: loras must be among {', '.join(map(repr, self.names)) or 'none'}, got "
                                 f"{name!r}; one without weights for this layer is set_loras({{{name!r}: {{}}}})")
        return [self.names[name] for name in names]

    def group(self, names, batch_size, q_len):
        """Group of `names`, one or None for each sequence, of `q_len` tokens each. Kept for the next layer or call."""
        if len(names) != batch_size:
            raise ValueError(f"QAttn: sequence_loras must have a name or None for each of the {batch_size} sequences, "
                             f"got {len(names)}")
        device = None if self.xp is np else self.xp.cuda.runtime.getDevice()
        key = tuple(names), q_len, device
        found = self._groups.get(key)
        if found is None:
            numbers = np.array([-1 if name is None else self.numbers([name])[0] for name in names])
            order = np.argsort(numbers, kind="stable")
            ends = np.searchsorted(numbers[order], np.arange(len(self.names) + 1)) * q_len
            to = self.xp.asarray
            rows = (order[:, None] * q_len + np.arange(q_len)).ravel()
            in_order = (order == np.arange(batch_size)).all()
            found = Group(None if in_order else to(rows.astype(np.int32)), to(np.argsort(rows).astype(np.int32)),
                          to(ends.astype(np.int32)))
            while len(self._groups) >= 64:
                self._groups.pop(next(iter(self._groups)))
            self._groups[key] = found
        return found

    def add(self, inputs, x, outs, numbers=(), group=None):
        """Add the adapters' products of `x` [tokens, in] to `outs`, a view of each projection of `inputs`.

        Parameters
        ----------
        inputs : ("q", "k", "v") or ("o",)
        outs : dict of projection to ndarray [tokens, out]
        numbers : list of int
            Adapters of all rows, in this order.
        group : Group, optional
            Then also those of its rows, which are in its order.
        """
        if inputs not in self._a:
            return
        used, (grouped, single) = self._a[inputs]
        tokens, columns = len(x), len(used) * self.rank
        room = layer_workspace(self.xp, tokens * columns * self.dtype.itemsize, "lora")
        low = room[:tokens * columns * self.dtype.itemsize].view(self.dtype).reshape(tokens, columns)
        for n in numbers:
            if not self._has[n].isdisjoint(inputs):
                quant_gemm(x, single[n], out=low)
                self._rise(used, low, outs, lambda p, n=n: self._b[p][1][n] if p in self._has[n] else None, {})
        if group is not None:
            offsets = {"expert_offsets": group.offsets}
            quant_gemm(x, grouped, out=low, **offsets)
            self._rise(used, low, outs, lambda p: self._b[p][0], offsets)

    def _rise(self, used, low, outs, weight_of, offsets):
        """outs += low @ bᵀ"""
        for i, p in enumerate(used):
            weight = weight_of(p)
            if weight is not None:
                quant_gemm(low[:, i * self.rank:(i + 1) * self.rank], weight, accumulate=True, out=outs[p], **offsets)


def _check(name, loras, sizes):
    """Both matrices of each projection are there and fit it."""
    if not isinstance(loras, Mapping):
        raise TypeError(f"QAttn: loras[{name!r}] must be a dict of projection to LoRA, got {type(loras).__name__}")
    for p, lora in loras.items():
        where = f"loras[{name!r}][{p!r}]"
        if p not in sizes:
            raise ValueError(f"QAttn: loras[{name!r}] must be of projections {', '.join(sizes)}, got {p!r}")
        if not isinstance(lora, LoRA) or not hasattr(lora.a, "shape") or not hasattr(lora.b, "shape"):
            raise TypeError(f"QAttn: {where} must be a LoRA of two arrays, got {type(lora).__name__}"
                            f"{' without one of them' if isinstance(lora, LoRA) else ''}")
        out_features, in_features = sizes[p]
        for letter, array in (("a", lora.a), ("b", lora.b)):
            if dtype_name(array) not in FLOATS:
                raise TypeError(f"QAttn: {where}.{letter} must be {', '.join(FLOATS)}, got {dtype_name(array)}")
        if lora.a.ndim != 2 or lora.a.shape[1] != in_features or lora.a.shape[0] == 0:
            raise ValueError(f"QAttn: {where}.a must be [rank, in_features={in_features}], got {list(lora.a.shape)}")
        if lora.b.shape != (out_features, lora.rank):
            raise ValueError(f"QAttn: {where}.b must be [out_features={out_features}, rank={lora.rank}], got "
                             f"{list(lora.b.shape)}")
        check_number("QAttn", f"{where}.scale", lora.scale)


def names_of(loras, sequence_loras):
    """(names of adapters of all sequences, name or None of each sequence; None without), tuples."""
    found = []
    for name, given, each in (("loras", loras, ""), ("sequence_loras", sequence_loras, ", one or None a sequence")):
        if isinstance(given, str | bytes) or given is not None and not isinstance(given, Iterable):
            raise TypeError(f"QAttn: {name} must be a sequence of names{each}, got {given!r}")
        names = None if given is None else tuple(given)
        wrong = next((n for n in names or () if not isinstance(n, Hashable)), None)
        if wrong is not None:
            raise TypeError(f"QAttn: {name} must hold names of adapters, got {wrong!r}")
        found.append(names)
    return found[0] or (), found[1]


# ---- PEFT ------------------------------------------------------------------------------------------------


def load_lora(path, *, scaling=1.0):
    """The adapter in a folder that PEFT wrote.

    Parameters
    ----------
    path : str or Path
        Folder with adapter_config.json and adapter_model.safetensors.
    scaling : float
        Multiplies the adapter's own alpha / rank (rsLoRA: alpha / sqrt(rank)).

    Returns
    -------
    dict of int to dict
        For each layer it has, `LoRA` by projection: ``layer.set_loras({"name": load_lora(path).get(n, {})})``.

    Raises
    ------
    ValueError
        Files that do not belong together, half of a pair of matrices, shapes that do not fit the rank.
    NotImplementedError
        Another method than LoRA, DoRA, biases, or weights of other modules than q_proj, k_proj, v_proj and o_proj of
        attention.
    OSError
        A file cannot be read.

    Notes
    -----
    `rank_pattern` and `alpha_pattern` are followed. Arrays are over the mapped file.
    """
    path = Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    for name, wanted in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("use_dora", (False, None)),
                         ("fan_in_fan_out", (False, None)), ("modules_to_save", (None, []))):
        if config.get(name, wanted[0]) not in wanted:
            raise NotImplementedError(f"load_lora: {name} of {path / 'adapter_config.json'} must be {wanted[0]!r}, got "
                                      f"{config[name]!r}")
    tensors, pairs = Safetensors(path / "adapter_model.safetensors"), {}
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            raise NotImplementedError(f"load_lora: tensors of {path} must be lora_A and lora_B of q_proj, k_proj, "
                                      f"v_proj and o_proj, got {name}")
        layer, projection, half = match.groups()
        pairs.setdefault((int(layer), projection), {})[half] = name
    found = {}
    for (layer, projection), halves in sorted(pairs.items()):
        if len(halves) != 2:
            (half, name), = halves.items()
            raise ValueError(f"load_lora: {path} must have lora_{'B' if half == 'A' else 'A'} beside {name}, got none")
        a, b = tensors[halves["A"]], tensors[halves["B"]]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"load_lora: {halves['A']} must be [rank, in] and {halves['B']} [out, rank], got "
                             f"{list(a.shape)} and {list(b.shape)}")
        module = halves["A"].removeprefix("base_model.model.").partition(".lora_A")[0]
        rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
        if rank != a.shape[0]:
            raise ValueError(f"load_lora: {halves['A']} must have the rank {rank} of adapter_config.json, got "
                             f"{a.shape[0]}")
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found.setdefault(layer, {})[projection] = LoRA(a, b, scaling * factor)
    return found


def _pattern(patterns, module, default):
    """The value of the first pattern that is the module's name or the end of it, as PEFT has it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
