# SPDX-License-Identifier: Apache-2.0
"""Weights of a model by their GGUF names: taken from a table of tensors, or made up."""

import numpy as np

from ..quant import QMatrix
from .gguf import ModelError, Tensor


class Weights:
    """Takes weights out of a table of tensors, checks their shapes and remembers which were taken."""

    def __init__(self, tensors, xp):
        self._left, self._xp = dict(tensors), xp

    def _take(self, name, shape):
        tensor = self._left.pop(name + ".weight", None)
        if tensor is None:
            raise ModelError(f"tensor {name}.weight is missing")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name}.weight must have shape {list(shape)}, got {list(tensor.shape)}")
        return tensor

    def vector(self, name, size):
        """float32 [size]."""
        tensor = self._take(name, (size,))
        if tensor.type != "F32":
            raise ModelError(f"tensor {name}.weight must be F32, got {tensor.type}")
        return self._xp.asarray(tensor.data.view(np.float32))

    def matrix(self, name, rows, columns):
        """QMatrix [rows, columns]."""
        return self._packed(name, rows, columns).to(self._xp)

    def _packed(self, name, rows, columns):
        """QMatrix on the host."""
        tensor = self._take(name, (rows, columns))
        try:
            return QMatrix.from_gguf(tensor.data, tensor.type, tensor.shape, xp=np)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"tensor {name}.weight: {error}") from None

    def stacked(self, columns, rows_of):
        """One QMatrix of all rows, or one for each name where their types differ or the rows do not fill tiles."""
        matrices = [self._packed(name, rows, columns) for name, rows in rows_of.items()]
        if len({m.format for m in matrices}) == 1 and all(m.shape[0] % 16 == 0 for m in matrices[:-1]):
            matrices = [QMatrix.concat(matrices)]
        return [matrix.to(self._xp) for matrix in matrices]

    def check_all_used(self):
        """Raise ModelError for a tensor that was not taken: a bias left out would change every result."""
        if self._left:
            raise ModelError(f"tensor {next(iter(self._left))} is not part of the llama models this reader knows")


def random_tensors(config, seed):
    """Tensors of a model of random weights, by name; see `cupyattn.models.random_llama`."""
    rng = np.random.default_rng(seed)
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {"attn_q": (q_size, c.hidden_size), "attn_k": (kv_size, c.hidden_size),
              "attn_v": (kv_size, c.hidden_size), "attn_output": (c.hidden_size, q_size),
              "ffn_gate": (c.intermediate_size, c.hidden_size), "ffn_up": (c.intermediate_size, c.hidden_size),
              "ffn_down": (c.hidden_size, c.intermediate_size)}
    tensors = {"token_embd.weight": _random_q8_0(rng, (c.vocab_size, c.hidden_size)),
               "output_norm.weight": _ones(c.hidden_size)}
    for n in range(c.num_layers):
        tensors |= {f"blk.{n}.{norm}.weight": _ones(c.hidden_size) for norm in ("attn_norm", "ffn_norm")}
        tensors |= {f"blk.{n}.{name}.weight": _random_q4_1(rng, shape) for name, shape in shapes.items()}
    return tensors


def _ones(size):
    return Tensor(np.ones(size, np.float32).view(np.uint8), "F32", (size,))


def _random_q4_1(rng, shape):
    """Values uniform in ±7.5 d, where d gives them a variance of about 1 / columns."""
    blocks = np.empty(shape[0] * shape[1] // 32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
    blocks["d"] = rng.uniform(0.5, 1.5, len(blocks)) / (4.6 * np.sqrt(shape[1]))
    blocks["m"] = -7.5 * blocks["d"].astype(np.float32)
    blocks["q"] = rng.integers(0, 256, (len(blocks), 16), np.uint8)
    return Tensor(blocks.view(np.uint8), "Q4_1", shape)


def _random_q8_0(rng, shape):
    """Values uniform in ±127 d, as `_random_q4_1`."""
    blocks = np.empty(shape[0] * shape[1] // 32, [("d", "<f2"), ("q", "i1", 32)])
    blocks["d"] = rng.uniform(0.5, 1.5, len(blocks)) / (73 * np.sqrt(shape[1]))
    blocks["q"] = rng.integers(-127, 128, (len(blocks), 32), np.int8)
    return Tensor(blocks.view(np.uint8), "Q8_0", shape)
