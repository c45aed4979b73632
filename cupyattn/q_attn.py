# SPDX-License-Identifier: Apache-2.0
"""QAttn: the attention part of a decoder layer, from norm to residual, with ExLlamaV2's arguments."""

import numpy as np

from .attention_args import check_options
from .errors import CaptureError
from .lora import Adapters
from .ops.attention import attention
from .ops.embedding import embedding
from .ops.kv_append import kv_append
from .ops.layer_norm import layer_norm
from .ops.paged_decode import MAX_Q_LEN, paged_decode
from .ops.quant_gemm import quant_gemm
from .ops.rms_norm import rms_norm
from .ops.schedule import Schedule
from .params import Params
from .q_attn_buffers import Workspace, buffers_of_rows, head_rows, row_numbers, token_rows
from .q_attn_step import block_borders, steps_of
from .q_attn_weights import check_scratch, joined, kind_of, matrix, rope_style, tables, vector
from .runtime.arrays import dtype_of
from .runtime.capturing import tape
from .runtime.checks import FLOATS, check_array, check_flag, check_number
from .runtime.structs import address


class QAttn:
    """The attention part of a decoder layer over packed weights.

    x += post_norm(attention(rope(head_norm(norm(x) @ Wqᵀ + q_bias)), ...) @ Woᵀ + o_bias)

    `forward` is the whole step. `forward_1` and `forward_2` are ExLlamaV2's halves, between which the caller attends.

    Parameters
    ----------
    q_q_proj, q_k_proj, q_v_proj : QMatrix or ndarray [num_heads or num_kv_heads * head_dim, hidden_size]
        Projections of any format, or plain float16, bfloat16 or float32. Those of one format and one order of columns
        become one matrix and run as one launch.
    q_o_proj : QMatrix or ndarray [hidden_size, num_heads * head_dim]
    hidden_size, num_heads, num_kv_heads, head_dim : int
    layernorm : ndarray [hidden_size], optional
        Gain of the norm in front. None: there is no norm.
    layernorm_bias : ndarray [hidden_size], optional
        Only of a layer norm.
    layernorm_is_rms : bool
        RMS norm (default) or layer norm; of `post_layernorm`, too.
    norm_epsilon : float
        Of all norms, those of heads included, also where there is no norm in front.
    temp_state, temp_dq : ndarray, optional
        ExLlamaV2's scratch. Not used: all layers share one workspace per device and stream. Too small ones for
        `max_rows` are refused.
    max_rows : int, optional
        Most tokens of a call. Default: any number.
    max_seq_len : int, optional
        Most tokens of a sequence, new ones included. Default: what cache and RoPE tables hold.
    has_residual : bool
        Add to x (default) or replace it.
    rope_style : int or str
        0 or "none", 1 or "gptj" (pairs of neighbours), 2 or "neox" (pairs of halves, the default).
    sincos_size : int, optional
        Rotated dims of a head, the first ones. Default head_dim.
    q_norm, k_norm : ndarray [head_dim] or [heads, head_dim], optional
        Gains of a norm over every head, before RoPE.
    post_layernorm, post_layernorm_bias : ndarray [hidden_size], optional
        Norm between output projection and residual.
    residual_fp32 : bool
        x is float32.
    use_graphs : bool
        Accepted; whole steps are captured by the caller.
    headnorm_is_rms : bool
        RMS norm (default) or layer norm of the heads.
    q_bias, k_bias, v_bias, o_bias : ndarray [rows of the projection], optional
    dtype : str
        "float16" (default), "bfloat16" or "float32": of x without `residual_fp32`, and of everything between.
    xp : numpy or cupy, optional
        Where the weights go. Default: where `q_q_proj` is.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong kind, shapes that do not fit each other; everything that calls do not change is checked
        here.

    Notes
    -----
    Where ExLlamaV2 differs: its LoRA of the output projection comes after the post-norm, here before it; its float32
    residual needs a post-norm, here it does not; its post-norm adds to x also without `has_residual`; it checks neither
    head counts nor scratch nor tables, whose end it reads past. Weights are [out_features, in_features].

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, o = (rng.standard_normal((n, 32)).astype(np.float32) / 8 for n in (32, 16, 16, 32))
    >>> layer = cupyattn.QAttn(layernorm=np.ones(32, np.float32), q_q_proj=q, q_k_proj=k, q_v_proj=v, q_o_proj=o,
    ...                        hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    >>> cache = cupyattn.PagedCache.contiguous(1, 2, 16, 2, 8, dtype="float32")
    >>> cos, sin = cupyattn.RopeParams(rotary_dim=8).tables(16)
    >>> x = rng.standard_normal((2, 3, 32)).astype(np.float32)
    >>> layer.forward(x, cupyattn.Params(batch_size=2, seq_len=3, past_len=0), cache, 0, sin=sin, cos=cos) is x
    True
    """

    def __init__(self, *, q_q_proj, q_k_proj, q_v_proj, q_o_proj, hidden_size, num_heads, num_kv_heads, head_dim,
                 layernorm=None, layernorm_bias=None, layernorm_is_rms=True, norm_epsilon=1e-6, temp_state=None,
                 temp_dq=None, max_rows=None, max_seq_len=None, has_residual=True, rope_style=2,
                 sincos_size=None, q_norm=None, k_norm=None, post_layernorm=None, post_layernorm_bias=None,
                 residual_fp32=False, use_graphs=False, headnorm_is_rms=True, q_bias=None, k_bias=None, v_bias=None,
                 o_bias=None, dtype="float16", xp=None):
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads),
                           ("head_dim", head_dim), ("max_rows", max_rows), ("max_seq_len", max_seq_len),
                           ("sincos_size", sincos_size)):
            if size is not None:
                check_number("QAttn", name, size, least=1, integer=True)
        check_number("QAttn", "norm_epsilon", norm_epsilon, least=0)
        if head_dim % 8 or head_dim > 256:
            raise ValueError(f"QAttn: head_dim must be a multiple of 8 up to 256, got {head_dim}")
        if num_heads % num_kv_heads:
            raise ValueError(f"QAttn: num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        self.hidden_size, self.num_heads, self.num_kv_heads = int(hidden_size), int(num_heads), int(num_kv_heads)
        self.head_dim, self.max_rows, self.max_seq_len = int(head_dim), max_rows, max_seq_len
        self.norm_epsilon, self.has_residual, self.residual_fp32 = norm_epsilon, bool(has_residual), bool(residual_fp32)
        self.layernorm_is_rms, self.headnorm_is_rms = bool(layernorm_is_rms), bool(headnorm_is_rms)
        self.use_graphs = bool(use_graphs)
        self.xp = xp = kind_of(q_q_proj, xp)
        self._set_dtype(dtype)
        self._set_rope(rope_style, sincos_size)
        self._set_norms(layernorm, layernorm_bias, post_layernorm, post_layernorm_bias, q_norm, k_norm)
        self._set_projections(q_q_proj, q_k_proj, q_v_proj, q_o_proj, q_bias, k_bias, v_bias, o_bias)
        if max_rows is not None:
            check_scratch("temp_state", temp_state, max_rows * max(self.q_size, self.hidden_size))
        check_scratch("temp_dq", temp_dq, min(max(self.q_size, self.kv_size) * self.hidden_size, 512 << 20))
        self.loras, self._gain = None, None
        self.set_loras({})

    # ---- construction ----------------------------------------------------------------------------------

    def _set_dtype(self, dtype):
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if name not in FLOATS:
            raise ValueError(f"QAttn: dtype must be {', '.join(FLOATS)}, got {name!r}")
        self.dtype = dtype_of(name)
        self._dtype_name = name
        self.x_dtype = np.dtype(np.float32) if self.residual_fp32 else self.dtype
        self._x_name = "float32" if self.residual_fp32 else name

    def _set_rope(self, style, sincos_size):
        self.rope_style = rope_style(style)
        self.rotary_dim = self.head_dim if sincos_size is None else int(sincos_size)
        if self.rope_style and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(f"QAttn: sincos_size must be even and at most head_dim {self.head_dim}, got "
                             f"{self.rotary_dim}")

    def _set_norms(self, layernorm, layernorm_bias, post_layernorm, post_layernorm_bias, q_norm, k_norm):
        width = ((self.hidden_size,),)
        for name, gain, bias in (("layernorm", layernorm, layernorm_bias),
                                 ("post_layernorm", post_layernorm, post_layernorm_bias)):
            if bias is not None and (gain is None or self.layernorm_is_rms):
                raise ValueError(f"QAttn: {name}_bias must come with a {name} that is a layer norm "
                                 "(layernorm_is_rms=False), got it without")
            setattr(self, name, vector(name, gain, width, self.xp))
            setattr(self, f"{name}_bias", vector(f"{name}_bias", bias, width, self.xp))
        self.q_norm = vector("q_norm", q_norm, ((self.head_dim,), (self.num_heads, self.head_dim)), self.xp)
        self.k_norm = vector("k_norm", k_norm, ((self.head_dim,), (self.num_kv_heads, self.head_dim)), self.xp)
        self._finish = {"norm_eps": self.norm_epsilon, "norm_is_rms": self.headnorm_is_rms}   # of new heads
        for name in ("q_norm", "k_norm"):
            if getattr(self, name) is not None:
                self._finish[name] = getattr(self, name)

    def _set_projections(self, q, k, v, o, q_bias, k_bias, v_bias, o_bias):
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}
        given = {"q": (q, q_bias), "k": (k, k_bias), "v": (v, v_bias)}
        matrices = [matrix(f"q_{n}_proj", given[n][0], (size, self.hidden_size),
                           f"[num_{'' if n == 'q' else 'kv_'}heads * head_dim, hidden_size]")
                    for n, size in sizes.items()]
        biases = [vector(f"{n}_bias", given[n][1], ((size,),), np) for n, size in sizes.items()]
        self.qkv = joined(matrices, biases, self.xp)
        self.o_proj = matrix("q_o_proj", o, (self.hidden_size, self.q_size),
                             "[hidden_size, num_heads * head_dim]").to(self.xp)
        self.o_bias = vector("o_bias", o_bias, ((self.hidden_size,),), self.xp)

    def set_loras(self, adapters):
        """The adapters that calls can name, in place of those of an earlier call.

        Parameters
        ----------
        adapters : dict of name to (dict of "q", "k", "v" or "o" to LoRA)
            A name without weights for this layer has an empty dict. `load_lora` reads them from a file.

        Returns
        -------
        int
            The largest rank of all projections and adapters, 0 for none.

        Raises
        ------
        TypeError, ValueError
            A matrix that is missing or does not fit its projection; nothing has changed then.
        """
        kv = self.kv_size, self.hidden_size
        sizes = {"q": (self.q_size, self.hidden_size), "k": kv, "v": kv, "o": (self.hidden_size, self.q_size)}
        self.loras = Adapters(dict(adapters), sizes, self._dtype_name, self.xp)
        if self.loras.max_rank and self._gain is None:
            self._gain = self.xp.asarray(np.ones(self.hidden_size, np.float32))
        self._lay_out()
        return self.loras.max_rank

    def _lay_out(self):
        self._workspace = Workspace(self, self.loras.max_rank > 0)

    # ---- the whole step --------------------------------------------------------------------------------

    def forward(self, x, params, cache=None, layer=0, *, sin=None, cos=None, softmax_scale=None, window_size=0,
                softcap=0.0, sinks=None, invariant=False, schedule=None, loras=(), sequence_loras=None):
        """One step of the layer: x is changed in place, new keys and values go into the cache.

        Parameters
        ----------
        x : ndarray [batch_size, seq_len, hidden_size] or [batch_size * seq_len, hidden_size]
            Of `dtype`, or float32 with `residual_fp32`.
        params : Params or PagedParams
            Lengths, offsets, masks and pages; made once per step and given to all layers, which keep in it what they
            make of it (a `Schedule` too). It does not change after its first use; only the contents of its arrays on
            the device may, where `schedule` is made of these.
        cache : PagedCache, optional
            With PagedParams, its pages; with Params, page b is sequence b (`PagedCache.contiguous`). A list of caches
            of one sequence each goes with a list as ``past_len``. None: nothing is cached, and new tokens see each
            other only.
        layer : int
            Of the cache, and of ``params.block_diag_layers``.
        sin, cos : ndarray [positions, sincos_size / 2], float32
            RoPE tables, ``RopeParams.tables(...)``, or of ExLlamaV2's form [1, 1, positions, sincos_size]; tables of
            another form or dtype than the first are copied when first seen. Not used where params has
            ``alt_rope_embed``. Default: none, with ``rope_style`` 0.
        softmax_scale : float, optional
            Default ``head_dim ** -0.5``.
        window_size : int
            Visible tokens, the query's own included; 0 for all.
        softcap : float
            0 is off.
        sinks : ndarray [num_heads], float32, optional
        invariant : bool
            Attention gives a sequence the same bits whatever the batch around it and however it is cut into steps;
            projections do so for up to 64 tokens.
        schedule : Schedule, optional
            For attention; needed while a CUDA graph is captured. Default: made from the lengths in `params`.
        loras : sequence, optional
            Names of adapters of `set_loras` for all sequences, in the order they are added.
        sequence_loras : sequence of length batch_size, optional
            The name of one more adapter, or None, for each sequence. Sequences of one adapter are multiplied together;
            least work is done where they stand side by side, in the order of `set_loras` and None first.

        Returns
        -------
        x : ndarray

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit, more tokens than cache, tables, `max_rows` or `max_seq_len` hold.

        Notes
        -----
        Five launches where q, k and v are one matrix: norm, projection, append (head norms, RoPE and the cache's
        format, also for the queries), attention, output projection, which adds to x. Asynchronous on the current CuPy
        stream. All arguments are checked before anything is written. Steps that repeat are captured:
        ``cupyattn.graphs``.
        """
        self._check_open()
        if not isinstance(params, Params):
            raise TypeError(f"QAttn: params must be Params or PagedParams, got {type(params).__name__}")
        check_number("QAttn", "layer", layer, integer=True)
        steps = steps_of(params, cache, self.xp)
        rows = self._rows("x", x, params.batch_size, steps[0].q_len, self.hidden_size, self._x_name)
        options = {"softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap, "sinks": sinks,
                   "invariant": invariant}
        turn = self._turn(params, sin, cos)
        caches = cache if isinstance(cache, list | tuple) else [cache] * len(steps)
        schedules = self._checked(params, steps, caches, layer, turn, options, schedule)   # before any array is written
        added = self._added(tuple(loras), None if sequence_loras is None else tuple(sequence_loras), params.batch_size,
                            steps[0].q_len)
        buffers = self._project(rows, added)
        for step, one, plan in zip(steps, caches, schedules, strict=True):
            part = buffers if len(steps) == 1 else buffers_of_rows(buffers, step.rows)
            self._attend(part, params, step, one, layer, turn, options, plan)
        self._output(buffers.mixed.reshape(buffers.tokens, -1), rows, buffers, added)
        return x

    def _checked(self, params, steps, caches, layer, turn, options, schedule):
        """The Schedule of each step, None where attention makes its own; options, caches and lengths are checked."""
        check_options("QAttn", True, options["softmax_scale"], options["window_size"], options["softcap"],
                      self.head_dim)
        check_flag("QAttn", "invariant", options["invariant"])
        if options["sinks"] is not None:
            check_array("QAttn", "sinks", options["sinks"], "float32", (self.num_heads,), "[num_heads]")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"QAttn: schedule must be a Schedule, got {type(schedule).__name__}")
        schedules = []
        for step, cache in zip(steps, caches, strict=True):
            if turn and step.last_position >= turn["cos"].shape[0]:
                raise ValueError(f"QAttn: sin and cos must have a row for position {step.last_position}, got "
                                 f"{turn['cos'].shape[0]} rows")
            if self.max_seq_len is not None and step.longest > self.max_seq_len:
                raise ValueError(f"QAttn: params must have at most max_seq_len {self.max_seq_len} tokens, got "
                                 f"{step.longest}")
            if step.mask is not None and step.mask.shape[1] not in (1, self.num_heads):
                raise ValueError(f"QAttn: params must have an input_mask of 1 or {self.num_heads} heads, got "
                                 f"{step.mask.shape[1]}")
            if cache is not None:
                self._check_cache(cache, layer)
            if turn and step.rope_rows is not None:
                self._refuse_capture("params must have no position_offsets and no rope_offsets while a step is "
                                     "captured, which would go on with their sums with the first lengths")
            made = schedule
            if params.block_diag_layers and block_borders(params, step, layer) is not None:
                made = None
            elif schedule is None and cache is not None and step.mask is None:
                self._refuse_capture("schedule must be given while a step is captured, got None; make it inside the "
                                     "step by cupyattn.schedule(lengths, out=...)")
                made = self._schedule(step, cache, window_size=options["window_size"], invariant=options["invariant"])
            schedules.append(made)
        return schedules

    def _check_cache(self, cache, layer):
        if (cache.num_kv_heads, cache.head_dim) != (self.num_kv_heads, self.head_dim):
            raise ValueError(f"QAttn: cache must have {self.num_kv_heads} heads of {self.head_dim}, got "
                             f"{cache.num_kv_heads} of {cache.head_dim}")
        _layer_of(cache, layer)

    def _turn(self, params, sin, cos):
        """Arguments of `kv_append` that turn heads: {} without RoPE."""
        if self.rope_style is None:
            return {}
        other = params.get_alt_rope_embed(None if self.xp is np else self.xp.cuda.runtime.getDevice())
        sin, cos = (sin, cos) if other is None else other
        cos, sin = tables(sin, cos, self.rope_style, self.rotary_dim, self.xp)
        return {"cos": cos, "sin": sin, "style": self.rope_style, "rotary_dim": self.rotary_dim}

    def _attend(self, buffers, params, step, cache, layer, turn, options, schedule):
        """Heads of one Step finished and appended, then attention; `buffers.mixed` holds the result."""
        q, q_len = buffers.mixed, step.q_len
        borders = block_borders(params, step, layer) if params.block_diag_layers else None
        turn = turn | {"rope_rows": step.rope_rows} if turn else turn
        if cache is None or borders is not None:
            if turn and step.rope_rows is None:
                turn["rope_base"] = 0   # nothing is cached: positions count from 0
            slots = row_numbers(self.xp, buffers.tokens)
            kv_append(buffers.k, buffers.v, buffers.k_out[:, None], buffers.v_out[:, None], slots=slots, q=buffers.q,
                      q_out=q, q_len=q_len, **turn, **self._finish)
            if cache is not None:
                kv_append(buffers.k_out, buffers.v_out, *_layer_of(cache, layer), block_table=step.table,
                          positions=step.before, q_len=q_len)
            cu_seqlens = step.cu_seqlens_q if borders is None else borders
            attention(q, buffers.k_out, buffers.v_out, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                      causal=step.causal and borders is None, mask=step.mask, max_q_len=buffers.tokens, out=q,
                      **options)
            return
        k_cache, v_cache = _layer_of(cache, layer)
        kv_append(buffers.k, buffers.v, k_cache, v_cache, block_table=step.table, positions=step.before, q_len=q_len,
                  q=buffers.q, q_out=q, **turn, **self._finish)
        if _decodes(step, options["invariant"]):
            q = q.reshape(step.batch, q_len, self.num_heads, self.head_dim)
            paged_decode(q, k_cache, v_cache, block_table=step.table, cache_seqlens=step.after, schedule=schedule,
                         out=q, **options)
        else:
            attention(q, k_cache, v_cache, cu_seqlens_q=step.cu_seqlens_q, cache_seqlens=step.after,
                      block_table=step.table, causal=step.causal, mask=step.mask, max_q_len=q_len, schedule=schedule,
                      out=q, **options)

    def _schedule(self, step, cache, window_size, invariant):
        """The Schedule of this layer's attention, which `step` keeps."""
        return step.schedule((self.num_heads, self.num_kv_heads, self.head_dim, self._dtype_name, cache.k_format,
                              window_size, invariant, _decodes(step, invariant)))

    # ---- ExLlamaV2's halves ----------------------------------------------------------------------------

    def forward_1(self, x, batch_size, q_len, past_len, past_lens=None, q=None, k=None, v=None, sin=None, cos=None,
                  loras=(), loras_temp=None, sequence_loras=None):
        """Norm, projections, head norms and RoPE: the finished queries, keys and values of new tokens.

        Parameters
        ----------
        x : ndarray [batch_size, q_len, hidden_size]
            See `forward`. Not changed.
        batch_size, q_len : int
        past_len : int
            Position of the first new token of each sequence; -1: it is ``max(past_lens[b], 0)``.
        past_lens : int32 array [batch_size], optional
            Added to `past_len` for each sequence; positions below 0 count as 0. Lengths on the device are not read on
            the host.
        q : ndarray [batch_size, q_len, num_heads, head_dim], `dtype`, optional
            Filled. Default: a new array. Any strides that make one row of heads per token.
        k, v : ndarray [batch_size, q_len, num_kv_heads, head_dim], `dtype`, optional
            Likewise; rows of a cache, for instance.
        sin, cos : ndarray
            See `forward`.
        loras, sequence_loras
            See `forward`.
        loras_temp : ndarray, optional
            Scratch of ExLlamaV2, of tokens * rank elements; not used, refused if too small.

        Returns
        -------
        (q, k, v)
        """
        tokens = self._tokens(batch_size, q_len)
        rows = self._rows("x", x, batch_size, q_len, self.hidden_size, self._x_name)
        turn = self._turn_from(past_len, past_lens, batch_size, q_len, sin, cos)
        made, flat = [], []
        for name, given, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads), ("v", v, self.num_kv_heads)):
            if given is None:
                given = self.xp.empty((batch_size, q_len, heads, self.head_dim), self.dtype)
            made.append(given)
            flat.append(head_rows(self.xp, name, given, batch_size, q_len, heads, self.head_dim, self._dtype_name))
        check_scratch("loras_temp", loras_temp, self.loras.max_rank * tokens if loras else 0)
        buffers = self._project(rows, self._added(loras, sequence_loras, batch_size, q_len))
        kv_append(buffers.k, buffers.v, flat[1][:, None], flat[2][:, None], slots=row_numbers(self.xp, tokens),
                  q=buffers.q, q_out=flat[0], q_len=q_len, **turn, **self._finish)
        return tuple(made)

    def forward_2(self, x, attn_output, batch_size, q_len, loras=(), loras_temp=None, sequence_loras=None):
        """Output projection, post-norm and residual: x is changed in place.

        Parameters
        ----------
        x : ndarray [batch_size, q_len, hidden_size]
            See `forward`.
        attn_output : ndarray [batch_size, q_len, num_heads * head_dim], `dtype`
            Or with heads as an axis of their own.
        batch_size, q_len : int
        loras, loras_temp, sequence_loras
            See `forward_1`.

        Returns
        -------
        x : ndarray
        """
        tokens = self._tokens(batch_size, q_len)
        rows = self._rows("x", x, batch_size, q_len, self.hidden_size, self._x_name)
        mixed = self._rows("attn_output", attn_output, batch_size, q_len, self.q_size, self._dtype_name)
        if address(mixed) == address(rows):
            raise ValueError("QAttn: attn_output must be another array than x, which is written, got the same")
        check_scratch("loras_temp", loras_temp, self.loras.max_rank * tokens if loras else 0)
        self._check_open()
        self._output(mixed, rows, self._workspace.of(tokens), self._added(loras, sequence_loras, batch_size, q_len))
        return x

    def _turn_from(self, past_len, past_lens, batch_size, q_len, sin, cos):
        """Arguments of `kv_append` that turn heads of sequences with these lengths."""
        check_number("QAttn", "past_len", past_len, least=-1, integer=True)
        if past_lens is not None:
            if not hasattr(past_lens, "dtype") or isinstance(past_lens, np.ndarray) and self.xp is not np:
                past_lens = self.xp.asarray(np.asarray(past_lens, np.int32))
            if past_lens.dtype != np.int32 or past_lens.size != batch_size:
                raise ValueError(f"QAttn: past_lens must be int32 [batch_size={batch_size}], got {past_lens.dtype} "
                                 f"{list(past_lens.shape)}")
            past_lens = past_lens.reshape(batch_size)
        elif past_len < 0:
            raise ValueError("QAttn: past_lens must be given with past_len -1, got None")
        elif self.max_seq_len is not None and past_len + q_len > self.max_seq_len:
            raise ValueError(f"QAttn: past_len + q_len must be at most max_seq_len {self.max_seq_len}, got "
                             f"{past_len + q_len}")
        if self.rope_style is None:
            return {}
        cos, sin = tables(sin, cos, self.rope_style, self.rotary_dim, self.xp)
        if past_lens is None and past_len + q_len > cos.shape[0]:
            raise ValueError(f"QAttn: sin and cos must have a row for position {past_len + q_len - 1}, got "
                             f"{cos.shape[0]} rows")
        return {"cos": cos, "sin": sin, "style": self.rope_style, "rotary_dim": self.rotary_dim,
                "rope_rows": past_lens, "rope_base": past_len}

    # ---- pieces ----------------------------------------------------------------------------------------

    def _added(self, loras, sequence_loras, batch_size, q_len):
        """(numbers of adapters of all rows, Group or None) of a call; None for no adapter."""
        if not loras and sequence_loras is None:
            return None
        self._check_open()
        group = None if sequence_loras is None else self.loras.group(sequence_loras, batch_size, q_len)
        return self.loras.numbers(loras), group if self.loras.max_rank else None

    def _project(self, rows, added):
        """Norm and projections of q, k and v; the Buffers that hold them."""
        self._check_open()
        buffers = self._workspace.of(len(rows))
        normed, outs = rows, buffers.linears
        if self.layernorm is not None:
            normed = self._norm(rows, self.layernorm, self.layernorm_bias, buffers.normed)
        numbers, group = added or ((), None)
        columns, order = buffers.outs, None if group is None else group.order
        if order is not None:
            normed = self._sorted(order, normed, buffers)
            flat = buffers.sorted_y[:buffers.heads.nbytes].view(self.dtype).reshape(buffers.heads.shape)
            outs, columns = [flat[:, linear.start:linear.stop] for linear in self.qkv], self._workspace.columns(flat)
        for linear, out in zip(self.qkv, outs, strict=True):
            quant_gemm(normed, linear.matrix, bias=linear.bias, out=out)
        if added is not None:
            self.loras.add(("q", "k", "v"), normed, columns, numbers, group)
        if order is not None:
            embedding(group.inverse, flat, out=buffers.heads)
        return buffers

    def _output(self, mixed, rows, buffers, added):
        """Output projection, adapters, post-norm and residual into `rows` of x."""
        numbers, group = added or ((), None)
        order = None if group is None else group.order
        if self.post_layernorm is None and group is None:   # a group: as many roundings in any order
            quant_gemm(mixed, self.o_proj, bias=self.o_bias, accumulate=self.has_residual, out=rows)
            if added is not None:
                self.loras.add(("o",), mixed, {"o": rows}, numbers)
            return
        projected = buffers.projected
        if order is not None:
            mixed = self._sorted(order, mixed, buffers)
            projected = buffers.sorted_y[:projected.nbytes].view(np.float32).reshape(projected.shape)
        quant_gemm(mixed, self.o_proj, bias=self.o_bias, out=projected)
        if added is not None:
            self.loras.add(("o",), mixed, {"o": projected}, numbers, group)
        out = buffers.added if self.has_residual else rows
        if self.post_layernorm is None:
            embedding(group.inverse, projected, out=out)
        else:
            if order is not None:
                projected = embedding(group.inverse, projected, out=buffers.projected)
            self._norm(projected, self.post_layernorm, self.post_layernorm_bias, out)
        if self.has_residual:   # the sum is what is wanted of this norm; its result is nobody's
            gain = self._gain if self.post_layernorm is None else self.post_layernorm
            rms_norm(out, gain, eps=self.norm_epsilon, residual=rows, out=out)

    def _sorted(self, order, rows, buffers):
        """`rows` in the order of their adapters."""
        nbytes = rows.size * rows.dtype.itemsize
        return embedding(order, rows, out=buffers.sorted_x[:nbytes].view(rows.dtype).reshape(rows.shape))

    def _norm(self, x, gain, bias, out):
        if self.layernorm_is_rms:
            return rms_norm(x, gain, eps=self.norm_epsilon, out=out)
        return layer_norm(x, gain, bias, eps=self.norm_epsilon, out=out)

    def _refuse_capture(self, rule):
        """CaptureError for what a captured step would not see change."""
        under_capture = tape()
        if under_capture is not None and under_capture.capturing or (
                self.xp is not np and self.xp.cuda.get_current_stream().is_capturing()):
            raise CaptureError(f"QAttn: {rule}")

    # ---- checks of a call ------------------------------------------------------------------------------

    def _tokens(self, batch_size, q_len):
        check_number("QAttn", "batch_size", batch_size, least=1, integer=True)
        check_number("QAttn", "q_len", q_len, least=1, integer=True)
        return batch_size * q_len

    def _rows(self, name, array, batch_size, q_len, width, dtype):
        """`array` of all tokens as [tokens, width], a view."""
        if self.max_rows is not None and batch_size * q_len > self.max_rows:
            raise ValueError(f"QAttn: {name} must have at most max_rows {self.max_rows} tokens, got "
                             f"{batch_size * q_len}")
        return token_rows(self.xp, name, array, batch_size, q_len, width, dtype)

    def _check_open(self):
        if self.qkv is None:
            raise ValueError("QAttn: it must not be used after close(), got a call")

    # ---- the end ---------------------------------------------------------------------------------------

    def close(self):
        """Let go of all weights; calls are refused from then on."""
        self.qkv = self.o_proj = self._workspace = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def nbytes(self):
        """Bytes of the projections."""
        self._check_open()
        return sum(linear.matrix.nbytes for linear in self.qkv) + self.o_proj.nbytes

    def __repr__(self):
        if self.qkv is None:
            return "QAttn(closed)"
        formats = " + ".join(linear.matrix.format for linear in self.qkv)
        return (f"QAttn(hidden_size={self.hidden_size}, {self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}, "
                f"{formats} -> {self.o_proj.format}, {self._dtype_name}, rope {self.rope_style})")


def _decodes(step, invariant):
    """Whether `paged_decode` attends."""
    return step.mask is None and step.causal and (step.q_len == 1 or step.q_len <= MAX_Q_LEN and not invariant)


def _layer_of(cache, layer):
    """(keys, values) of a layer."""
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"QAttn: layer must be one of the cache's {cache.num_layers}, got {layer}")
    return cache.k[layer], cache.v[layer]
