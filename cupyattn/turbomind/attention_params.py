# SPDX-License-Identifier: Apache-2.0
"""TurboMind's attention parameters: one validated bundle for a layer's appending, attending and merging."""

import math
import numbers
from dataclasses import dataclass, field, fields

import numpy as np

from ..attn.step import OP, Step
from ..devices import to_host
from ..rope_params import RopeParams
from ..runtime import arch_of, env
from ..runtime.arrays import array_namespace, dtype_name, strides
from ..runtime.checks import (
    FLOATS,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
)
from .cache_iterators import BlockIteratorParams, LinearIteratorParams, QuantPolicy

_DERIVED = ("token_num", "batch_size", "max_q_len", "max_k_len", "num_heads", "num_kv_heads", "size_per_head",
            "stride")


def check_params(op, params, name="params"):
    """`params` is an AttentionParams."""
    if not isinstance(params, AttentionParams):
        raise TypeError(f"{op}: {name} must be an AttentionParams, got {type(params).__name__}")


def _array(default=None):
    """A field that holds an array."""
    return field(default=default, metadata={"array": True})


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionParams:
    """What ``invoke_decoding``, ``invoke_attention``, ``process_kv``, ``flatten_kv`` and ``reduce_split_k`` work on.

    Arrays are NumPy or CuPy, all of one kind. Everything is checked on construction, where arrays of lengths, and
    whatever else has an entry per sequence, are read on the host once; nothing is read back later. `replace` makes the
    parameters of the next layer without reading them again. Such arrays must not change afterwards: other lengths need
    other parameters, and a captured step replays the lengths it was made with and no others.

    Parameters
    ----------
    q : ndarray [tokens, num_heads, size_per_head], float16, bfloat16 or float32
        New tokens' queries before bias and RoPE. Last axis contiguous; q, k and v may be slices of one array of any
        width, see `from_qkv`. Never modified.
    k, v : ndarray [tokens, num_kv_heads, size_per_head], dtype of q, optional
        New tokens' keys and values; ``invoke_attention`` does without.
    out : ndarray [tokens, num_heads, size_per_head], dtype of q, optional
        Row t belongs to token t of q. Default: a new array.
    q_out : ndarray [tokens, num_heads, size_per_head], dtype of q, optional
        Scratch for queries after bias and RoPE. Default: a new array. With `out` and `q_out` a call that was made once
        can be captured in a CUDA graph, for which these parameters must be kept alive. It replays these lengths.
    stride : int, optional
        Elements between tokens of q, k and v. It follows from the arrays; given, it must agree.
    q_bias, k_bias, v_bias : ndarray [heads, size_per_head], dtype of q, optional
        Added before RoPE.
    cu_q_len : ndarray [batch + 1], int32
        First token of every sequence in q, and the end; the first need not be 0.
    cu_k_len : ndarray [batch + 1], int32
        Context lengths, new tokens included, summed up; only differences count.
    finished : ndarray [batch], bool, optional
        Sequences that write no key or value; their rows of `out` are zeros.
    rope_theta : ndarray [batch], float32 or float64, optional
        Base of each sequence in place of ``rope_param.base``; for dynamic NTK ``rope_param.bases(prompt_lens)``.
    sinks : ndarray [num_heads], float32 or dtype of q, optional
        One more logit per head, in natural units after scaling, that takes probability and adds no value.
    linear_iter_params : LinearIteratorParams, optional
        Contiguous keys and values: what ``flatten_kv`` writes, and ``invoke_attention`` reads if given.
    block_iter_params : BlockIteratorParams, optional
        Keys and values in blocks. Those of finished sequences, and those before the window of the first new token, may
        be gone: their addresses may be 0.
    token_num, batch_size, max_q_len, max_k_len, num_heads, num_kv_heads, size_per_head : int, optional
        Follow from the arrays; given, they must agree. num_kv_heads is needed when there is no k.
    inv_sqrt_dh : float, optional
        The softmax scale in natural units, default ``size_per_head ** -0.5``. TurboMind's own struct holds it times
        log2(e); for such a number there is `from_base2`.
    window_size : int, optional
        Visible tokens, the query's own included; 0 (default) or None for all.
    causal : bool
        A query sees no later token. Default True.
    rope_param : RopeParams, optional
        Rotary embedding of q and k. Default: none. TurboMind's own is of style "interleaved", for which it permutes
        the columns of Hugging Face weights; unpermuted ones need "neox".
    rope_positions : int ndarray [tokens] or [3, tokens], optional
        Where the tokens stand for RoPE, if not in the order of the sequence; three positions with ``mrope_section``.
    prompt_len : int array [batch], optional
        Prompt length of each sequence, for RoPE "dynamic" and "longrope".
    use_logn_attn : bool
        Scale q by ``log2(p) / log2(max_position_embeddings)`` at 0-based positions p beyond that.
    max_position_embeddings : int, optional
        Of log-n scaling.
    quant_policy : QuantPolicy or int
        How the blocks store keys and values: 0, 4, 8, or 16 and 17 for fp8 e4m3 and e5m2.
    kv_scale : pair of ndarray, optional
        float32 [1] or [num_kv_heads] for K and for V, finite, with the fp8 policies. What CuPy arrays hold is looked
        at with ``CUPYATTN_CHECK=1`` only.
    max_split_k : int
        Capacity of the split axis of the partial results, and the largest number of splits. Default 1.
    num_splits : int, optional
        How many splits to make when the partial results are exposed; default: as many as keep the machine busy.
    split_cnt : ndarray [tokens], int32, optional
        Receives the number of splits of each token; 0 says that its result is in `out` already.
    partial_O : ndarray [tokens, num_heads, max_split_k, size_per_head], float32, optional
        Receives the splits' outputs.
    partial_ML : ndarray [tokens, num_heads, max_split_k, 2], float32, optional
        Receives ``(M, L)`` of each split: M its log-sum-exp divided by the softmax scale and L = 1, or (-inf, 0), so
        that with c the base-2 scale ``sum 2^((M_i - M) c) O_i / sum 2^((M_i - M) c) L_i`` is the result.
        The three come together, in rows from the first token of this batch; `with_partials` makes them.
    cp_rank, cp_size : int
        Context parallel: this rank's blocks hold the tokens t with ``t % cp_size == cp_rank``, in their order.
    cp_offsets, cp_counts : ndarray [batch], int32, optional
        Context parallel over contiguous shards instead: this rank's blocks hold tokens cp_offsets[b] up to
        cp_offsets[b] + cp_counts[b], the new ones among them included.
    share_prefix : bool
        Attend once to leading blocks that sequences have in common, where that saves time (default). See `schedule`.
    invariant : bool
        Cut keys only at multiples of 1024, so that the bits of a row depend neither on the batch around it nor on the
        number of multiprocessors. Default False; not with the partial results. See ``attention``.
    arch : str or int, optional
        Default None: of the arrays' device. Anything else must agree with it.
    stream : cupy.cuda.Stream, optional
        Where to launch; default None: the current one.
    step : Step, optional
        Lengths read before, which `replace` hands on.

    Raises
    ------
    TypeError, ValueError
        A field of the wrong kind, shape or value; the message names it.

    Examples
    --------
    One new token after three, no cache quantization:

    >>> import numpy as np, cupyattn
    >>> pool = np.zeros((1, 1, 2, 64, 8), np.float32)       # 1 block: 1 KV head, K and V, 64 tokens, head_dim 8
    >>> pool[0, 0, 1, :3] = [[1], [2], [3]]
    >>> params = cupyattn.AttentionParams.from_qkv(
    ...     np.float32([[0] * 16 + [2] * 8]), num_heads=1, num_kv_heads=1, cu_q_len=np.int32([0, 1]),
    ...     cu_k_len=np.int32([0, 4]),
    ...     block_iter_params=cupyattn.BlockIteratorParams.from_pool(pool, [[0]]))
    >>> params.softmax_scale, params.token_num, params.max_k_len
    (0.3535533905932738, 1, 4)
    """

    q: object = _array()
    k: object = _array()
    v: object = _array()
    out: object = _array()
    q_out: object = _array()
    stride: int | None = None
    q_bias: object = _array()
    k_bias: object = _array()
    v_bias: object = _array()
    cu_q_len: object = _array()
    cu_k_len: object = _array()
    finished: object = _array()
    rope_theta: object = _array()
    sinks: object = _array()
    linear_iter_params: LinearIteratorParams | None = None
    block_iter_params: BlockIteratorParams | None = None
    token_num: int | None = None
    batch_size: int | None = None
    max_q_len: int | None = None
    max_k_len: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    size_per_head: int | None = None
    inv_sqrt_dh: float | None = None
    window_size: int | None = 0
    causal: bool = True
    rope_param: RopeParams | None = None
    rope_positions: object = _array()
    prompt_len: object = None
    use_logn_attn: bool = False
    max_position_embeddings: int | None = None
    quant_policy: QuantPolicy = QuantPolicy.NONE
    kv_scale: tuple | None = None
    max_split_k: int = 1
    num_splits: int | None = None
    split_cnt: object = _array()
    partial_O: object = _array()
    partial_ML: object = _array()
    cp_rank: int = 0
    cp_size: int = 1
    cp_offsets: object = _array()
    cp_counts: object = _array()
    share_prefix: bool = True
    invariant: bool = False
    arch: object = None
    stream: object = None
    step: Step | None = field(default=None, repr=False)

    # ---- making one ------------------------------------------------------------------------------------

    @classmethod
    def from_qkv(cls, qkv, /, *, num_heads, num_kv_heads, size_per_head=None, **rest):
        """From one array [tokens, width] whose rows begin with the queries, the keys and the values of a token.

        Parameters
        ----------
        qkv : ndarray [tokens, width]
            What follows the ``(num_heads + 2 * num_kv_heads) * size_per_head`` elements is not looked at.
        num_heads, num_kv_heads : int
        size_per_head : int, optional
            Default: the rows hold nothing else.
        **rest
            Other fields.
        """
        array_namespace(OP, qkv=qkv)
        check_shape(OP, "qkv", qkv, (None, None), "[tokens, width]")
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check_number(OP, name, value, least=1, integer=True)
        if size_per_head is not None:
            check_number(OP, "size_per_head", size_per_head, least=1, integer=True)
        heads = num_heads + 2 * num_kv_heads
        head_dim = qkv.shape[1] // heads if size_per_head is None else size_per_head
        used = heads * head_dim
        if used > qkv.shape[1] or (size_per_head is None and used != qkv.shape[1]):
            raise ValueError(f"{OP}: qkv must have rows of {num_heads} + 2 * {num_kv_heads} heads, got "
                             f"{list(qkv.shape)}; give size_per_head if they hold more")
        check_last_axis(OP, "qkv", qkv)
        # a reshaped single row would forget how far it is to the next
        rows = array_namespace(OP, qkv=qkv).lib.stride_tricks.as_strided(
            qkv, (len(qkv), heads, head_dim), (qkv.strides[0], head_dim * qkv.itemsize, qkv.itemsize))
        cut = num_heads + num_kv_heads
        return cls(q=rows[:, :num_heads], k=rows[:, num_heads:cut], v=rows[:, cut:], num_heads=num_heads,
                   num_kv_heads=num_kv_heads, size_per_head=head_dim, **rest)

    @classmethod
    def from_base2(cls, scale_log2, /, **rest):
        """With the softmax scale as TurboMind's kernels hold it, ``softmax_scale * log2(e)``.

        Parameters
        ----------
        scale_log2 : float
        **rest
            Other fields.
        """
        check_number(OP, "scale_log2", scale_log2)
        if "inv_sqrt_dh" in rest:
            raise TypeError(f"{OP}: inv_sqrt_dh must not be given with scale_log2, got {rest['inv_sqrt_dh']!r}")
        return cls(inv_sqrt_dh=scale_log2 * math.log(2.0), **rest)

    def replace(self, **changes):
        """A copy with other fields, say the next layer's; lengths are not read again where they stay the same."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _DERIVED}
        step = self.step if changes.keys().isdisjoint(Step.FIELDS) else None
        return type(self)(**{**kept, "num_kv_heads": self.num_kv_heads, "step": step, **changes})

    def with_partials(self, max_split_k=None):
        """A copy with new `split_cnt`, `partial_O` and `partial_ML` for up to `max_split_k` splits."""
        splits = self.max_split_k if max_split_k is None else max_split_k
        check_number(OP, "max_split_k", splits, least=1, integer=True)
        rows = (self.token_num, self.num_heads, splits)
        xp = self.xp
        return self.replace(max_split_k=splits, split_cnt=xp.zeros(self.token_num, np.int32),
                            partial_O=xp.empty((*rows, self.size_per_head), np.float32),
                            partial_ML=xp.empty((*rows, 2), np.float32))

    def __post_init__(self):
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("array")}
        if self.q is None:
            raise ValueError(f"{OP}: q must be given, got None")
        xp = array_namespace(OP, **arrays)
        self._check_tokens()
        if self.step is None:
            object.__setattr__(self, "step", Step(xp, len(self.q), **{n: getattr(self, n) for n in Step.FIELDS}))
        elif self.step.first + self.step.token_num > len(self.q):
            raise ValueError(f"{OP}: q must have the {self.step.first + self.step.token_num} tokens of cu_q_len, got "
                             f"{len(self.q)}")
        self._check_numbers()
        found = {name: getattr(self.step, name) for name in _DERIVED[:4]}
        found |= {"num_heads": self.q.shape[1], "size_per_head": self.q.shape[2]}
        if self.k is not None:
            found["num_kv_heads"] = self.k.shape[1]
        for name, value in found.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ValueError(f"{OP}: {name} must be {value}, as the arrays say, got {given}")
            object.__setattr__(self, name, value)
        if self.num_kv_heads is None:
            raise ValueError(f"{OP}: num_kv_heads must be given when k is not, got None")
        check_number(OP, "num_kv_heads", self.num_kv_heads, least=1, integer=True)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{OP}: num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                             f"{self.num_kv_heads}")
        self._check_per_head(xp)
        self._check_cache(xp)
        self._check_partials()
        self._check_place(xp)
        object.__setattr__(self, "schedules", {})   # used by this object's calls; a few of the step's

    def _check_tokens(self):
        """q, k, v and out, and the stride between their tokens."""
        q = self.q
        check_dtype(OP, "q", q, FLOATS)
        check_shape(OP, "q", q, (None, None, None), "[tokens, num_heads, size_per_head]")
        tokens, num_heads, head_dim = q.shape
        if num_heads == 0:
            raise ValueError(f"{OP}: num_heads must be at least 1, got a q of {list(q.shape)}")
        if head_dim == 0 or head_dim % 8 or head_dim > 256:
            raise ValueError(f"{OP}: size_per_head must be a multiple of 8 from 8 to 256, got {head_dim}")
        if (self.k is None) != (self.v is None):
            raise ValueError(f"{OP}: k and v must be given together, got one of them")
        heads = None if self.k is None or self.k.ndim != 3 else self.k.shape[1]
        for name, count in (("k", heads), ("v", heads), ("out", num_heads), ("q_out", num_heads)):
            array = getattr(self, name)
            if array is not None:
                check_dtype(OP, name, array, dtype_name(q))
                check_shape(OP, name, array, (tokens, count, head_dim), "[tokens, heads, size_per_head]")
        for name in ("q", "k", "v", "out", "q_out"):
            array = getattr(self, name)
            if array is not None:
                check_element_strides(OP, name, array)
                check_last_axis(OP, name, array)
                if name.endswith("out"):
                    check_writeable(OP, name, array)
        given = self.stride
        if given is not None and (isinstance(given, bool) or not isinstance(given, numbers.Integral)):
            raise TypeError(f"{OP}: stride must be an integer, got {type(given).__name__}")
        for name in ("q", "k", "v"):
            array = getattr(self, name)
            if given is not None and array is not None and tokens and strides(array)[0] != given:
                raise ValueError(f"{OP}: stride must be the {strides(array)[0]} elements between tokens of {name}, got "
                                 f"{given}")
        object.__setattr__(self, "stride", strides(q)[0])

    def _check_numbers(self):
        if self.inv_sqrt_dh is None:
            object.__setattr__(self, "inv_sqrt_dh", self.q.shape[2] ** -0.5)
        check_number(OP, "inv_sqrt_dh", self.inv_sqrt_dh)
        object.__setattr__(self, "window_size", 0 if self.window_size is None else self.window_size)
        check_number(OP, "window_size", self.window_size, least=0, integer=True)
        for name in ("causal", "use_logn_attn", "share_prefix", "invariant"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{OP}: {name} must be True or False, got {getattr(self, name)!r}")
        if self.use_logn_attn or self.max_position_embeddings is not None:
            check_number(OP, "max_position_embeddings", self.max_position_embeddings, least=2, integer=True)
        if self.rope_param is not None:
            if not isinstance(self.rope_param, RopeParams):
                raise TypeError(f"{OP}: rope_param must be a RopeParams, got {type(self.rope_param).__name__}")
            if self.rope_param.rotary_dim > self.q.shape[2]:
                raise ValueError(f"{OP}: rope_param must rotate at most the {self.q.shape[2]} elements of a head, got "
                                 f"rotary_dim {self.rope_param.rotary_dim}")
        check_number(OP, "cp_size", self.cp_size, least=1, integer=True)
        check_number(OP, "cp_rank", self.cp_rank, least=0, integer=True)
        if self.cp_rank >= self.cp_size:
            raise ValueError(f"{OP}: cp_rank must be below cp_size {self.cp_size}, got {self.cp_rank}")
        try:
            object.__setattr__(self, "quant_policy", QuantPolicy(self.quant_policy))
        except ValueError:
            raise ValueError(f"{OP}: quant_policy must be one of {', '.join(str(int(p)) for p in QuantPolicy)}, got "
                             f"{self.quant_policy!r}") from None

    def _check_per_head(self, xp):
        """Biases, sinks and the scales of fp8."""
        for name, heads in (("q_bias", self.num_heads), ("k_bias", self.num_kv_heads), ("v_bias", self.num_kv_heads)):
            array = getattr(self, name)
            if array is not None:
                check_dtype(OP, name, array, dtype_name(self.q))
                check_shape(OP, name, array, (heads, self.size_per_head), "[heads, size_per_head]")
                check_last_axis(OP, name, array)
        if self.sinks is not None:
            found = check_dtype(OP, "sinks", self.sinks, tuple(dict.fromkeys(("float32", dtype_name(self.q)))))
            check_shape(OP, "sinks", self.sinks, (self.num_heads,), "[num_heads]")
            if found != "float32":
                object.__setattr__(self, "sinks", self.sinks.astype(np.float32))
        if self.quant_policy.is_fp8 != (self.kv_scale is not None):
            raise ValueError(f"{OP}: kv_scale must be given with the fp8 policies and only then, got "
                             f"{self.quant_policy!r} and {'none' if self.kv_scale is None else 'scales'}")
        if self.kv_scale is not None:
            if not isinstance(self.kv_scale, tuple) or len(self.kv_scale) != 2:
                raise TypeError(f"{OP}: kv_scale must be the pair (k_scale, v_scale), got "
                                f"{type(self.kv_scale).__name__}")
            for i, scale in enumerate(self.kv_scale):
                array_namespace(OP, **{"q": self.q, f"kv_scale[{i}]": scale})
                check_dtype(OP, f"kv_scale[{i}]", scale, "float32")
                if scale.shape not in ((1,), (self.num_kv_heads,)):
                    raise ValueError(f"{OP}: kv_scale[{i}] must be [1] or [num_kv_heads={self.num_kv_heads}], got "
                                     f"{list(scale.shape)}")
                if (xp is np or env.check()) and not np.isfinite(to_host(scale)).all():
                    raise ValueError(f"{OP}: kv_scale[{i}] must be finite, got {to_host(scale).tolist()}")

    def _check_cache(self, xp):
        """The iterators' arrays are of q's kind, and hold the batch."""
        for name, kind in (("linear_iter_params", LinearIteratorParams), ("block_iter_params", BlockIteratorParams)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{OP}: {name} must be a {kind.__name__}, got {type(value).__name__}")
        linear, blocks = self.linear_iter_params, self.block_iter_params
        if linear is not None:
            array_namespace(OP, q=self.q, **{"linear_iter_params.kv_cache": linear.kv_cache})
            check_dtype(OP, "linear_iter_params.kv_cache", linear.kv_cache, dtype_name(self.q))
            linear.views(self.num_kv_heads, int(self.step.k_lens.sum()), self.size_per_head)
        if blocks is not None:
            array_namespace(OP, q=self.q, **{"block_iter_params.block_ptrs": blocks.block_ptrs})
            check_shape(OP, "block_iter_params.cu_block_nums", blocks.cu_block_nums, (self.batch_size + 1,),
                        "[batch + 1]")
            layer = blocks.layer(self.num_kv_heads, self.size_per_head, dtype=dtype_name(self.q),
                                 quant_policy=self.quant_policy, kv_scale=self.kv_scale)
            object.__setattr__(self, "block_layer", layer)
            self.check_blocks(OP, *self.step.visible(self.causal, self.window_size))

    def check_blocks(self, op, begin, end):
        """The blocks of tokens begin[b] to end[b] of every sequence, counted as this rank holds them, are there."""
        blocks = self.block_iter_params
        counts, first, needed = np.diff(blocks.starts_host), begin // blocks.block_len, -(-end // blocks.block_len)
        if (counts < needed).any():
            b = int(np.argmax(counts < needed))
            raise ValueError(f"{op}: block_iter_params.cu_block_nums must give sequence {b} the {needed[b]} blocks its "
                             f"{end[b]} tokens need, got {counts[b]}")
        many = needed - first
        used = np.repeat(blocks.starts_host[:-1] + first - np.cumsum(many) + many, many) + np.arange(many.sum())
        blocks.table.check_addresses(op, blocks.pointers_host[used],
                                     max(side.nbytes_needed() for side in self.block_layer[:2]))

    def _check_partials(self):
        check_number(OP, "max_split_k", self.max_split_k, least=1, integer=True)
        if self.num_splits is not None:
            check_number(OP, "num_splits", self.num_splits, least=1, integer=True)
            if self.num_splits > self.max_split_k:
                raise ValueError(f"{OP}: num_splits must be at most max_split_k = {self.max_split_k}, got "
                                 f"{self.num_splits}")
        rows = (self.token_num, self.num_heads, self.max_split_k)
        shapes = {"split_cnt": rows[:1], "partial_O": (*rows, self.size_per_head), "partial_ML": (*rows, 2)}
        missing = [name for name in shapes if getattr(self, name) is None]
        if len(missing) == 3:
            return
        if missing:
            raise ValueError(f"{OP}: {missing[0]} must be given with {' and '.join(shapes.keys() - set(missing))}, got "
                             "None")
        if self.invariant:
            raise ValueError(f"{OP}: invariant must be False with partial_O, whose splits depend on the batch, got "
                             "True")
        if self.inv_sqrt_dh <= 0:
            raise ValueError(f"{OP}: inv_sqrt_dh must be greater than 0 when partial_ML is written, got "
                             f"{self.inv_sqrt_dh}")
        for name, shape in shapes.items():
            array = getattr(self, name)
            check_dtype(OP, name, array, "int32" if name == "split_cnt" else "float32")
            check_shape(OP, name, array, shape, "[token_num, num_heads, max_split_k, ...]" if len(shape) > 1 else
                        "[token_num]")
            check_writeable(OP, name, array)
            check_element_strides(OP, name, array)

    def _check_place(self, xp):
        """arch and stream fit the arrays' device."""
        if self.stream is not None and xp is np:
            raise TypeError(f"{OP}: stream must be None for NumPy arrays, got {type(self.stream).__name__}")
        if self.arch is not None:
            here = arch_of(xp)
            names = {here} if here == "cpu" else {here, int(here[3:].rstrip("af")), f"sm_{here[3:].rstrip('af')}"}
            if self.arch not in names:
                raise ValueError(f"{OP}: arch must be None or that of the arrays' device, {here}, got {self.arch!r}")

    # ---- what it says ----------------------------------------------------------------------------------

    @property
    def xp(self):
        """numpy or cupy."""
        return self.step.xp

    @property
    def softmax_scale(self):
        """The natural softmax scale; another name of `inv_sqrt_dh`."""
        return self.inv_sqrt_dh

    @property
    def rows(self):
        """Rows of q, k, v and out that belong to the batch, as a slice."""
        return slice(self.step.first, self.step.first + self.token_num)

    @property
    def is_context_parallel(self):
        """Whether this rank holds only some of the keys."""
        return self.cp_size > 1 or self.cp_offsets is not None

    def to_pod(self):
        """The parameters as TurboMind's C struct, ``TurboMindAttentionParams`` of ``params.h``.

        Returns
        -------
        ndarray [1], structured
            Holds addresses of this object's arrays: keep it alive as long as the struct. `inv_sqrt_dh` is multiplied by
            log2(e), and an unlimited window is 2^28, as TurboMind's kernels want them. Bases that differ by sequence,
            `rope_theta` or those of RoPE "dynamic" for `prompt_len`, are float32 in ``rope_param.base`` with type 3.

        Raises
        ------
        NotImplementedError
            What the struct cannot say: fp8 policies, RoPE "longrope", style "neox", sections and positions of RoPE,
            `rope_theta` with "linear", "yarn" or "llama3", sinks, ``causal=False``, ``invariant=True``, contiguous
            shards, and arrays that are not contiguous (q, k and v: not slices of one).
        """
        from .pod import pod

        return pod(self)
