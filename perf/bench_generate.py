# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of SmolLM2 through the kernels, beside a float32 NumPy forward on the same cores.

The NumPy side has every advantage NumPy offers: weights dequantized beforehand, keys and values cached, projections
fused, one matrix-vector product each. ``python perf/bench_generate.py`` prints the comparison; both sides take turns,
so whatever else the machine does hits both, but not alike: BLAS threads that must share cores with other processes
wait for each other, and NumPy then loses up to nine tenths of its speed. Quote figures of an idle machine only.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from cupyattn import runtime
from cupyattn.diagnosis import model_path
from cupyattn.models import GGUF, Llama
from cupyattn.runtime import cpu

PROMPT = "The capital of France is"


class NumpyLlama:
    """SmolLM2, one token at a time, every intermediate float32."""

    def __init__(self, path, config):
        from gguf import GGMLQuantizationType, dequantize
        from gguf.quants import quant_shape_to_byte_shape

        tensors = GGUF(path).tensors

        def weight(*names):
            parts = []
            for name in names:
                tensor = tensors[name + ".weight"]
                kind = GGMLQuantizationType[tensor.type]
                blocks = tensor.data.reshape(quant_shape_to_byte_shape(tensor.shape, kind))
                parts.append(dequantize(blocks, kind).reshape(tensor.shape))
            return np.concatenate(parts)

        self.config = config
        self.embedding, self.norm = weight("token_embd"), weight("output_norm")
        self.layers = []
        for n in range(config.num_layers):
            p = f"blk.{n}."
            self.layers.append((weight(p + "attn_norm"), weight(p + "attn_q", p + "attn_k", p + "attn_v"),
                                weight(p + "attn_output"), weight(p + "ffn_norm"),
                                weight(p + "ffn_gate", p + "ffn_up"), weight(p + "ffn_down")))
        self.cos, self.sin = config.rope.tables(config.context_length)

    def start(self, max_tokens):
        """Forget everything; room for `max_tokens`."""
        c = self.config
        self.k, self.v = np.empty((2, c.num_layers, c.num_kv_heads, max_tokens, c.head_dim), np.float32)
        self.length = 0

    def step(self, id):
        """Logits [vocab] after token `id`."""
        c, p = self.config, self.length
        self.length += 1
        x = self.embedding[id].copy()
        for n, (attn_norm, qkv, attn_output, ffn_norm, gate_up, ffn_down) in enumerate(self.layers):
            heads = (qkv @ self._normed(x, attn_norm)).reshape(-1, c.head_dim)
            q, k, v = np.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads])
            self.k[n, :, p], self.v[n, :, p] = self._rotated(k, p), v
            grouped = self._rotated(q, p).reshape(c.num_kv_heads, -1, c.head_dim)
            scores = grouped @ self.k[n, :, :p + 1].swapaxes(1, 2) * np.float32(c.head_dim**-0.5)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            x += attn_output @ (scores @ self.v[n, :, :p + 1]).ravel()
            gate, up = np.split(gate_up @ self._normed(x, ffn_norm), 2)
            x += ffn_down @ (gate / (1 + np.exp(-gate)) * up)
            assert {a.dtype for a in (x, heads, grouped, scores, gate, up)} == {np.dtype(np.float32)}
        return self.embedding @ self._normed(x, self.norm)

    def _normed(self, x, gain):
        return x / np.sqrt(np.mean(x * x) + np.float32(self.config.rms_eps)) * gain

    def _rotated(self, x, p):
        even, odd, out = x[:, 0::2], x[:, 1::2], np.empty_like(x)
        out[:, 0::2] = even * self.cos[p] - odd * self.sin[p]
        out[:, 1::2] = odd * self.cos[p] + even * self.sin[p]
        return out

    def generate(self, ids, count):
        """(greedy tokens, tokens per second after the first)."""
        self.start(len(ids) + count)
        for id in ids:
            logits = self.step(id)
        tokens, begin = [int(logits.argmax())], time.perf_counter()
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1]).argmax()))
        return tokens, (count - 1) / (time.perf_counter() - begin)


def compare(dtypes=("float16", "float32"), count=48, rounds=5, workers=2):
    """NumPy and each dtype in turns, in a process whose NumPy uses as many threads as the executor.

    Returns
    -------
    dict
        "numpy" and every dtype to ``{"tokens_per_s": one per round, "ids": greedy tokens}``.
    """
    # a BLAS reads its number of threads when it is loaded
    threads = {f"{name}_NUM_THREADS": str(workers) for name in ("OPENBLAS", "OMP", "MKL")}
    options = {"dtypes": dtypes, "count": count, "rounds": rounds, "workers": workers}
    done = subprocess.run([sys.executable, __file__, "--measure", json.dumps(options)], env={**os.environ, **threads},
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(dtypes, count, rounds, workers):
    """What `compare` returns, measured in this process."""
    path = model_path()
    models = {dtype: Llama.load(path, dtype=dtype) for dtype in dtypes}
    baseline = NumpyLlama(path, next(iter(models.values())).config)
    ids = next(iter(models.values())).tokenizer.encode(PROMPT)
    found = {name: {"tokens_per_s": []} for name in ("numpy", *dtypes)}

    def keep(name, tokens, speed):
        found[name]["ids"] = tokens
        found[name]["tokens_per_s"].append(speed)

    with cpu.settings(workers=workers):
        for model in models.values():
            model.generate([ids], max_new_tokens=2)
        baseline.generate(ids, 2)
        for _ in range(rounds):
            keep("numpy", *baseline.generate(ids, count))
            for dtype, model in models.items():
                (completion,) = model.generate([ids], max_new_tokens=count, ignore_eos=True)
                keep(dtype, [token.id for token in completion.tokens], completion.tokens_per_s)
    return found


def bench_generate():
    """The same tokens from both sides; the times are printed by running this file."""
    found = compare(dtypes=("float32",), count=12, rounds=1)
    assert found["float32"]["ids"] == found["numpy"]["ids"]


def main():
    """Print the comparison and where the time goes."""
    found = compare()
    speeds = {name: statistics.median(result["tokens_per_s"]) for name, result in found.items()}
    for name, speed in speeds.items():
        print(f"{name:<10}{speed:8.1f} tokens/s   {speed / speeds['numpy']:5.2f} x NumPy float32   "
              f"{'same tokens' if found[name]['ids'] == found['numpy']['ids'] else 'other tokens'}")
    model = Llama.load(model_path(), dtype="float16")
    model.generate([PROMPT], max_new_tokens=2)
    with runtime.profiling() as profile:
        begin = time.perf_counter()
        model.generate([PROMPT], max_new_tokens=48, ignore_eos=True)
        seconds = time.perf_counter() - begin
    rows = profile.rows()
    for name, launches, spent in [*rows, ("host", 0, seconds - sum(row[2] for row in rows))]:
        print(f"  {name:<16}{launches:6} launches {spent:8.3f} s {spent / seconds:6.1%}")
    print(f"cpu executor, {os.process_cpu_count() if hasattr(os, 'process_cpu_count') else os.cpu_count()} cores")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        json.dump(measure(**json.loads(sys.argv[2])), sys.stdout)
    else:
        main()
