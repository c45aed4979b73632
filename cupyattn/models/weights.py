# SPDX-License-Identifier: Apache-2.0
"""Weights of a model by their GGUF names: taken from a file's tensors, quantized, put together; or made up."""

from typing import NamedTuple

import numpy as np

from ..ops.quant_gemm import quant_gemm
from ..quant import QMatrix
from ..quant.quantize import check_scheme
from .gguf import ModelError, Tensor


class GGUFTensors:
    """What `Weights` takes weights from: a table of Tensors by GGUF names, with or without ``.weight``."""

    def __init__(self, tensors):
        self._left = dict(tensors)

    def __contains__(self, name):
        return name + ".weight" in self._left

    def _take(self, name, shape):
        tensor = self._left.pop(name + ".weight", None)
        if tensor is None:
            raise ModelError(f"tensor {name}.weight is missing")
        if tensor.shape != shape:
            raise ModelError(f"tensor {name}.weight must have shape {list(shape)}, got {list(tensor.shape)}")
        return tensor

    def vector(self, name, size):
        """float32 [size], NumPy."""
        tensor = self._take(name, (size,))
        if tensor.type != "F32":
            raise ModelError(f"tensor {name}.weight must be F32, got {tensor.type}")
        return tensor.data.view(np.float32)

    def linear(self, name, shape):
        """(QMatrix on the host, bias float32 [rows] or None)."""
        tensor = self._take(name, shape)
        try:
            return QMatrix.from_gguf(tensor.data, tensor.type, tensor.shape, xp=np), None
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"tensor {name}.weight: {error}") from None

    def unused(self):
        """Names that nobody took: a bias left out would change every result."""
        return list(self._left)


class Linear(NamedTuple):
    """y = x @ matrixᵀ + bias."""

    matrix: QMatrix
    bias: object  # float32 [rows], or None

    def __call__(self, x, out, accumulate=False):
        return quant_gemm(x, self.matrix, bias=self.bias, accumulate=accumulate, out=out)


class Weights:
    """Takes weights out of a file's tensors and makes of them what a model computes with.

    Parameters
    ----------
    tensors : dict of str to Tensor, or an object like GGUFTensors
    xp : numpy or cupy
    scheme : str, optional
        What linear layers are rounded to, see `QMatrix.quantize`.
    """

    def __init__(self, tensors, xp, scheme=None):
        self._tensors = GGUFTensors(tensors) if isinstance(tensors, dict) else tensors
        self._xp, self._scheme = xp, scheme
        if scheme is not None:
            check_scheme(scheme)

    def has(self, name):
        """Whether there is such a weight."""
        return name in self._tensors

    def vector(self, name, size):
        """float32 [size]."""
        return self._xp.asarray(self._tensors.vector(name, size))

    def matrix(self, name, rows, columns):
        """QMatrix [rows, columns] as the file has it."""
        matrix, bias = self._tensors.linear(name, (rows, columns))
        if bias is not None:
            raise ModelError(f"tensor {name}.bias must be 0, got another: this model has none")
        return matrix.to(self._xp)

    def linear(self, name, rows, columns):
        """Linear of [rows, columns]."""
        (linear,) = self.stacked(columns, {name: rows})
        return linear

    def stacked(self, columns, rows_of):
        """One Linear of all rows, or one for each name where they cannot be one matrix."""
        matrices, biases = zip(*(self.projection(name, rows, columns) for name, rows in rows_of.items()), strict=True)
        try:
            joined = [QMatrix.concat(matrices)]
        except ValueError:   # other formats or orders of columns, or rows that do not fill tiles
            joined = matrices
        if len(joined) == 1 and any(bias is not None for bias in biases):
            biases = [np.concatenate([np.zeros(matrix.shape[0], np.float32) if bias is None else bias
                                      for matrix, bias in zip(matrices, biases, strict=True)])]
        return [Linear(matrix.to(self._xp), None if bias is None else self._xp.asarray(bias))
                for matrix, bias in zip(joined, biases, strict=False)]

    def projection(self, name, rows, columns):
        """(QMatrix [rows, columns], rounded to the scheme; float32 bias or None), on the host."""
        matrix, bias = self._tensors.linear(name, (rows, columns))
        if self._scheme is not None:
            try:
                matrix = QMatrix.quantize(matrix.to(self._xp).reconstruct(), self._scheme, xp=np)
            except ValueError as error:
                raise ModelError(f"tensor {name}.weight: {error}") from None
        return matrix, bias

    def check_all_used(self):
        """Raise ModelError for a tensor that was not taken."""
        if left := self._tensors.unused():
            raise ModelError(f"tensor {left[0]} is not part of the llama models this reader knows")


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
