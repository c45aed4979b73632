# SPDX-License-Identifier: Apache-2.0
"""QAttn: the attention part of a decoder layer, from norm to residual, with ExLlamaV2's arguments."""

import numpy as np

from ..ops.kv_append import kv_append
from ..params import Params
from ..runtime.checks import check_apart, check_dtype, check_flag, check_number, check_writeable
from .attend import Options, attend, prepare, schedule_on_device
from .buffers import buffers_of_rows, head_rows, row_numbers, token_rows
from .lora import names_of
from .projections import Projections
from .repeats import Repeats
from .step import steps_of
from .weights import check_scratch, compute_dtype, kind_of, lengths_of, rope_style_of, tables


class QAttn(Projections):
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
            if size is not None or name not in ("max_rows", "max_seq_len", "sincos_size"):
                check_number("QAttn", name, size, least=1, integer=True)
        check_number("QAttn", "norm_epsilon", norm_epsilon, least=0)
        for name, flag in (("layernorm_is_rms", layernorm_is_rms), ("has_residual", has_residual),
                           ("residual_fp32", residual_fp32), ("use_graphs", use_graphs),
                           ("headnorm_is_rms", headnorm_is_rms)):
            check_flag("QAttn", name, flag)
        if hidden_size % 8:
            raise ValueError(f"QAttn: hidden_size must be a multiple of 8, got {hidden_size}")
        if head_dim % 8 or head_dim > 256:
            raise ValueError(f"QAttn: head_dim must be a multiple of 8 up to 256, got {head_dim}")
        if num_heads % num_kv_heads:
            raise ValueError(f"QAttn: num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        self.hidden_size, self.num_heads, self.num_kv_heads = int(hidden_size), int(num_heads), int(num_kv_heads)
        self.head_dim, self.max_rows, self.max_seq_len = int(head_dim), max_rows, max_seq_len
        self.norm_epsilon, self.has_residual, self.residual_fp32 = norm_epsilon, has_residual, residual_fp32
        self.layernorm_is_rms, self.headnorm_is_rms = layernorm_is_rms, headnorm_is_rms
        self.use_graphs = use_graphs
        self.xp = xp = kind_of(q_q_proj, xp)
        self.dtype = compute_dtype(dtype)
        self.x_dtype = np.dtype(np.float32) if residual_fp32 else self.dtype
        self._dtype_name, self._x_name = self.dtype.name, self.x_dtype.name
        self.rope_style = rope_style_of(rope_style)
        self.rotary_dim = self.head_dim if sincos_size is None else int(sincos_size)
        if self.rope_style and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(f"QAttn: sincos_size must be even and at most head_dim {self.head_dim}, got "
                             f"{self.rotary_dim}")
        self._set_norms(layernorm, layernorm_bias, post_layernorm, post_layernorm_bias, q_norm, k_norm)
        self._set_projections(q_q_proj, q_k_proj, q_v_proj, q_o_proj, q_bias, k_bias, v_bias, o_bias)
        rows = 0 if max_rows is None else max_rows
        check_scratch("temp_state", temp_state, rows * max(self.q_size, self.hidden_size))
        check_scratch("temp_dq", temp_dq, min(max(self.q_size, self.kv_size) * self.hidden_size, 512 << 20))
        self.loras = self._ones = None
        self.set_loras({})

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        vars(self)["_repeats"] = Repeats()   # steps with what it was are no more

    # ---- the whole step --------------------------------------------------------------------------------

    def schedule(self, params, cache, *, window_size=0, invariant=False, out=None):
        """Who attends what in steps of `params`, made from the lengths on the device, for ``forward(schedule=)``.

        Parameters
        ----------
        params : Params or PagedParams
            Of such a step.
        cache : PagedCache
        window_size, invariant
            Those of the calls of `forward` it is for.
        out : Schedule, optional
            From an earlier call: filled again, in place. That is how a captured step sees other lengths.

        Returns
        -------
        Schedule
            With room for as many tokens as the pages of `params` hold. It serves all layers with the heads, the dtype,
            the window and the format of the cache of this one.

        Raises
        ------
        TypeError, ValueError
            As `forward`, or an `out` made for something else.

        Notes
        -----
        ``cupyattn.schedule`` of ``params.get_cache_seqlens_after(device)``: for CuPy arrays one launch, which reads no
        length on the host.
        """
        options = Options(window_size=window_size, invariant=invariant)
        step, *others = self._steps(params, cache, 0, options)
        if cache is None or others or isinstance(cache, list | tuple):
            raise TypeError(f"QAttn: cache must be a PagedCache for a schedule, got {type(cache).__name__}")
        return schedule_on_device(self, step, cache, options, out)

    def forward(self, x, params, cache=None, layer=0, *, sin=None, cos=None, softmax_scale=None, window_size=0,
                softcap=0.0, sinks=None, invariant=False, schedule=None, loras=(), sequence_loras=None, out=None):
        """One step of the layer: x is changed in place, new keys and values go into the cache.

        Parameters
        ----------
        x : ndarray [batch_size, seq_len, hidden_size] or [batch_size * seq_len, hidden_size]
            Of `dtype`, or float32 with `residual_fp32`.
        params : Params or PagedParams
            Lengths, offsets, masks and pages; made once per step and given to all layers. What the first of them makes
            of it (a `Schedule`, too) serves the others, so it does not change after its first use. Only the arrays
            that ``get_cache_seqlens(device)``, ``get_cache_seqlens_after(device)`` and ``get_block_index(device)`` of
            PagedParams return may be changed in place, where `schedule` is made of the new lengths. Without that,
            other lengths are refused in NumPy arrays; CuPy arrays are not read, and results are garbage.
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
            For attention, from `QAttn.schedule` or `cupyattn.schedule`; needed while a step over a cache is captured,
            and for lengths changed in place. Default: made from the lengths `params` was made with. Layers that attend
            in blocks make their own.
        loras : sequence, optional
            Names of adapters of `set_loras` for all sequences, in the order they are added.
        sequence_loras : sequence of length batch_size, optional
            The name of one more adapter, or None, for each sequence. Sequences of one adapter are multiplied together;
            least work is done where they stand side by side, in the order of `set_loras` and None first.
        out : ndarray like x, `dtype` of x or float32, optional
            Changed in place of x, which stays: with `has_residual` the result is added to what `out` holds. Must
            overlap no input.

        Returns
        -------
        x : ndarray
            Or `out`.

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit, more tokens than cache, tables, `max_rows` or `max_seq_len` hold.
        CaptureError
            The step is captured, and its replays could not see other lengths; see the notes.

        Notes
        -----
        Five launches where q, k and v are one matrix: norm, projection, append (head norms, RoPE and the cache's
        format, also for the queries), attention, output projection, which adds to x. Asynchronous on the current CuPy
        stream. All arguments are checked before anything is written.

        New keys and values reach the cache by the append alone, also where ``params.is_sequential`` and they could be
        projected into its rows: q, k and v come from one launch as rows of one array, and the append, which finishes
        queries in any case, is the one pass that norms, turns, quantizes and scatters. `forward_1` writes into rows of
        a cache that are given as its `k` and `v`; what then stands there is the same, bit for bit.

        A step of up to 8 tokens a sequence over PagedParams that is called again with arrays at the same places and the
        same objects, as in a decode loop that changes lengths, pages and x in place, is its launches without their
        Python from the fifth time on. Up to four such steps are remembered, with their x and `out`, until `params`,
        `cache` or the layer is gone. In NumPy arrays lengths and pages are looked at all the same: where they have
        changed, the first layer that sees it checks them in a call with all its Python.

        Steps that repeat are captured, see ``cupyattn.graphs``. Replays see what then stands in `x`, in the cache, in
        the three arrays of PagedParams named above and in the tables `sin` and `cos`, if these are of the first form;
        `schedule` has to be made inside the step. All else stays as it was: options, adapters, ``alt_rope_embed``,
        offsets, masks, ``cu_seqlens`` and the lengths of Params. Where this would go wrong with other lengths it is
        refused: a step over a cache takes PagedParams without ``rope_offsets``, and a Schedule with room for other
        lengths. Without a cache all lengths are ``seq_len``, and any Params will do.
        """
        options = Options(softmax_scale, window_size, softcap, sinks, invariant)
        return self._repeats.run(self, x, params, cache, layer, sin, cos, options, schedule, loras, sequence_loras, out)

    def checked(self, x, params, cache, layer, sin, cos, options, schedule, loras, sequence_loras, out):
        """A function that makes this call of `forward`: all arguments are checked, nothing is written yet."""
        steps = self._steps(params, cache, layer, options)
        sizes = params.batch_size, steps[0].q_len, self.hidden_size
        rows = target = self._rows("x", x, *sizes, self._x_name, written=out is None)
        if out is not None:
            kind = check_dtype("QAttn", "out", out, tuple(dict.fromkeys((self._x_name, "float32"))))
            target = self._rows("out", out, *sizes, kind, written=True)
            check_apart("QAttn", [("out", target)], [("x", rows)])
        turn = self._turn(params, sin, cos)
        caches = cache if isinstance(cache, list | tuple) else [cache]
        parts = [prepare(self, params, step, one, layer, turn, options, schedule)
                 for step, one in zip(steps, caches, strict=True)]
        added = self._added(*names_of(loras, sequence_loras), params.batch_size, steps[0].q_len)

        def step():
            buffers = self._project(rows, added)
            for part in parts:
                some = buffers if len(parts) == 1 else buffers_of_rows(buffers, part.step.rows)
                attend(self, part, some, turn, options)
            self._output(buffers.mixed.reshape(buffers.tokens, -1), target, buffers, added)
            return x if out is None else out

        return step

    def _steps(self, params, cache, layer, options):
        """The Steps of a call."""
        self._check_open()
        if not isinstance(params, Params):
            raise TypeError(f"QAttn: params must be Params or PagedParams, got {type(params).__name__}")
        check_number("QAttn", "layer", layer, integer=True)
        options.check(self)
        return steps_of(params, cache, self.xp)

    def _turn(self, params, sin, cos):
        """Arguments of `kv_append` that turn heads: {} without RoPE."""
        if self.rope_style is None:
            return {}
        other = params.get_alt_rope_embed(None if self.xp is np else self.xp.cuda.runtime.getDevice())
        sin, cos = (sin, cos) if other is None else other
        cos, sin = tables(sin, cos, self.rope_style, self.rotary_dim, self.xp)
        return {"cos": cos, "sin": sin, "style": self.rope_style, "rotary_dim": self.rotary_dim}

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
        self._check_open()
        tokens = self._tokens(batch_size, q_len)
        rows = self._rows("x", x, batch_size, q_len, self.hidden_size, self._x_name)
        turn = self._turn_from(past_len, past_lens, batch_size, q_len, sin, cos)
        made, flat = [], []
        for name, given, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads), ("v", v, self.num_kv_heads)):
            if given is None:
                given = self.xp.empty((batch_size, q_len, heads, self.head_dim), self.dtype)
            made.append(given)
            flat.append(head_rows(self.xp, name, given, batch_size, q_len, heads, self.head_dim, self._dtype_name))
            check_writeable("QAttn", name, flat[-1])
        added = self._added(*self._names(loras, sequence_loras, loras_temp, tokens), batch_size, q_len)
        buffers = self._project(rows, added)   # nothing has been written before
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
        self._check_open()
        tokens = self._tokens(batch_size, q_len)
        rows = self._rows("x", x, batch_size, q_len, self.hidden_size, self._x_name, written=True)
        mixed = self._rows("attn_output", attn_output, batch_size, q_len, self.q_size, self._dtype_name)
        check_apart("QAttn", [("x", rows)], [("attn_output", mixed)])
        added = self._added(*self._names(loras, sequence_loras, loras_temp, tokens), batch_size, q_len)
        self._output(mixed, rows, self._workspace.of(tokens), added)
        return x

    def _turn_from(self, past_len, past_lens, batch_size, q_len, sin, cos):
        """Arguments of `kv_append` that turn heads of sequences with these lengths."""
        check_number("QAttn", "past_len", past_len, least=-1, integer=True)
        if past_lens is not None:
            past_lens = lengths_of("past_lens", past_lens, batch_size, self.xp)
            if self.max_seq_len is not None and self.xp is np:
                longest = max(past_len, 0) + int(past_lens.max()) + q_len
                if longest > self.max_seq_len:
                    raise ValueError("QAttn: past_len + past_lens + q_len must be at most max_seq_len "
                                     f"{self.max_seq_len}, got {longest}")
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

    # ---- checks of a call ------------------------------------------------------------------------------

    def _names(self, loras, sequence_loras, loras_temp, tokens):
        """Names of adapters, for which ExLlamaV2's scratch would suffice."""
        loras, sequence_loras = names_of(loras, sequence_loras)
        check_scratch("loras_temp", loras_temp, self.loras.max_rank * tokens if loras else 0)
        return loras, sequence_loras

    def _tokens(self, batch_size, q_len):
        check_number("QAttn", "batch_size", batch_size, least=1, integer=True)
        check_number("QAttn", "q_len", q_len, least=1, integer=True)
        return batch_size * q_len

    def _rows(self, name, array, batch_size, q_len, width, dtype, written=False):
        """`array` of all tokens as [tokens, width], a view."""
        if self.max_rows is not None and batch_size * q_len > self.max_rows:
            raise ValueError(f"QAttn: {name} must have at most max_rows {self.max_rows} tokens, got "
                             f"{batch_size * q_len}")
        rows = token_rows(self.xp, name, array, batch_size, q_len, width, dtype)
        if written:
            check_writeable("QAttn", name, rows)
        return rows

    # ---- the end ---------------------------------------------------------------------------------------

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self.qkv is None:
            return "QAttn(closed)"
        formats = " + ".join(linear.matrix.format for linear in self.qkv)
        return (f"QAttn(hidden_size={self.hidden_size}, {self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}, "
                f"{formats} -> {self.o_proj.format}, {self._dtype_name}, rope {self.rope_style})")
