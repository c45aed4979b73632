# SPDX-License-Identifier: Apache-2.0
"""Attention layers of random weights and what they must compute, in float64."""

import numpy as np
from compare import dtype_of

from cupyattn import PagedCache, QAttn, QMatrix, RopeParams
from cupyattn.reference.dequantize import dequantize
from cupyattn.reference.q_attn import q_attn

MAX_POSITIONS = 128
# relative to the root mean square of what is compared: a few roundings to the dtype on the way
ERRORS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}


def contiguous(layer, batch, max_seq_len=64, layers=1, **options):
    """A cache with a page for each sequence."""
    return PagedCache.contiguous(layers, batch, max_seq_len, layer.kv_heads, layer.dim, dtype=layer.dtype,
                                 xp=layer.xp.module, **options)


class Layer:
    """A QAttn on arrays of one kind, and the same in float64.

    Parameters
    ----------
    xp : fixture
    hidden, heads, kv_heads, dim : int
    dtype : str
    formats : str or tuple of four
        Schemes of `QMatrix.quantize`, or dtypes of plain weights, for q, k, v and o.
    norm : "rms", "layer" or None
    biases, q_norm, k_norm, post : bool, (), "shared" or "heads"
    **options
        Of QAttn.
    """

    def __init__(self, xp, *, hidden=64, heads=4, kv_heads=2, dim=32, dtype="float32", formats="float32", norm="rms",
                 biases=False, head_norm=None, post=False, rope_style="neox", rotary_dim=None, seed=0, rope_base=100.0,
                 **options):
        rng = np.random.default_rng(seed)
        self.xp, self.hidden, self.heads, self.kv_heads, self.dim = xp, hidden, heads, kv_heads, dim
        self.dtype, rotary_dim = dtype, rotary_dim or dim
        formats = (formats,) * 4 if isinstance(formats, str) else formats
        shapes = {"q": (heads * dim, hidden), "k": (kv_heads * dim, hidden), "v": (kv_heads * dim, hidden),
                  "o": (hidden, heads * dim)}
        self.matrices, self.exact = {}, {}
        for (name, shape), form in zip(shapes.items(), formats, strict=True):
            w = (rng.standard_normal(shape) * (2 if name in "qk" else 1) / np.sqrt(shape[1])).astype(np.float32)
            plain = form in ("float16", "bfloat16", "float32")
            made = QMatrix.from_dense(w.astype(dtype_of(form))) if plain else QMatrix.quantize(w, form)
            self.matrices[name], self.exact[f"{name}_proj"] = made, dequantize(made)

        def gain(*shape):
            return (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32)

        self.vectors = {}
        if norm:
            self.vectors["layernorm"] = gain(hidden)
        if post:
            self.vectors["post_layernorm"] = gain(hidden)
        if norm == "layer":
            for name in list(self.vectors):
                self.vectors[f"{name}_bias"] = gain(hidden) - 1
        if biases:
            self.vectors |= {f"{n}_bias": gain(shapes[n][0]) - 1 for n in "qkvo"}
        if head_norm:
            self.vectors |= {"q_norm": gain(heads, dim), "k_norm": gain(kv_heads, dim)}
            if head_norm == "shared":
                self.vectors |= {name: self.vectors[name][0] for name in ("q_norm", "k_norm")}
        self.style = {"neox": "neox", "gptj": "interleaved", "none": None}[rope_style]
        self.cos, self.sin = RopeParams(rotary_dim=rotary_dim, base=rope_base).tables(MAX_POSITIONS)
        self.options = {"layernorm_is_rms": norm != "layer", **options}
        self.rotary_dim = rotary_dim
        self.attn = QAttn(**{f"q_{n}_proj": m for n, m in self.matrices.items()}, hidden_size=hidden, num_heads=heads,
                          num_kv_heads=kv_heads, head_dim=dim, rope_style=rope_style, sincos_size=rotary_dim,
                          dtype=dtype, xp=xp.module, **self.vectors, **self.options)
        self.tables = {} if self.style is None else {"sin": xp.array(self.sin), "cos": xp.array(self.cos)}
        self.x_dtype = dtype_of("float32" if options.get("residual_fp32") else dtype)
        self.rng = rng

    def inputs(self, batch, q_len):
        """Random x, NumPy."""
        return self.rng.standard_normal((batch, q_len, self.hidden)).astype(self.x_dtype)

    def no_past(self, batch):
        """Empty keys, or values, of each sequence."""
        return [np.zeros((0, self.kv_heads, self.dim)) for _ in range(batch)]

    def expected(self, x, keys, values, positions=None, **options):
        """What `q_attn` says; `positions` by default those after the keys."""
        batch, q_len, _ = x.shape
        if positions is None:
            positions = np.array([len(k) for k in keys])[:, None] + np.arange(q_len)
        if self.style is None:
            positions = None
        given = {k: v for k, v in self.options.items() if k not in ("residual_fp32", "max_rows", "max_seq_len")}
        options = {"sin": self.sin, "cos": self.cos} | options
        return q_attn(x, keys, values, **self.exact, num_heads=self.heads, num_kv_heads=self.kv_heads,
                      head_dim=self.dim, positions=positions, rope_style=self.style,
                      rotary_dim=self.rotary_dim, **self.vectors, **given, **options)

    def check(self, got, want, factor=1.0, what="x"):
        """Close for the layer's dtype."""
        got = self.xp.numpy(got).astype(np.float64).reshape(want.shape)
        assert np.isfinite(got).all(), f"{what} is not finite"
        scale = np.sqrt((want**2).mean())
        error = np.abs(got - want).max() / scale
        assert error <= factor * ERRORS[self.dtype], f"{what}: {error:.2e} of {scale:.2g}"
