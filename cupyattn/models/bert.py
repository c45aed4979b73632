# SPDX-License-Identifier: Apache-2.0
"""A BERT encoder of sentences, whose every operation but GELU is one of our kernels.

Texts of any lengths are packed one after another, so no padding is computed:

    x = layer_norm(words[ids] + places[positions])
    per layer:  x = layer_norm(x + attention(x @ Wqkv) @ Wo);  x = layer_norm(x + gelu(x @ Wup) @ Wdown)
    embedding of a text = the mean of its rows of x, divided by its length as a vector
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import QMatrix, attention, layer_norm, rms_norm, schedule
from .. import embedding as rows_of
from ..quant import Safetensors
from ..quant.checkpoint import read_json
from ..runtime.arrays import dtype_of
from .gguf import ModelError
from .hugging_face import read_config
from .tokenizer import read_tokenizer
from .weights import Linear

_BATCH_TOKENS = 4096   # encoded at once
_SUPPORTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class _Layer(NamedTuple):
    qkv: Linear
    out: Linear
    attn_norm: tuple   # weight, bias
    up: Linear
    down: Linear
    ffn_norm: tuple


def _gelu(xp, x):
    """x Φ(x), where Φ(x) = (1 + erf(x / √2)) / 2 by formula 7.1.26 of Abramowitz and Stegun, within 1e-7."""
    t = 1 / (1 + 0.3275911 * 2**-0.5 * abs(x))
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= xp.exp(-0.5 * x * x)                             # Φ(-|x|)
    return x * xp.where(x < 0, tail, 1 - tail)


class Bert:
    """A sentence encoder of the BERT family on NumPy (CPU executor) or CuPy (GPU) arrays.

    Parameters
    ----------
    config : dict
        Its config.json.
    tensors : mapping of str to ndarray
        Weights by the names Hugging Face gives them; the pooler's are not used.
    tokenizer : tokenizers.Tokenizer, optional
        Needed for `encode`. Cuts texts to the length the model is for.
    dtype : str
        Of matrices and activations: "float32", "float16" or "bfloat16". What layers add to is always float32.
    xp : numpy or cupy, optional
        Default NumPy.

    Raises
    ------
    ModelError
        Another kind of model, or tensors that are missing or misshapen.
    """

    def __init__(self, config, tensors, tokenizer=None, *, dtype="float32", xp=np):
        for name, supported in _SUPPORTED.items():
            if config.get(name, "absolute" if name == "position_embedding_type" else None) != supported:
                raise ModelError(f"config.json: {name} must be {supported}, got {config.get(name)!r}")
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                 "max_position_embeddings", "vocab_size", "type_vocab_size")
        for name in sizes:
            if not isinstance(config.get(name), int) or config[name] < 1:
                raise ModelError(f"config.json: {name} must be a positive integer, got {config.get(name)!r}")
        self.hidden_size, wide, self._heads, layers, self.max_tokens, words, types = (config[name] for name in sizes)
        if self.hidden_size % (8 * self._heads):
            raise ModelError(f"config.json: hidden_size must be a multiple of 8 for each of the {self._heads} heads, "
                             f"got {self.hidden_size}")
        self.xp, self.dtype, self.tokenizer = xp, dtype_of(dtype), tokenizer
        self._eps, self._tensors, hidden = config.get("layer_norm_eps", 1e-12), tensors, self.hidden_size
        self._words = xp.asarray(self._tensor("embeddings.word_embeddings.weight", words, hidden))
        # all tokens are of the first type
        self._places = xp.asarray(self._tensor("embeddings.position_embeddings.weight", self.max_tokens, hidden)
                                  + self._tensor("embeddings.token_type_embeddings.weight", types, hidden)[0])
        self._norm = self._layer_norm("embeddings")
        self._layers = []
        for layer in (f"encoder.layer.{n}." for n in range(layers)):
            self._layers.append(_Layer(
                self._linear(hidden, hidden, *(f"{layer}attention.self.{name}" for name in ("query", "key", "value"))),
                self._linear(hidden, hidden, layer + "attention.output.dense"),
                self._layer_norm(layer + "attention.output"),
                self._linear(wide, hidden, layer + "intermediate.dense"),
                self._linear(hidden, wide, layer + "output.dense"),
                self._layer_norm(layer + "output")))
        del self._tensors
        self._unit = xp.full(hidden, hidden**-0.5, np.float32)   # rms_norm with it makes vectors of length 1

    def _tensor(self, name, *shape):
        array = self._tensors.get(name)
        if array is None or array.shape != shape:
            raise ModelError(f"tensor {name} must have shape {list(shape)}, got "
                             f"{'none' if array is None else list(array.shape)}")
        return array.astype(np.float32)

    def _layer_norm(self, name):
        return tuple(self.xp.asarray(self._tensor(f"{name}.LayerNorm.{part}", self.hidden_size))
                     for part in ("weight", "bias"))

    def _linear(self, rows, columns, *names):
        """One Linear of the rows of all names."""
        weight = np.concatenate([self._tensor(name + ".weight", rows, columns) for name in names])
        bias = np.concatenate([self._tensor(name + ".bias", rows) for name in names])
        return Linear(QMatrix.from_dense(weight.astype(self.dtype), xp=self.xp), self.xp.asarray(bias))

    @classmethod
    def load(cls, path, *, dtype="float32", xp=np):
        """Load a model and its tokenizer.

        Parameters
        ----------
        path : str or Path
            The folder of a Hugging Face model: config.json, model.safetensors and tokenizer.json, and perhaps the files
            of sentence-transformers.
        dtype, xp
            See `Bert`.

        Raises
        ------
        ModelError
            Not a usable folder, another kind of model, or one whose embeddings are not the mean of its tokens.
        OSError
            A file cannot be read.
        """
        path = Path(path)
        try:
            config, tokenizer, pooling = read_config(path), read_tokenizer(path), path / "1_Pooling" / "config.json"
            if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens"):
                raise ModelError(f"{pooling.relative_to(path)}: pooling_mode_mean_tokens must be true")
            model = cls(config, Safetensors(path), tokenizer, dtype=dtype, xp=xp)
            limits = path / "sentence_bert_config.json"
            limit = read_json(limits).get("max_seq_length") if limits.is_file() else None
        except (ModelError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from None
        tokenizer.enable_truncation(min(limit or model.max_tokens, model.max_tokens))
        return model

    def encode(self, texts):
        """Embeddings of texts: their dot products are cosines.

        Parameters
        ----------
        texts : list of str
            What is longer than the model is for is cut.

        Returns
        -------
        ndarray [len(texts), hidden_size], float32, of length 1 each
        """
        if isinstance(texts, str):
            raise TypeError("encode: texts must be a list of str, got a str")
        ids = [np.int32(found.ids) for found in self.tokenizer.encode_batch(list(texts))]
        out = self.xp.empty((len(ids), self.hidden_size), np.float32)
        begin = tokens = 0
        for end in range(1, len(ids) + 1):
            tokens += len(ids[end - 1])
            if end == len(ids) or tokens + len(ids[end]) > _BATCH_TOKENS:
                lengths = [len(text) for text in ids[begin:end]]
                hidden = self.forward(self.xp.asarray(np.concatenate(ids[begin:end])), lengths)
                rms_norm(self._means(hidden, lengths), self._unit, eps=0.0, out=out[begin:end])
                begin, tokens = end, 0
        return out

    def forward(self, ids, lengths, *, mask=None):
        """Hidden states of packed texts.

        Parameters
        ----------
        ids : ndarray [tokens], int32
            Token ids of all texts, one after another.
        lengths : sequence of int
            Tokens of each text, at most ``max_tokens``.
        mask : ndarray, optional
            As `cupyattn.attention` takes it: bool [texts, 1, 1, most tokens] for texts that are padded.

        Returns
        -------
        ndarray [tokens, hidden_size], float32
        """
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        x = rows_of(ids, self._words)                                   # [tokens, hidden_size], what layers add to
        x += rows_of(self.xp.asarray(positions), self._places)
        layer_norm(x, *self._norm, eps=self._eps, out=x)
        step = schedule(np.diff(starts), num_heads=self._heads, num_kv_heads=self._heads,
                        head_dim=self.hidden_size // self._heads, cu_seqlens_q=starts, causal=False,
                        dtype=self.dtype.name, invariant=True, one_list=True, xp=self.xp)
        starts = self.xp.asarray(starts)
        # invariant: what a text gets does not depend on the texts beside it
        options = dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_q_len=max(lengths), causal=False, mask=mask,
                       schedule=step, invariant=True)
        for layer in self._layers:
            h = self._project(layer.qkv, x.astype(self.dtype, copy=False))
            h = attention(*(h[:, n * self.hidden_size:][:, :self.hidden_size].reshape(len(x), self._heads, -1)
                            for n in range(3)), **options)
            layer.out(h.reshape(x.shape), x, accumulate=True)
            layer_norm(x, *layer.attn_norm, eps=self._eps, out=x)
            h = self._project(layer.up, x.astype(self.dtype, copy=False), np.float32)
            layer.down(_gelu(self.xp, h).astype(self.dtype, copy=False), x, accumulate=True)
            layer_norm(x, *layer.ffn_norm, eps=self._eps, out=x)
        return x

    def _project(self, linear, x, dtype=None):
        return linear(x, self.xp.empty((len(x), linear.matrix.shape[0]), dtype or self.dtype))

    def _means(self, hidden, lengths):
        """[texts, hidden_size]: attention of a query of zeros weighs all tokens alike."""
        values = hidden.reshape(len(hidden), self._heads, -1)
        zeros = self.xp.zeros((len(lengths), *values.shape[1:]), np.float32)
        starts = [self.xp.asarray(np.cumsum([0, *counts], dtype=np.int32)) for counts in ([1] * len(lengths), lengths)]
        return attention(zeros, values, values, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], causal=False,
                         max_q_len=1, invariant=True).reshape(len(lengths), -1)
