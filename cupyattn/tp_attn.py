# SPDX-License-Identifier: Apache-2.0
"""TPAttn: an attention layer whose heads are spread over ranks."""

import contextlib

import numpy as np

from .ops.rms_norm import rms_norm
from .q_attn import QAttn
from .q_attn_weights import vector
from .runtime import layer_workspace
from .runtime.launch import run_library
from .tensor_parallel import TPContext


class TPShard(QAttn):
    """What one rank has of a layer: a `QAttn` of its heads whose output is a part of a sum.

    Made by ``TPAttn.from_layer``. `forward` leaves x as it is and the part in `partial`, float32; bias and residual are
    in that of rank 0. `finish` makes x of the sum of all.
    """

    def __init__(self, *, rank, has_residual=True, post_layernorm=None, post_layernorm_bias=None, **layer):
        super().__init__(has_residual=rank == 0 and has_residual and post_layernorm is None, **layer)
        self.rank, self.residual, self.partial, self._x = rank, bool(has_residual), None, None
        if post_layernorm_bias is not None and (post_layernorm is None or self.layernorm_is_rms):
            raise ValueError("TPAttn: post_layernorm_bias must come with a post_layernorm that is a layer norm "
                             "(layernorm_is_rms=False), got it without")
        width = ((self.hidden_size,),)
        self.post = vector("post_layernorm", post_layernorm, width, self.xp)
        self.post_bias = vector("post_layernorm_bias", post_layernorm_bias, width, self.xp)

    @classmethod
    def of_layer(cls, context, rank, layer):
        """The shard of a rank, from the arguments of `QAttn` for the whole layer."""
        layer = dict(layer)
        for name in ("temp_state", "temp_dq"):
            layer.pop(name, None)   # scratch of the whole layer
        whole = {"num_heads": context.num_heads, "num_kv_heads": context.num_kv_heads, "head_dim": context.head_dim,
                 "hidden_size": context.hidden_size}
        missing = [name for name in ("q_q_proj", "q_k_proj", "q_v_proj", "q_o_proj") if layer.get(name) is None]
        if missing:
            raise TypeError(f"TPAttn: {missing[0]} must be a QMatrix or an array, got none")
        for name, value in whole.items():
            if layer.setdefault(name, value) != value:
                raise ValueError(f"TPAttn: {name} must be {value} like the context's, got {layer[name]}")
        for name, kind in (("q", "q"), ("k", "kv"), ("v", "kv")):
            layer[f"q_{name}_proj"] = context.shard_rows(layer[f"q_{name}_proj"], rank, kind)
            layer[f"{name}_bias"] = context.shard_heads(layer.get(f"{name}_bias"), rank, kind)
            norm = layer.get(f"{name}_norm")
            if norm is not None and norm.ndim == 2:
                layer[f"{name}_norm"] = context.shard_heads(norm, rank, kind)
        layer["q_o_proj"] = context.shard_columns(layer["q_o_proj"], rank)
        if rank > 0:
            layer["o_bias"] = None
        layer |= {"num_heads": context.q_heads[rank], "num_kv_heads": context.kv_heads[rank]}
        return cls(rank=rank, **layer)

    def _output(self, mixed, rows, buffers, added):
        """In place of QAttn's: this rank's part of what is added to `rows` of x."""
        # a block of its own for each rank of this process, shared by all layers
        room = layer_workspace(self.xp, 4 * rows.size, f"sum of rank {self.rank}")
        self.partial = room[:4 * rows.size].view(np.float32).reshape(rows.shape)
        if self.has_residual:
            copy(self.partial, rows)
        super()._output(mixed, self.partial, buffers, added)
        self._x = rows

    def finish(self):
        """x from the sum of all parts, which `partial` has become."""
        (x, self._x), (partial, self.partial) = (self._x, None), (self.partial, None)
        if self.post is None:
            copy(x, partial)
            return
        out = x
        if self.residual:
            out = layer_workspace(self.xp, x.nbytes, "normed")[:x.nbytes].view(x.dtype).reshape(x.shape)
        self._norm(partial, self.post, self.post_bias, out)
        if self.residual:   # the sum is what is wanted of this norm; its result is nobody's
            rms_norm(out, self.post, eps=self.norm_epsilon, residual=x, out=out)


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
        self.shards, self.context = list(shards), context
        ranks = context.communicator.ranks
        if len(self.shards) != len(ranks) or not all(isinstance(shard, TPShard) for shard in self.shards):
            raise ValueError(f"TPAttn: shards must be a TPShard for each of the ranks {list(ranks)}, got "
                             f"{[type(shard).__name__ for shard in self.shards]}")
        for shard, rank in zip(self.shards, ranks, strict=True):
            found = (shard.rank, shard.num_heads, shard.num_kv_heads, shard.head_dim, shard.hidden_size)
            wanted = (rank, context.q_heads[rank], context.kv_heads[rank], context.head_dim, context.hidden_size)
            if found != wanted:
                raise ValueError(f"TPAttn: shards must have (rank, heads, KV heads, head_dim, hidden_size) = {wanted}, "
                                 f"got {found}")

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
        communicator = context.communicator
        return cls([TPShard.of_layer(context, rank, {"xp": array_module(communicator.devices[n])} | layer)
                    for n, rank in each_rank(communicator, communicator.ranks)], context)

    def set_loras(self, adapters):
        """The adapters that calls can name; see `QAttn.set_loras`.

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
        return max(shard.set_loras(self.context.shard_loras(adapters, communicator.ranks[n]))
                   for n, shard in each_rank(communicator, self.shards))

    def forward(self, x, params, caches=None, layer=0, *, sin=None, cos=None, sinks=None, schedules=None, **options):
        """One step of the layer: x is changed in place, new keys and values go into the caches.

        Parameters
        ----------
        x : list of ndarray
            For each rank of this process, the same numbers; see `QAttn.forward`.
        params : Params or PagedParams
            One for all ranks.
        caches : list of PagedCache, optional
            For each rank, with its KV heads, ``context.kv_heads[rank]``; the same pages.
        layer : int
        sin, cos : ndarray, or list of one for each rank
            See `QAttn.forward`.
        sinks : ndarray [num_heads], or list of one for each rank, optional
            Of all heads.
        schedules : list of Schedule, optional
            For each rank.
        **options
            ``softmax_scale``, ``window_size``, ``softcap``, ``invariant``, ``loras`` and ``sequence_loras`` of
            `QAttn.forward`.

        Returns
        -------
        x : list of ndarray
        """
        communicator, ranks = self.context.communicator, self.context.communicator.ranks
        lists = {"x": x, "caches": caches, "sin": sin, "cos": cos, "sinks": sinks, "schedules": schedules}
        for name, value in lists.items():
            if not isinstance(value, list | tuple) and (value is None or name in ("sin", "cos", "sinks")):
                lists[name] = [value] * len(ranks)
            elif not isinstance(value, list | tuple) or len(value) != len(ranks):
                raise ValueError(f"TPAttn: {name} must be a list of one for each of the ranks {list(ranks)}, got "
                                 f"{len(value) if isinstance(value, list | tuple) else type(value).__name__}")
        for n, shard in each_rank(communicator, self.shards):
            sinks = self.context.shard_heads(lists["sinks"][n], ranks[n], "q")
            shard.forward(lists["x"][n], params, lists["caches"][n], layer, sin=lists["sin"][n], cos=lists["cos"][n],
                          sinks=sinks, schedule=lists["schedules"][n], **options)
        communicator.all_reduce([shard.partial for shard in self.shards])
        for _, shard in each_rank(communicator, self.shards):
            shard.finish()
        return x

    def close(self):
        """Let go of all weights; calls are refused from then on."""
        for shard in self.shards:
            shard.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        return f"TPAttn({self.context!r}, {', '.join(map(repr, self.shards))})"


def array_module(device):
    """numpy for "cpu", else cupy."""
    if device == "cpu":
        return np
    import cupy

    return cupy


def copy(target, source):
    """``target[...] = source``, arrays of one kind; in a captured step with every replay."""
    run_library("copy", "cpu" if isinstance(target, np.ndarray) else "gpu", lambda: target.__setitem__(..., source))


def each_rank(communicator, values):
    """(n, value) of each rank of this process, with its GPU as the current one."""
    for n, (device, value) in enumerate(zip(communicator.devices, values, strict=True)):
        with contextlib.nullcontext() if device == "cpu" else array_module(device).cuda.Device(device):
            yield n, value
