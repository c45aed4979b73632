# SPDX-License-Identifier: Apache-2.0
"""A Llama decoder whose every operation is one of our kernels.

The residual stream is float32 (SmolLM2's reaches 27,000), to which the output and down projections add; everything
between is in the model's dtype. A step feeds ``batch`` sequences ``q_len`` tokens each:

    x = embedding(ids)
    per layer:  QAttn.forward(x);  h = rms_norm(x);  x += silu_mul(h @ Wgate, h @ Wup) @ Wdown
    logits = rms_norm(x) @ Whead
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import PagedCache, QAttn, embedding, page_move, quant_gemm, rms_norm, runtime, silu_mul
from ..kv.formats import FORMATS
from ..runtime.arrays import dtype_of
from ..runtime.checks import FLOATS
from .config import config_from, config_from_hugging_face
from .gguf import GGUF, ModelError
from .weights import Weights, random_tensors

PREFILL_CHUNK = 256  # tokens of a prompt fed at once
STATIC_SCALES = {"int8_symmetric": "head", "int8_channel": "channel"}  # KV formats whose scales come before the tokens
_MARGIN = 1.5  # of those scales over what the calibration text needs
_TOO_LARGE = ("too big", "dimension", "must be an int32")   # what NumPy, CuPy and PagedCache say of sizes
_CALIBRATION = """The old lighthouse keeper counted 37 ships before dawn; "none of them," he wrote, "were ours."
def area(r): return 3.14159 * r ** 2  # square metres. Water boils at 100 degrees; the year 1969, $4.50, and 12:30.
In French, le chat est sur la table. Why? Because light travels faster than sound. First, mix flour, eggs and milk."""


class _Layer(NamedTuple):
    attn: QAttn
    ffn_norm: object
    gate_up: list  # Linear of [gate; up] rows, or one each where their formats differ
    ffn_down: object


def kv_formats(name):
    """(format of K, format of V) from ``"int8"`` or ``"hadamard8/hadamard4"``."""
    formats = tuple(name.split("/"))
    formats = formats * 2 if len(formats) == 1 else formats
    plain = [f for f in formats if f in FLOATS]
    if len(formats) != 2 or any(f not in FLOATS and f not in FORMATS for f in formats) or (
            plain and formats[0] != formats[1]):
        raise ValueError(f"Llama: kv_dtype must be one of {', '.join((*FLOATS, *FORMATS))}, or two of the latter "
                         f"{len(FORMATS)} as K/V, got {name!r}")
    return formats


class Llama:
    """A Llama-family model on NumPy (CPU executor) or CuPy (GPU) arrays.

    Parameters
    ----------
    config : LlamaConfig
    tensors : dict of str to Tensor, or HuggingFaceTensors
        Weights by their GGUF names; without ``output.weight`` the head is the embedding. A name that is not used is
        an error, so no bias or scale is silently dropped.
    tokenizer : Tokenizer, optional
        Needed only for prompts given as text, and to give texts back.
    dtype : str
        Of activations: "float16", "bfloat16" or "float32".
    kv_dtype : str, optional
        Of the KV cache: one of these, a format of `QuantizedKV`, or two formats as "hadamard8/hadamard4" for keys and
        values. Default `dtype`. Formats whose scales must be known in advance take them from a fixed text, run once
        when a cache is first made.
    xp : numpy or cupy, optional
        Default NumPy.
    quantize : str, optional
        Round the matrices of all layers to this scheme of `QMatrix.quantize`, whatever they are: the projections of
        attention and the feed-forward's. Embedding, head and norms stay as they are.
    progress : callable, optional
        ``progress(done, total)`` at the start and after each layer.

    Raises
    ------
    ModelError
        Tensors that are missing, unknown, misshapen or of an unsupported type.
    NotImplementedError, ValueError
        `quantize` is no scheme of `QMatrix.quantize`.
    """

    def __init__(self, config, tensors, tokenizer=None, *, dtype="float16", kv_dtype=None, xp=np, quantize=None,
                 progress=None):
        self.config, self.tokenizer, self.xp = config, tokenizer, xp
        self.dtype, self.kv_formats = _dtype(dtype), kv_formats(kv_dtype or dtype)
        self._scales = None  # of static KV formats, per layer
        self._warm = set()  # (batch, q_len, page_size) of steps, page_size of copies whose kernels are compiled
        weights, c = Weights(tensors, xp, quantize), config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self._embedding = weights.matrix("token_embd", c.vocab_size, c.hidden_size)
        self._head = self._embedding
        if weights.has("output"):
            self._head = weights.matrix("output", c.vocab_size, c.hidden_size)
        self._norm = weights.vector("output_norm", c.hidden_size)
        self._layers = []
        for n in range(c.num_layers):
            if progress is not None:
                progress(n, c.num_layers)
            p = f"blk.{n}."
            self._layers.append(_Layer(
                self._attention(weights, p, q_size, kv_size),
                weights.vector(p + "ffn_norm", c.hidden_size),
                weights.stacked(c.hidden_size, {p + "ffn_gate": c.intermediate_size,
                                                p + "ffn_up": c.intermediate_size}),
                weights.linear(p + "ffn_down", c.hidden_size, c.intermediate_size)))
        if progress is not None:
            progress(c.num_layers, c.num_layers)
        weights.check_all_used()
        self._cos, self._sin = (xp.asarray(table) for table in c.rope.tables(c.context_length))

    def _attention(self, weights, prefix, q_size, kv_size):
        """QAttn of the layer whose weights begin with `prefix`."""
        c, given = self.config, {}
        for name, letter, shape in (("attn_q", "q", (q_size, c.hidden_size)), ("attn_k", "k", (kv_size, c.hidden_size)),
                                    ("attn_v", "v", (kv_size, c.hidden_size)),
                                    ("attn_output", "o", (c.hidden_size, q_size))):
            given[f"q_{letter}_proj"], given[f"{letter}_bias"] = weights.projection(prefix + name, *shape)
        return QAttn(layernorm=weights.vector(prefix + "attn_norm", c.hidden_size), norm_epsilon=c.rms_eps,
                     hidden_size=c.hidden_size, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads,
                     head_dim=c.head_dim, rope_style=c.rope.style, sincos_size=c.rope.rotary_dim, residual_fp32=True,
                     dtype=self.dtype, xp=self.xp, **given)

    @classmethod
    def load(cls, path, *, dtype="float16", kv_dtype=None, xp=np, quantize=None, progress=None):
        """Load a model and its tokenizer.

        Parameters
        ----------
        path : str or Path
            A GGUF file; or the folder of a Hugging Face model: config.json, safetensors in any format `QMatrix` reads
            (see `HuggingFaceTensors`) and tokenizer.json.
        dtype, kv_dtype, xp, quantize, progress
            See `Llama`.

        Raises
        ------
        ModelError
            Not a usable file or folder, or another architecture, tokenizer or tensor type than this model knows.
        OSError
            A file cannot be read.
        """
        options = dict(dtype=dtype, kv_dtype=kv_dtype, xp=xp, quantize=quantize, progress=progress)
        load = cls._from_folder if Path(path).is_dir() else cls._from_gguf
        try:
            return load(path, options)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    @classmethod
    def _from_gguf(cls, path, options):
        from .tokenizer import Tokenizer

        file = GGUF(path)
        return cls(config_from(file.metadata), file.tensors, Tokenizer(file.metadata), **options)

    @classmethod
    def _from_folder(cls, path, options):
        from .hugging_face import HuggingFaceTensors, read_config
        from .tokenizer import Tokenizer

        config = read_config(path)
        tensors = HuggingFaceTensors(path, config)
        return cls(config_from_hugging_face(config), tensors, Tokenizer.from_folder(path), **options)

    @property
    def matrices(self):
        """Every QMatrix that multiplies activations, for `cupyattn.tune`."""
        found = []
        for attn, _, gate_up, ffn_down in self._layers:
            found += [*(linear.matrix for linear in (*attn.qkv, *gate_up, ffn_down)), attn.o_proj]
        return [*found, self._head]

    @property
    def arch(self):
        """What the kernels run on: "cpu", or the GPU's "sm_90a" and the like."""
        return runtime.arch_of(self.xp)

    def new_cache(self, num_pages, page_size):
        """An empty PagedCache for this model; ModelError if it does not fit into memory."""
        if self._scales is None:
            self._scales = self._calibrate()
        return self._cache(num_pages, page_size, self.kv_formats, self._scales)

    def _cache(self, num_pages, page_size, formats, scales):
        c = self.config
        try:
            return PagedCache(c.num_layers, num_pages, page_size, c.num_kv_heads, c.head_dim, dtype=self.dtype.name,
                              k_format=formats[0], v_format=formats[1], scales=scales, xp=self.xp)
        except (MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, ValueError) and not any(words in str(error) for words in _TOO_LARGE):
                raise ModelError(f"the KV cache cannot be {'/'.join(self.kv_formats)}: {error}") from None
            raise ModelError(f"there is no memory for a KV cache of {num_pages} pages of {page_size} tokens; "
                             "take a smaller page_size or fewer tokens") from error

    def _calibrate(self):
        """(scales of K, scales of V) for the formats in STATIC_SCALES: lists of an array per layer, or None."""
        if not any(format in STATIC_SCALES for format in self.kv_formats):
            return None, None
        text = self.tokenizer.encode(_CALIBRATION) if self.tokenizer else range(3, self.config.vocab_size, 7)
        ids = np.fromiter(text, np.int32)[:min(PREFILL_CHUNK, self.config.context_length)]
        cache = self._cache(1, len(ids), ("float32", "float32"), (None, None))
        self.forward(self.xp.asarray(ids), cache.step([cache.pages.sequence()], len(ids)), cache)
        axes = {"head": (0, 1, 3), "channel": (0, 1)}
        return tuple(
            [_scale(layer, axes[STATIC_SCALES[format]]) for layer in side] if format in STATIC_SCALES else None
            for format, side in zip(self.kv_formats, (cache.k, cache.v), strict=True))

    def schedule(self, params, cache, out=None):
        """The Schedule of steps of `params` for all layers, see `QAttn.schedule`; `out` is filled again."""
        return self._layers[0].attn.schedule(params, cache, invariant=True, out=out)

    def forward(self, ids, params, cache, schedule=None):
        """Feed tokens and append their keys and values to the cache.

        Parameters
        ----------
        ids : ndarray [batch * q_len], int32
        params : PagedParams
            Of these tokens.
        cache : PagedCache
        schedule : Schedule, optional
            Of `schedule`, for `params` filled again.

        Returns
        -------
        hidden : ndarray [batch * q_len, hidden_size], the model's dtype
            Normalised; `logits` turns rows of it into scores.
        """
        c = self.config
        x = embedding(ids, self._embedding, out_dtype=np.float32)  # [tokens, hidden], the residual stream
        for n, layer in enumerate(self._layers):
            # invariant: what a prompt gets does not depend on the prompts beside it
            layer.attn.forward(x, params, cache, n, sin=self._sin, cos=self._cos, invariant=True,
                               schedule=schedule)
            h = rms_norm(x, layer.ffn_norm, eps=c.rms_eps, out_dtype=self.dtype)
            gate_up = self._project(h, layer.gate_up)
            act = silu_mul(gate_up[:, :c.intermediate_size], gate_up[:, c.intermediate_size:])
            layer.ffn_down(act, x, accumulate=True)
        return rms_norm(x, self._norm, eps=c.rms_eps, out_dtype=self.dtype)

    def _project(self, h, linears):
        """h @ [W0; W1; ...]ᵀ as one array [tokens, sum of rows]."""
        out = self.xp.empty((len(h), sum(linear.matrix.shape[0] for linear in linears)), self.dtype)
        begin = 0
        for linear in linears:
            end = begin + linear.matrix.shape[0]
            linear(h, out[:, begin:end])
            begin = end
        return out

    def logits(self, hidden):
        """Scores [rows, vocab_size] float32 of rows of `forward`'s result."""
        out = self.xp.empty((len(hidden), self.config.vocab_size), np.float32)
        return quant_gemm(hidden, self._head, out=out)

    def warm_up(self, prompts, *, page_size=16, share_prefix=True, progress=None):
        """Check prompts, and compile in parallel every kernel that `generate` and `logprobs` launch for them.

        Parameters
        ----------
        prompts : list of sequences of int
            Token ids.
        page_size : int
            Tokens per page of the KV cache.
        share_prefix : bool
            As for `generate`.
        progress : callable, optional
            ``progress(0, total, None)`` at the start, then ``progress(done, total, spec)`` after each kernel; not
            called at all when an earlier call has done everything.
        """
        from .generate import check_prompts, forecast

        check_prompts(self, prompts)
        wanted, needed = {}, forecast(self, prompts, 1, page_size, share_prefix)
        if needed.copies and page_size not in self._warm:
            wanted |= self._copy_kernels(page_size)
            self._warm.add(page_size)
        for batch, q_len in sorted({(1, chunk) for chunk in needed.chunks} | {(n + 1, 1) for n in range(len(prompts))}):
            if (batch, q_len, page_size) not in self._warm:  # only saves time: a launch compiles what is missing
                wanted |= self._kernels(batch, q_len, page_size)
                self._warm.add((batch, q_len, page_size))
        if wanted:
            if progress is not None:
                progress(0, len(wanted), None)
            runtime.compile_all(wanted, self.arch, progress=progress)

    def _kernels(self, batch, q_len, page_size):
        """Specialisations that one step launches."""
        cache = self.new_cache(batch * -(-q_len // page_size), page_size)
        params = cache.step([cache.pages.sequence() for _ in range(batch)], q_len)
        with runtime.recording() as recorded:
            hidden = self.forward(self.xp.zeros(batch * q_len, np.int32), params, cache)
            self.logits(hidden)
            self.logits(hidden[-1:])
            if q_len == 1:
                self.schedule(params, cache)
        return recorded

    def _copy_kernels(self, page_size):
        """Specialisations that the copy of a page launches."""
        cache, ids = self.new_cache(2, page_size), self.xp.arange(2, dtype=np.int32)
        with runtime.recording() as recorded:
            page_move([*cache.k, *cache.v], ids[:1], ids[1:])
        return recorded

    def logprobs(self, ids, *, page_size=16, progress=None):
        """Teacher-forced log-probabilities of every next token.

        Parameters
        ----------
        ids : sequence of int
            Token ids, at most the model's context.
        page_size : int
            Tokens per page of the KV cache.
        progress : callable, optional
            See `warm_up`.

        Returns
        -------
        ndarray [len(ids), vocab_size], float64, NumPy
            Row i is the natural log-softmax over the token after ``ids[:i + 1]``.
        """
        from .generate import log_softmax, prompt_rows

        self.warm_up([ids], page_size=page_size, progress=progress)
        rows = [self.logits(hidden) for hidden in prompt_rows(self, ids, page_size)]
        return np.concatenate([log_softmax(to_host(part)) for part in rows])

    def generate(self, prompts, **options):
        """Continue several prompts together; see `cupyattn.models.generate.generate` for the options.

        Parameters
        ----------
        prompts : list of str or of sequences of int
            Texts, used as they are (no chat template), or token ids.

        Returns
        -------
        list of Completion
        """
        from .generate import generate

        return generate(self, prompts, **options)


def _scale(cache, axes):
    """float32 scales with which int8 holds the values of a calibration text, and more."""
    return np.float32(_MARGIN / 127) * abs(cache).max(axis=axes)


def to_host(array):
    """`array` as NumPy; waits for the GPU."""
    return array if isinstance(array, np.ndarray) else array.get()


def _dtype(name):
    if name not in FLOATS:
        raise ValueError(f"Llama: dtype must be float16, bfloat16 or float32, got {name!r}")
    return dtype_of(name)


def random_llama(config, seed, *, dtype="float16", kv_dtype=None, xp=np):
    """A model of random Q4_1 weights (Q8_0 embedding, also the head): real shapes and kernels without a file.

    Parameters
    ----------
    config : LlamaConfig
        E.g. `SMOLLM2_135M`.
    seed : int
        Same seed, same weights, on any machine.
    dtype, kv_dtype, xp
        See `Llama`.
    """
    return Llama(config, random_tensors(config, seed), dtype=dtype, kv_dtype=kv_dtype, xp=xp)
