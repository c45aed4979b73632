# SPDX-License-Identifier: Apache-2.0
"""LoRA: low-rank additions to the projections of attention, y += scale * (x @ aᵀ) @ bᵀ."""

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..devices import to_host
from ..ops.quant_gemm import quant_gemm
from ..quant import QMatrix
from ..quant.safetensors_file import Safetensors
from ..runtime import layer_workspace
from ..runtime.arrays import dtype_of
from ..runtime.checks import FLOATS, check_dtype, check_flag, check_number

PROJECTIONS = ("q", "k", "v", "o")
_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:self_attn|attention|attn)\.([qkvo])_proj"
                   r"\.lora_([AB])(?:\.\w+)?\.weight")
_ATTENTION = re.compile(r"(?:.*\.)?\w*att(?:n|ention)\.")
_DEFAULT = 8   # of PEFT's r and lora_alpha
_ONLY = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_qalora": False, "use_bdlora": None,
         "lora_bias": False, "fan_in_fan_out": False, "layer_replication": None, "alora_invocation_tokens": None,
         "arrow_config": None}   # what PEFT's config has to say of an adapter that is two matrices and nothing else
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")   # of the model, too, when training starts
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
        if None in given:
            raise ValueError("QAttn: adapters must have names other than None, which is a sequence without one in "
                             f"sequence_loras, got {list(given)}")
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

    def numbers(self, names, argument="loras"):
        """Numbers of adapters by name; ValueError for a name that is none."""
        for name in names:
            if name not in self.names:
                raise ValueError(f"QAttn: {argument} must be among {', '.join(map(repr, self.names)) or 'none'}, got "
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
            numbers = np.array([-1 if name is None else self.numbers([name], "sequence_loras")[0]
                                for name in names])
            order = np.argsort(numbers, kind="stable")
            ends = np.searchsorted(numbers[order], np.arange(len(self.names) + 1)) * q_len
            to = self.xp.asarray
            rows = (order[:, None] * q_len + np.arange(q_len)).ravel()
            in_order = (order == np.arange(batch_size)).all()
            found = Group(None if in_order else to(rows.astype(np.int32)), to(np.argsort(rows).astype(np.int32)),
                          to(ends.astype(np.int32)))
            for oldest in list(self._groups)[:-63]:   # a copy: other threads add to it
                self._groups.pop(oldest, None)
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
        if not isinstance(lora, LoRA):
            raise TypeError(f"QAttn: {where} must be a LoRA of two arrays, got {type(lora).__name__}")
        out_features, in_features = sizes[p]
        check_dtype("QAttn", f"{where}.a", lora.a, FLOATS)
        check_dtype("QAttn", f"{where}.b", lora.b, FLOATS)
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


def load_lora(path, *, scaling=1.0, skip_others=False):
    """The adapter in a folder that PEFT wrote.

    Parameters
    ----------
    path : str or Path
        Folder with adapter_config.json and adapter_model.safetensors.
    scaling : float
        Multiplies the adapter's own alpha / rank (rsLoRA: alpha / sqrt(rank)).
    skip_others : bool
        Leave out weights of modules that are not of attention: MLP, embedding, head. What is left is not what was
        trained. Default: such an adapter is refused.

    Returns
    -------
    dict of int to dict
        For each layer it has, `LoRA` by projection: ``layer.set_loras({"name": load_lora(path).get(n, {})})``.

    Raises
    ------
    TypeError, ValueError
        Files that are damaged or do not belong together, half of a pair of matrices, shapes that do not fit the rank,
        two adapters for one projection.
    NotImplementedError
        Another method than LoRA, or one that needs more than two matrices for each module: DoRA, biases,
        `layer_replication`, initialisations that change the model's own weights. Other weights of attention than those
        of q_proj, k_proj, v_proj and o_proj; weights of other modules without `skip_others`.
    OSError
        A file cannot be read.

    Notes
    -----
    `rank_pattern`, `alpha_pattern`, `use_rslora` and PEFT's defaults (r and lora_alpha of 8) are followed. Arrays are
    over the mapped file.
    """
    check_number("load_lora", "scaling", scaling)
    check_flag("load_lora", "skip_others", skip_others)
    path = Path(path)
    config = _config(path / "adapter_config.json")
    tensors, found = Safetensors(path / "adapter_model.safetensors"), {}
    for (layer, projection), halves in sorted(_pairs(path, tensors, skip_others).items()):
        if len(halves) != 2:
            (half, name), = halves.items()
            raise ValueError(f"load_lora: {path} must have lora_{'B' if half == 'A' else 'A'} beside {name}, got none")
        a, b = tensors[halves["A"]], tensors[halves["B"]]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise ValueError(f"load_lora: {halves['A']} must be [rank, in] and {halves['B']} [out, rank], got "
                             f"{list(a.shape)} and {list(b.shape)}")
        module = _module(halves["A"])
        rank = _pattern(config, "rank_pattern", module, config.get("r", _DEFAULT))
        if rank != a.shape[0]:
            raise ValueError(f"load_lora: {halves['A']} must have the rank {rank} of adapter_config.json, got "
                             f"{a.shape[0]}")
        alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", _DEFAULT))
        check_number("load_lora", "lora_alpha of adapter_config.json", alpha)
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found.setdefault(layer, {})[projection] = LoRA(a, b, scaling * factor)
    return found


def _config(file):
    """adapter_config.json, of an adapter that is its two matrices for each module and nothing else."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:   # JSON or UTF-8
        raise ValueError(f"load_lora: {file} must be JSON, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"load_lora: {file} must hold an object, got {type(config).__name__}")
    for name, wanted in _ONLY.items():
        value = config.get(name)
        if value != wanted and value not in (None, False, [], {}):
            raise NotImplementedError(f"load_lora: {name} of {file} must be {wanted!r}, got {value!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
        raise NotImplementedError(f"load_lora: init_lora_weights of {file} must leave the model's own weights as they "
                                  f"are, got {start!r}; PEFT converts such an adapter when it saves it")
    return config


def _pairs(path, tensors, skip_others):
    """Names of the two matrices, "A" and "B", by (layer, projection)."""
    pairs, others = {}, []
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is not None:
            layer, projection, half = match.groups()
            first = pairs.setdefault((int(layer), projection), {}).setdefault(half, name)
            if first != name:
                raise ValueError(f"load_lora: {path} must have one adapter for {projection}_proj of layer {layer}, got "
                                 f"{first} and {name}")
        elif _ATTENTION.match(name):
            raise NotImplementedError(f"load_lora: tensors of attention in {path} must be lora_A and lora_B of q_proj, "
                                      f"k_proj, v_proj and o_proj, got {name}")
        else:
            others.append(name)
    if others and not skip_others:
        kinds = sorted({re.sub(r".*\blayers\.\d+\.", "", _module(name)) for name in others})
        raise NotImplementedError(f"load_lora: skip_others must be True for {path}, to leave out what is not of "
                                  f"attention, got False for {', '.join(kinds[:8])}{', ...' * (len(kinds) > 8)}")
    return pairs


def _module(name):
    """Name of the module a tensor belongs to, as the config has it."""
    return re.sub(r"\.(?:lora_|weight$|bias$).*", "", name.removeprefix("base_model.model."))


def _pattern(config, name, module, default):
    """The value of the first pattern that is the module's name or the end of it, as PEFT has it."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"load_lora: {name} of adapter_config.json must hold an object, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        except re.error as error:
            raise ValueError(f"load_lora: {name} of adapter_config.json must hold regular expressions, got {pattern!r} "
                             f"({error})") from None
    return default
