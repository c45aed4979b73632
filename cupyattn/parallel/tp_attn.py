# SPDX-License-Identifier: Apache-2.0
"""TPAttn: an attention layer whose heads are spread over ranks."""

import numpy as np

from ..caches import PagedCache
from ..kv.quantized import QuantizedKV
from ..q_attn.attend import Options
from ..q_attn.layer import QAttn
from ..q_attn.lora import names_of
from ..q_attn.norms import add_normed
from ..q_attn.weights import vector
from ..runtime import layer_workspace
from ..runtime.arrays import as_rows
from ..runtime.checks import check_apart, check_number, check_shape, check_writeable
from .rank_lists import array_module, check_alike, check_list, check_place, each_rank
from .tensor_parallel import TPContext
from .tp_rank import copy

# what all ranks' shards have in common
_ALIKE = ("has_residual", "has_post_norm", "dtype", "x_dtype", "norm_epsilon", "layernorm_is_rms", "headnorm_is_rms",
          "rope_style", "rotary_dim", "max_rows", "max_seq_len")


class TPShard:
    """What one rank has of a layer: the `QAttn` of its heads, whose result is a part of a sum, and the post-norm.

    Made by ``TPAttn.from_layer``. ``TPAttn.forward`` is a step.

    Parameters
    ----------
    rank : int
    attn : QAttn
        Of the rank's heads, without a post-norm. That of rank 0 alone has the bias of the output projection, and the
        residual unless a post-norm comes between.
    has_residual : bool
        The layer adds to x (default) or replaces it.
    post_layernorm, post_layernorm_bias : ndarray [hidden_size], optional
        Norm between the sum and the residual, of the kind that `attn` has in front.
    """

    def __init__(self, rank, attn, *, has_residual=True, post_layernorm=None, post_layernorm_bias=None):
        if not isinstance(attn, QAttn):
            raise TypeError(f"TPShard: attn must be a QAttn, got {type(attn).__name__}")
        check_number("TPShard", "rank", rank, least=0, integer=True)
        if attn.post_layernorm is not None or attn.has_residual != (rank == 0 and has_residual and
                                                                    post_layernorm is None):
            raise ValueError("TPShard: attn must have no post-norm, and the residual on rank 0 alone and there only "
                             f"without a post-norm, got {attn!r} for rank {rank}")
        if post_layernorm_bias is not None and (post_layernorm is None or attn.layernorm_is_rms):
            raise ValueError("TPAttn: post_layernorm_bias must come with a post_layernorm that is a layer norm "
                             "(layernorm_is_rms=False), got it without")
        self.rank, self.attn, self.has_residual = int(rank), attn, bool(has_residual)
        codes, width = attn.o_proj.segments[0].codes, ((attn.hidden_size,),)
        self.device = "cpu" if isinstance(codes, np.ndarray) else codes.device.id
        self.post_layernorm = vector("post_layernorm", post_layernorm, width, attn.xp)
        self.post_layernorm_bias = vector("post_layernorm_bias", post_layernorm_bias, width, attn.xp)

    @property
    def has_post_norm(self):
        return self.post_layernorm is not None

    @classmethod
    def of_layer(cls, context, rank, layer):
        """The shard of a rank from the arguments of `QAttn` for the whole layer, a dict."""
        layer = {name: value for name, value in layer.items() if name not in ("temp_state", "temp_dq")}
        whole = {"num_heads": context.num_heads, "num_kv_heads": context.num_kv_heads, "head_dim": context.head_dim,
                 "hidden_size": context.hidden_size}
        missing = [name for name in ("q_q_proj", "q_k_proj", "q_v_proj", "q_o_proj") if layer.get(name) is None]
        if missing:
            raise TypeError(f"TPAttn: {missing[0]} must be a QMatrix or an array, got none")
        for name, value in whole.items():
            if layer.setdefault(name, value) != value:
                raise ValueError(f"TPAttn: {name} must be {value} like the context's, got {layer[name]}")
        for name, kind in (("q", "q"), ("k", "kv"), ("v", "kv")):
            part = f"q_{name}_proj"
            layer[part] = context.shard_rows(layer[part], rank, kind, name=part)
            part = f"{name}_bias"
            layer[part] = context.shard_heads(layer.get(part), rank, kind, name=part)
            part = f"{name}_norm"
            if getattr(layer.get(part), "ndim", 0) == 2:   # else one for all heads
                layer[part] = context.shard_heads(layer[part], rank, kind, name=part)
        layer["q_o_proj"] = context.shard_columns(layer["q_o_proj"], rank, name="q_o_proj")
        if rank > 0:
            layer["o_bias"] = None
        post = {name: layer.pop(name, None) for name in ("post_layernorm", "post_layernorm_bias")}
        residual = layer.pop("has_residual", True)
        attn = QAttn(**layer | {"num_heads": context.q_heads[rank], "num_kv_heads": context.kv_heads[rank]},
                     has_residual=rank == 0 and residual and post["post_layernorm"] is None)
        return cls(rank, attn, has_residual=residual, **post)

    def room(self, x):
        """Where this rank's part of the sum goes: float32 of the shape of x, in scratch that all layers share."""
        room = layer_workspace(self.attn.xp, 4 * x.size, f"sum of rank {self.rank}")
        return room[:4 * x.size].view(np.float32).reshape(x.shape)

    def finish(self, x, total):
        """x from the sum of all parts."""
        if self.post_layernorm is None:
            copy(x, total)
            return
        room = None
        if self.has_residual:
            room = layer_workspace(self.attn.xp, x.nbytes, "normed")[:x.nbytes].view(x.dtype).reshape(x.shape)
        add_normed(total, x, room, self.post_layernorm, self.post_layernorm_bias, self.attn.layernorm_is_rms,
                   self.attn.norm_epsilon)

    def __repr__(self):
        return f"TPShard(rank {self.rank}, {self.attn!r})"


class TPAttn:
    """`QAttn` whose heads are spread over the ranks of a TPContext.

    Every rank has x, the projections of its heads, and their keys and values. The output projection is cut along its
    columns: a step is `QAttn`'s up to there, one `Communicator.all_reduce` of float32 [tokens, hidden_size], and the
    post-norm. x is the same on all ranks, before and after.

    Parameters
    ----------
    shards : list of TPShard
        One for each rank of this process; see `from_layer`.
    context : TPContext

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, o = (rng.standard_normal((n, 32)).astype(np.float32) / 8 for n in (32, 16, 16, 32))
    >>> context = cupyattn.TPContext(cupyattn.InProcessCommunicator(2), num_heads=4, num_kv_heads=2, head_dim=8,
    ...                              hidden_size=32)
    >>> layer = cupyattn.TPAttn.from_layer(context, layernorm=np.ones(32, np.float32), q_q_proj=q, q_k_proj=k,
    ...                                    q_v_proj=v, q_o_proj=o, dtype="float32", rope_style="none")
    >>> caches = [cupyattn.PagedCache.contiguous(1, 2, 16, heads, 8, dtype="float32") for heads in context.kv_heads]
    >>> x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    >>> out = layer.forward([x, x.copy()], cupyattn.Params(batch_size=2, seq_len=3, past_len=0), caches)
    >>> bool((out[0] == out[1]).all())
    True
    """

    def __init__(self, shards, context):
        if not isinstance(context, TPContext):
            raise TypeError(f"TPAttn: context must be a TPContext, got {type(context).__name__}")
        communicator = context.communicator
        check_list("TPAttn", "shards", shards, communicator.ranks)
        self.shards, self.context = list(shards), context
        for shard, rank, device in zip(self.shards, communicator.ranks, communicator.devices, strict=True):
            if not isinstance(shard, TPShard):
                raise TypeError(f"TPAttn: shards must be TPShard objects, got {type(shard).__name__}")
            attn = shard.attn
            found = shard.rank, attn.num_heads, attn.num_kv_heads, attn.head_dim, attn.hidden_size
            wanted = (rank, context.q_heads[rank], context.kv_heads[rank], context.head_dim, context.hidden_size)
            if found != wanted:
                raise ValueError(f"TPAttn: shards must have (rank, heads, KV heads, head_dim, hidden_size) = {wanted}, "
                                 f"got {found}")
            for name in _ALIKE:
                mine, theirs = (getattr(s, name, getattr(s.attn, name, None)) for s in (self.shards[0], shard))
                if mine != theirs:
                    raise ValueError(f"TPAttn: shards must be alike in {name}, got {mine} and {theirs}")
            if shard.device != device:
                raise ValueError(f"TPAttn: shards must be where their ranks are, {device!r} for rank {rank}, got "
                                 f"{shard.device!r}")

    @classmethod
    def from_layer(cls, context, **layer):
        """From a whole layer; each rank keeps its part.

        Parameters
        ----------
        context : TPContext
        **layer
            Arguments of `QAttn`. Heads and sizes may be left out; `temp_state` and `temp_dq` are not looked at. With
            ranks on several GPUs of this process the weights are in host memory.
        """
        if not isinstance(context, TPContext):
            raise TypeError(f"TPAttn: context must be a TPContext, got {type(context).__name__}")
        communicator = context.communicator
        return cls([TPShard.of_layer(context, rank, {"xp": array_module(communicator.devices[n])} | layer)
                    for n, rank in each_rank(communicator, communicator.ranks)], context)

    def set_loras(self, adapters):
        """The adapters that calls can name, in place of those of an earlier call; see `QAttn.set_loras`.

        They are this layer's alone: a model calls it for each of its layers, with an empty dict where an adapter has no
        weights for one. Every process calls it, with the same adapters. Threads that share a layer name different ones
        in their calls; none may be in a call meanwhile.

        Parameters
        ----------
        adapters : dict of name to (dict of "q", "k", "v" or "o" to LoRA)
            Of the whole layer; each rank keeps its part.

        Returns
        -------
        int
            The largest rank of an adapter, 0 for none.
        """
        communicator = self.context.communicator
        parts = [self.context.shard_loras(adapters, rank) for rank in communicator.ranks]
        return max(shard.attn.set_loras(parts[n]) for n, shard in each_rank(communicator, self.shards))

    def forward(self, x, params, caches=None, layer=0, *, sin=None, cos=None, softmax_scale=None, window_size=0,
                softcap=0.0, sinks=None, invariant=False, schedules=None, loras=(), sequence_loras=None):
        """One step of the layer: x is changed in place, new keys and values go into the caches.

        Parameters
        ----------
        x : list of ndarray
            For each rank of this process, the same numbers in memory of its own; see `QAttn.forward`.
        params : Params or PagedParams
            One for all ranks.
        caches : list of PagedCache, optional
            For each rank its own, with its KV heads, ``context.kv_heads[rank]``, and the same pages. Or lists of
            caches of one sequence each.
        layer : int
        sin, cos : ndarray, or list of one for each rank
            See `QAttn.forward`.
        softmax_scale, window_size, softcap, invariant
            See `QAttn.forward`.
        sinks : ndarray [num_heads], or list of one for each rank, optional
            Of all heads.
        schedules : list of Schedule, optional
            For each rank, made for its heads: of `schedules`.
        loras, sequence_loras
            See `QAttn.forward`.

        Returns
        -------
        x : list of ndarray

        Raises
        ------
        TypeError, ValueError
            As `QAttn.forward`, and for lists that do not fit the ranks, or memory that two of them would write. Nothing
            was changed then, on the ranks of this process.
        NotImplementedError
            An `input_mask` of its own for each head.
        """
        communicator, ranks = self.context.communicator, self.context.communicator.ranks
        none, names = [None] * len(ranks), names_of(loras, sequence_loras)
        self._check_lists(x, caches, schedules)
        mask = getattr(params, "input_mask", None)
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 and communicator.size > 1:
            raise NotImplementedError("TPAttn: params must have an input_mask that is the same for all heads, got one "
                                      f"of {mask.shape[1]}")
        sin, cos, sinks = (self._for_each(*named) for named in (("sin", sin), ("cos", cos), ("sinks", sinks)))
        caches, schedules = caches or none, schedules or none
        parts, steps = [], []
        for n, shard in each_rank(communicator, self.shards):   # all are checked before one begins
            options = Options(softmax_scale, window_size, softcap, self.context.shard_heads(sinks[n], ranks[n], "q"),
                              invariant)
            parts.append(shard.room(x[n]))
            steps.append(shard.attn.checked(x[n], params, caches[n], layer, sin[n], cos[n], options, schedules[n],
                                            *names, parts[n]))
        check_apart("TPAttn", [*((f"x[{n}]", array) for n, array in enumerate(x)), *_pools(caches, layer)])

        for n, shard in each_rank(communicator, self.shards):
            if shard.attn.has_residual:   # of rank 0 alone
                copy(parts[n], x[n])
            steps[n]()
        communicator.all_reduce(parts)
        for n, shard in each_rank(communicator, self.shards):
            shard.finish(x[n], parts[n])
        return x

    def schedules(self, params, caches, *, window_size=0, invariant=False, out=None):
        """`QAttn.schedule` of every rank of this process: who attends what, for ``forward(schedules=)``.

        Parameters
        ----------
        params : Params or PagedParams
        caches : list of PagedCache
        window_size, invariant
            See `QAttn.schedule`.
        out : list of Schedule, optional
            From an earlier call: filled again, in place.

        Returns
        -------
        list of Schedule
        """
        communicator = self.context.communicator
        for name, given in (("caches", caches), ("out", out)):
            if given is not None or name == "caches":
                check_list("TPAttn", name, given, communicator.ranks)
        return [shard.attn.schedule(params, caches[n], window_size=window_size, invariant=invariant,
                                    out=None if out is None else out[n])
                for n, shard in each_rank(communicator, self.shards)]

    # ---- checks that `QAttn.checked` has not ---------------------------------------------------------------

    def _check_lists(self, x, caches, schedules):
        """One for each rank, on its device; x of one shape and to be written, caches of the rank's heads."""
        communicator = self.context.communicator
        check_list("TPAttn", "x", x, communicator.ranks)
        check_alike("TPAttn", "x", x, communicator.devices)
        for array in x:
            check_writeable("TPAttn", "x", array)
            as_rows("TPAttn", "x", array)
        if schedules is not None:
            check_list("TPAttn", "schedules", schedules, communicator.ranks)
        if caches is None:
            return
        check_list("TPAttn", "caches", caches, communicator.ranks)
        for mine, rank, device in zip(caches, communicator.ranks, communicator.devices, strict=True):
            for cache in mine if isinstance(mine, list | tuple) else [mine]:
                if not isinstance(cache, PagedCache):
                    raise TypeError(f"TPAttn: caches must be PagedCache objects, got {type(cache).__name__}")
                if cache.num_kv_heads != self.context.kv_heads[rank]:
                    raise ValueError(f"TPAttn: caches must have {self.context.kv_heads[rank]} heads for rank {rank}, "
                                     f"got {cache.num_kv_heads}")
                for _, array in _arrays(cache, 0):
                    check_place("TPAttn", "caches", array, device)

    def _for_each(self, name, array):
        """What is read, of each rank: one array for all, or a list."""
        communicator = self.context.communicator
        if not isinstance(array, list | tuple):
            array = [array] * len(communicator.ranks)
        check_list("TPAttn", name, array, communicator.ranks)
        for one, device in zip(array, communicator.devices, strict=True):
            if one is not None and not (name != "sinks" and isinstance(one, np.ndarray)):   # tables are copied
                check_place("TPAttn", name, one, device)
            if one is not None and name == "sinks":
                check_shape("TPAttn", name, one, (self.context.num_heads,), "[num_heads]")
        return array

    def close(self):
        """Let go of all weights; calls are refused from then on."""
        for shard in self.shards:
            shard.attn.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        return f"TPAttn({self.context!r}, {', '.join(map(repr, self.shards))})"


def _pools(caches, layer):
    """(name, array) of all that a layer's keys and values are, on every rank."""
    for n, mine in enumerate(caches):
        for cache in mine if isinstance(mine, list | tuple) else [] if mine is None else [mine]:
            for name, array in _arrays(cache, layer):
                yield f"caches[{n}]'s {name}", array


def _arrays(cache, layer):
    for name, pool in (("keys", cache.k[layer]), ("values", cache.v[layer])):
        if isinstance(pool, QuantizedKV):
            yield from ((f"{part} of {name}", array) for part, array in pool.arrays.items())
        else:
            yield name, pool
