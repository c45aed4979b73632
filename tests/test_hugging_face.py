# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face models in every weight format, and models rounded in memory, against float64 forwards."""

import dataclasses
import functools
import json

import hugging_face_folder as writer
import llama_float64
import numpy as np
import pytest
from hugging_face_folder import to_halves, write_folder, write_tokenizer
from llama_float64 import PROMPTS, smollm2_path
from typer.testing import CliRunner

from cupyattn.cli import app
from cupyattn.models import GGUF, SMOLLM2_135M, Llama, ModelError
from cupyattn.models.config import config_from, config_from_hugging_face
from cupyattn.models.hugging_face import HuggingFaceTensors
from cupyattn.models.tokenizer import Tokenizer
from cupyattn.quant.quantize import quantize

SMALL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "hidden_act": "silu"}
LAYERS = 2   # of SmolLM2 in the tests that are not `full`


# ---- a small random model in every format

def small_weights(tied=False):
    rng, c = np.random.default_rng(3), SMALL
    hidden, kv = c["hidden_size"], c["hidden_size"] * c["num_key_value_heads"] // c["num_attention_heads"]
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
              "attn_output": (hidden, hidden), "ffn_gate": (c["intermediate_size"], hidden),
              "ffn_up": (c["intermediate_size"], hidden), "ffn_down": (hidden, c["intermediate_size"])}
    matrix = lambda rows, columns: rng.standard_normal((rows, columns)) / np.sqrt(columns)  # noqa: E731
    weights = {"token_embd": matrix(c["vocab_size"], hidden) * (2 if tied else 8),
               "output": matrix(c["vocab_size"], hidden), "output_norm": rng.uniform(0.5, 1.5, hidden)}
    for n in range(c["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{n}.{name}"] = rng.uniform(0.5, 1.5, hidden)
        for name, shape in shapes.items():
            weights[f"blk.{n}.{name}"] = matrix(*shape) * (3 if name in ("attn_q", "attn_k") else 1)
    return weights


def forward(prompts, weights, config=SMALL, biases=None, stretch=1.0):
    """Of a model in Hugging Face's order."""
    return llama_float64.forward(
        prompts, lambda name: weights.get(name.removesuffix(".weight")), layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], base=config["rope_theta"],
        eps=config["rms_norm_eps"], rotate=lambda x, base: llama_float64.rotate_halves(x, base, stretch),
        bias=lambda name: (biases or {}).get(name, 0.0))


def load(folder, **options):
    """The model of a folder without a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    return Llama(config_from_hugging_face(config), HuggingFaceTensors(folder, config), **options)


def assert_logprobs(model, prompts, expected, max_error):
    for ids, want in zip(prompts, expected, strict=True):
        error = np.abs(model.logprobs(ids) - want).max()
        print(f"largest error {error:.2e}")
        assert error <= max_error


IDS = [[7, 300, 9, 11, 2, 2, 160, 45, 31, 8, 77], [5]]


@pytest.mark.parametrize(("form", "formats"), [
    (writer.dense, {"bfloat16"}), (writer.gptq, {"gptq"}), (writer.awq, {"awq"}),
    (writer.compressed_tensors, {"compressed-tensors"}), (writer.fp8, {"fp8"}),
    *(pytest.param(form, {name}, marks=pytest.mark.full) for form, name in (
        (writer.float32, "float32"), (writer.bitsandbytes, "nf4"), (writer.mxfp4, "mxfp4"), (writer.nvfp4, "nvfp4"),
        (writer.hqq, "hqq"), (writer.exl2, "exl2")))],
    ids=lambda value: getattr(value, "__name__", ""))
def test_every_format(tmp_path, form, formats):
    weights = write_folder(tmp_path, SMALL, small_weights(), form)
    model = load(tmp_path)
    found = {linear.matrix.format for layer in model._layers for linear in (*layer.attn.qkv, layer.ffn_down)}
    assert found == formats
    assert_logprobs(model, IDS, forward(IDS, weights), 3e-2)


def test_other_formats_are_read(tmp_path):
    """The formats whose kernels the test above leaves to `full`: the matrices alone."""
    for form in (writer.float32, writer.bitsandbytes, writer.mxfp4, writer.nvfp4, writer.hqq, writer.exl2):
        folder = tmp_path / form.__name__
        folder.mkdir()
        weights = write_folder(folder, SMALL, small_weights(), form)
        tensors = HuggingFaceTensors(folder, json.loads((folder / "config.json").read_text()))
        matrix, bias = tensors.linear("blk.1.ffn_down", (128, 256))
        assert bias is None
        np.testing.assert_allclose(matrix.reconstruct(), weights["blk.1.ffn_down"], rtol=1e-6, atol=1e-7)


def test_biases_tied_head_and_stretched_rope(tmp_path):
    """Qwen2's biases of q, k and v; a head that is the embedding, though the file has another; linear scaling."""
    config = SMALL | {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False,
                      "sliding_window": 8, "rope_scaling": {"type": "linear", "factor": 2.0}}
    given, rng = small_weights(tied=True), np.random.default_rng(4)
    biases = {f"blk.{n}.attn_{name}": rng.standard_normal(size).astype(np.float16)
              for n in range(2) for name, size in (("q", 128), ("k", 64), ("v", 64))}
    weights = write_folder(tmp_path, config, given, writer.compressed_tensors, biases=biases)
    del weights["output"]
    assert_logprobs(load(tmp_path), IDS, forward(IDS, weights, config, biases, stretch=2.0), 3e-2)


def test_a_sliding_window_ends_the_context():
    assert config_from_hugging_face(SMALL | {"model_type": "mistral", "sliding_window": 32}).context_length == 32
    assert config_from_hugging_face(SMALL | {"model_type": "mistral", "sliding_window": None}).context_length == 64


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "mamba"}, "model_type must be one of llama, mistral, qwen2, got 'mamba'"),
    ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 2147483647, got 0"),
    ({"vocab_size": "many"}, "vocab_size must be an integer"), ({"hidden_size": None}, "hidden_size must be"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide the 4 heads, got 3"),
    ({"head_dim": 30}, "head_dim .* must be a multiple of 8 from 8 to 256, got 30"),
    ({"rms_norm_eps": -1}, "rms_norm_eps must be finite and at least 0, got -1"),
    ({"rope_theta": 0}, "config.json: RopeParams: base must be"),
    ({"rope_scaling": {"rope_type": "odd"}}, "RoPE of type 'odd' is not known")])
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ModelError, match=message):
        config_from_hugging_face(SMALL | change)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: t.pop("blk.1.ffn_up"), "tensor model.layers.1.mlp.up_proj.weight is missing"),
    (lambda t: t.pop("output"), "tensor lm_head.weight is missing"),
    (lambda t: t.update({"blk.2.ffn_up": t["blk.1.ffn_up"]}),
     "tensor model.layers.2.mlp.up_proj.weight is not part of the llama models"),
    (lambda t: t.update({"blk.0.attn_q": t["blk.0.attn_k"]}),
     r"layer model.layers.0.self_attn.q_proj: QMatrix: weight must have shape \[128, 128\], got \[64, 128\]"),
    (lambda t: t.update(output_norm=np.ones(64)), r"tensor model.norm.weight must be .* \[128\], got bfloat16 \[64\]")])
def test_weights_that_are_refused(tmp_path, edit, message):
    weights = small_weights()
    edit(weights)
    write_folder(tmp_path, SMALL, weights)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_biases_of_a_head_are_refused(tmp_path):
    write_folder(tmp_path, SMALL, small_weights(), biases={"output": np.ones(304, np.float32)})
    with pytest.raises(ModelError, match="tensor output.bias must be 0"):
        load(tmp_path)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}: config.json is missing"):
        Llama.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json must be JSON"):
        Llama.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(ModelError, match="holds no .safetensors file"):
        Llama.load(tmp_path)
    write_folder(tmp_path, SMALL, small_weights())
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        Llama.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer.json cannot be read"):
        Llama.load(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is truncated"):
        load(tmp_path)


# ---- SmolLM2

@functools.cache
def metadata():
    return GGUF(smollm2_path()).metadata


def gguf_tensors(layers):
    """Those of the first layers."""
    return {name: tensor for name, tensor in GGUF(smollm2_path()).tensors.items()
            if not name.startswith("blk.") or int(name.split(".")[1]) < layers}


def gguf_model(layers=LAYERS, **options):
    config = dataclasses.replace(config_from(metadata()), num_layers=layers)
    return Llama(config, gguf_tensors(layers), Tokenizer(metadata()), **options)


@functools.cache
def prompt_ids():
    tokenizer = Tokenizer(metadata())
    return [tokenizer.encode(text)[:24] for text in PROMPTS]


def write_smollm2(folder, layers=LAYERS):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "head_dim": 64,
              "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
              "rope_theta": 100000, "rope_scaling": None, "hidden_act": "silu", "tie_word_embeddings": True}
    weights = {name.removesuffix(".weight"): llama_float64.weight(name) for name in gguf_tensors(layers)}
    for name, w in weights.items():
        for part, heads in (("attn_q", 9), ("attn_k", 3)):
            if name.endswith(part):
                weights[name] = to_halves(w, heads)
    write_folder(folder, config, weights, writer.float32, embedding=writer.float32)
    write_tokenizer(folder, metadata())


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_smollm2(folder)
    yield folder
    for file in folder.iterdir():
        file.unlink()   # 140 MB


def test_smollm2_as_a_folder_is_the_gguf_file(smollm2_folder):
    """The same weights not quantized, rows of q and k in Hugging Face's order."""
    model, original = Llama.load(smollm2_folder, dtype="float32"), gguf_model(dtype="float32")
    assert model.config.rope.style == "neox" and original.config.rope.style == "interleaved"
    for ids in prompt_ids():
        error = np.abs(model.logprobs(ids) - original.logprobs(ids)).max()
        print(f"largest difference {error:.2e}")
        assert error <= 2e-4


@pytest.mark.full
def test_all_of_smollm2_as_a_folder(tmp_path):
    write_smollm2(tmp_path, SMOLLM2_135M.num_layers)
    model = Llama.load(tmp_path)
    for ids, expected in zip(prompt_ids(), llama_float64.log_probs(prompt_ids()), strict=True):
        assert np.abs(model.logprobs(ids) - expected)[np.arange(23), ids[1:]].max() <= 3e-2
    for file in tmp_path.iterdir():
        file.unlink()


def test_tokenizer_of_a_folder(smollm2_folder):
    ours, original = Tokenizer.from_folder(smollm2_folder), Tokenizer(metadata())
    assert ours.eos_ids == original.eos_ids
    for text in (*PROMPTS, "", "  two spaces, 12345\n\n\ttab", "π² — façade 🙂 \U0001F9D1\u200d\U0001F33E"):
        ids = ours.encode(text)
        assert ids == original.encode(text) and ours.decode(ids) == original.decode(ids)
    assert [ours.token_bytes(id) for id in range(49152)] == [original.token_bytes(id) for id in range(49152)]
    assert ours.token_bytes(49152 + 7) == b""


def test_tokenizer_of_sentence_piece(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "<0x0A>": 3, "<0xCF>": 4, "<0x80>": 5, "\u2581": 6, "a": 7, "b": 8,
                  "ab": 9, "\u2581ab": 10}
    backend = Backend(models.BPE(vocabulary, [("a", "b"), ("\u2581", "ab")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("ab a\nπ")
    assert ids == [0, 10, 6, 7, 3, 4, 5]
    assert tokenizer.decode(ids) == " ab a\nπ" and tokenizer.eos_ids == {1}
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="decoder of type ByteLevel, ByteFallback or Metaspace, got WordPiece"):
        Tokenizer.from_folder(tmp_path)


@functools.cache
def embedding():
    return llama_float64.weight("token_embd.weight")


def rounded(name, scheme):
    """A weight of SmolLM2, those of layers rounded to `scheme`, float64."""
    if name == "token_embd.weight":
        return embedding()
    w = llama_float64.weight(name)
    if name.startswith("blk.") and w.ndim == 2:
        return quantize(w.astype(np.float32), scheme).dequantize()
    return w


@pytest.mark.parametrize(("scheme", "layers"), [
    *((scheme, LAYERS) for scheme in ("int4-g128", "fp8", "nf4")),
    *(pytest.param(scheme, 30, marks=pytest.mark.full) for scheme in (
        "int4", "int8", "int4-g32", "int4-g128", "int4-g128-asym", "int8-g64", "int8-asym", "fp8", "fp8-block128",
        "nf4", "nf4-g32", "mxfp4", "nvfp4"))])
def test_quantize(scheme, layers):
    progress = []
    model = gguf_model(layers, quantize=scheme, progress=lambda done, total: progress.append((done, total)))
    assert progress == [(n, layers) for n in range(layers + 1)]
    assert {linear.matrix.format for layer in model._layers for linear in (*layer.attn.qkv, layer.ffn_down)} == {scheme}
    assert model._embedding.format == "q8_0"
    prompts = prompt_ids()
    expected = llama_float64.forward(prompts, lambda name: rounded(name, scheme), layers=layers, heads=9, kv_heads=3,
                                     base=100000.0, eps=1e-5)
    for ids, want in zip(prompts, expected, strict=True):
        error = np.abs(model.logprobs(ids) - want)[np.arange(len(ids) - 1), ids[1:]].max()
        print(f"{scheme}: largest error {error:.2e}")
        assert error <= 3e-2


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["int4-g128", "nf4", "mxfp4", "nvfp4"])
def test_quantize_float32(scheme):
    """Without 16-bit activations all that is left is the order of sums."""
    model, ids = gguf_model(30, quantize=scheme, dtype="float32"), prompt_ids()[2]
    (want,) = llama_float64.forward([ids], lambda name: rounded(name, scheme), layers=30, heads=9, kv_heads=3,
                                    base=100000.0, eps=1e-5)
    assert np.abs(model.logprobs(ids) - want)[np.arange(len(ids) - 1), ids[1:]].max() <= 2e-4


def test_weights_that_cannot_be_rounded(tmp_path):
    weights = small_weights()
    weights["blk.1.attn_v"][3, 5] = np.nan
    write_folder(tmp_path, SMALL, weights)
    with pytest.raises(ModelError, match="tensor blk.1.attn_v.weight: quantize: w must be finite"):
        load(tmp_path, quantize="int4-g128")


def test_the_command_line(smollm2_folder):
    result = CliRunner().invoke(app, ["generate", "The capital of France is", "--model", str(smollm2_folder),
                                      "--quantize", "int4-g128", "--max-new-tokens", "6", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    assert "quantizing layers to int4-g128" in result.stderr
    (expected,) = gguf_model(quantize="int4-g128").generate(["The capital of France is"], max_new_tokens=6)
    found = json.loads(result.stdout)
    assert found["prompt_ids"] == expected.prompt_ids
    assert [token["id"] for token in found["tokens"]] == [token.id for token in expected.tokens]
    assert found["text"] == expected.text


@pytest.mark.parametrize(("scheme", "message"), [
    ("int5", "cupyattn: error: --quantize must be one of int4, int8, .*, got 'int5'"),
    ("int4-g100", "cupyattn: error: --quantize must have groups of a multiple of 16 columns, got 'int4-g100'")])
def test_schemes_that_are_refused(scheme, message):
    import re

    result = CliRunner().invoke(app, ["generate", "x", "--quantize", scheme])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(message, result.stderr.strip())
