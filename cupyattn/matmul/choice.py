# SPDX-License-Identifier: Apache-2.0
"""Which kernel quant_gemm runs, by format, tokens M, sizes N and K, and device.

    device              format, x                    M           kernel, and the rows of x of a block
    GPU from sm_80 on   x float16 or bfloat16,       1 to 8      stream (K1), 8: the time of the packed bytes
                        weights coded or of x's type 9 to F - 1  pipelined (K2), 16, 32 or 64: the smallest that holds M
                                                     F and more  BLAS (K3): chunks of the weight, then a dense product
    GPU                 x or weights float32, other  1 to 64     CUDA cores, 1, 2, 4 or 8
                        types mixed, older GPUs      65 and more BLAS
    CPU                 all                          all         CUDA cores, 1, 2, 4 or 8; with BLAS asked for by
                                                                 runtime.cpu.settings(blas=True) that from 128 on

F = `fused_until(bits per weight)`: 253 with 4 bits. Where BLAS is not installed or would round too much
(`blas_objection`), K2 or CUDA cores serve every M. N and K decide how columns are cut (``matmul_plans.partition``), and
on the CPU N decides the rows of a block (``matmul_plans.core_tile``).

`cupyattn.tune` measures `candidates` and keeps what is faster here (``matmul_tuning.py``): tiles, warps, stages and,
above INVARIANT_TOKENS, whether BLAS multiplies.

Up to `INVARIANT_TOKENS` tokens BLAS is never used: kernels share one order of additions, so a row of out has the same
bits whatever stands around it, and whichever candidate is taken.

The model behind `fused_until`. A fused kernel takes max(b / BW, 2 M / F1) seconds a weight, b its packed bytes;
dequantizing adds b, and 2 bytes written and 2 read, before a product at the full rate: (b + 4) / BW + 2 M / F. So BLAS
is ahead from

    M = (b + 4) / BW / (2 / F1 - 2 / F) = (b + 4) * (F / BW) / (2 * (F / F1 - 1))

on, with F = 790 TFLOP/s and BW = 4.3 TB/s measured on an H200 and F1 = 300 TFLOP/s as expected of fused mma.sync:
253 tokens with 4 bits, 282 with 8. Other GPUs have about these ratios. A GPU's CUDA cores are so far from BLAS that
INVARIANT_TOKENS is what counts. On the CPU BLAS must be asked for, by runtime.cpu.settings(blas=True),
and begins at _HOST_TOKENS: it takes 0.6 to 0.95 of the executor's time in CPU seconds, but its threads wait for each
other, and where they share cores with other work 128 to 512 tokens take 2 to 10 times as long (measured on two cores).

What BLAS may round: weights, to the type of x. The error of out stays within its bound (relative Frobenius 3e-4 for
float16, 1e-5 for float32) where that is exact or float16 from float16 scales; all else is left to the fused kernels.
With float16 scales two roundings of one size meet, of the weights and of out: 2.9e-4 to 3.01e-4 was measured.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from .plans import IN_FLIGHT_BYTES, SHARED_BYTES, core_tile, in_flight, shape_as, shape_for, token_tile

INVARIANT_TOKENS = 64
_HOST_TOKENS = 128
_FLOPS, _FUSED_FLOPS, _BYTES_PER_SECOND = 790e12, 300e12, 4.3e12


class Choice(NamedTuple):
    """What a kernel is launched with; of "blas" nothing but the name."""

    kernel: str          # "mma", "core" or "blas"
    m_tile: int = 0      # rows of x per block
    row_tiles: int = 0   # row tiles of the weight, of a warp with "mma", of a block with "core"
    warps: int = 0       # with "mma": of a block
    stages: int = 0      # with "mma": tiles of a ring, fewer where they do not fit

    def __str__(self):
        return self.kernel if self.kernel == "blas" else " ".join(
            f"{name}={value}" if name != "kernel" else value for name, value in self._asdict().items() if value)


def bucket(tokens):
    """The number of tokens that stands for `tokens`: 1, 4, 8, 16, 32, 64, 128 and so on, the next above."""
    return 1 if tokens <= 1 else max(4, 1 << (tokens - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def candidates(geometry, tokens, version, arch, blas):
    """At most 8 Choices for a number of tokens, the written heuristic's first.

    Parameters
    ----------
    geometry : tuple
        ``QMatrix.geometry``.
    tokens : int
    version : str
        The kernel for it, "mma" or "core".
    arch : str
    blas : bool
        Whether BLAS could multiply; not listed up to INVARIANT_TOKENS.
    """
    found = {}   # what is launched: Choice, the first of its kind
    if version == "mma":
        forms, m_tile = [form for form, *_ in geometry], token_tile(tokens)
        row_tiles, warps, stages, _ = shape_for(forms[0], m_tile, forms)
        shapes = [(m_tile, row_tiles, warps, stages)]
        if m_tile == 8:   # a block has a warp for each of eight chunks; the rest is how much it has on its way
            shapes += [(8, rows, 8, deep) for rows, deep in ((2, 12), (1, 12), (4, 12), (2, 4), (4, 2), (2, 2))]
            shapes += [(16, 1, 8, 12)]
        else:
            shapes += [(m_tile, rows, wide, 12) for rows, wide in ((1, 8), (2, 4), (1, 4), (2, 8))
                       if rows * wide * m_tile <= 512]
            shapes += [(m_tile, row_tiles, warps, 4), (8, 4, 8, 3) if m_tile == 16 else (m_tile // 2, 1, 8, 12)]
        for shape in shapes:
            choice = Choice("mma", *shape)
            launched = [shape_as(form, choice) for form in forms]
            if not found or all(map(functools.partial(_fits, choice.m_tile), forms, launched)):
                found.setdefault((choice.m_tile, launched[0]), choice)
    else:
        m_tile, row_tiles = core_tile(tokens, geometry[0][1], arch)
        shapes = [(m_tile, row_tiles)]
        for m in (m_tile, m_tile // 2):
            if m:
                shapes += [(m, n) for n in ((32, 16, 8, 4) if arch == "cpu" else (1,)) if n * m <= 64]
        for shape in shapes:
            found.setdefault(shape, Choice("core", *shape))
    kernels = list(found.values())
    if not blas or tokens <= INVARIANT_TOKENS:
        return tuple(kernels[:8])
    bits = sum(form.bits_per_weight for form, *_ in geometry) / len(geometry)
    first = tokens >= blas_from(bits, version, arch)
    return (Choice("blas"), *kernels[:7]) if first else (*kernels[:7], Choice("blas"))


def _fits(m_tile, form, shape):
    """Whether a tuned kernel keeps the contract of quant_gemm_mma.cuh: its shared memory, and a stream's bytes."""
    return shape[-1] <= SHARED_BYTES and (m_tile > 8 or in_flight(form, *shape[:3]) >= IN_FLIGHT_BYTES)


@dataclass(frozen=True)
class Product:
    """What is asked of quant_gemm, without arrays; types are dtype names.

    Attributes
    ----------
    forms : tuple of Form
        Of the weight's segments.
    tokens : int
    x, out : str
    bias, accumulate : bool
    x_align, out_align : int
        Bytes that divide rows and base, up to 16; 0 where rows overlap or run backwards.
    """

    forms: tuple
    tokens: int
    x: str
    out: str
    bias: bool
    accumulate: bool
    x_align: int
    out_align: int


def fused_until(bits_per_weight):
    """Tokens from which on dequantizing and BLAS are ahead of tensor cores fed by packed weights."""
    return int((bits_per_weight / 8 + 4) * _FLOPS / _BYTES_PER_SECOND / (2 * (_FLOPS / _FUSED_FLOPS - 1)))


@functools.lru_cache(maxsize=4096)
def blas_objection(product, arch, installed):
    """Why `product` cannot be left to BLAS, or None."""
    if not installed:
        return "not in the executor's settings" if arch == "cpu" else "no cuBLAS installed"
    if arch == "cpu":
        return None   # weights, x and sums are float32
    if product.bias and product.accumulate:
        return "bias and accumulate together would round twice"
    for name, align in (("x", product.x_align), ("out", product.out_align)):
        if align < 16:
            return f"rows of {name} are not apart and aligned to 16 bytes"
    exact = all(_exact(form, product.x) for form in product.forms)
    if product.out != product.x and not (exact and product.out == "float32"):
        return f"cuBLAS makes no {product.out} from {product.x}" if product.out != "float32" else \
               "float32 sums of rounded weights"
    if not exact and not (product.x == "float16" and all(_from_float16(form) for form in product.forms)):
        return f"weights rounded to {product.x} cost too much"
    return None


def _exact(form, x):
    """Whether every weight is a number of type `x`."""
    powers_of_two = (form.kind, form.scale) == ("e2m1", "float8_e8m0fnu")
    return x == "float32" or form.kind == x or (x == "bfloat16" and powers_of_two)


def _from_float16(form):
    """Whether weights are about as large as float16 numbers, so that rounding to float16 is a matter of 2^-11."""
    return form.kind == "int" and "float16" in (form.scale, form.super_scale) and form.scale != "float8_e4m3fn"


def blas_from(bits_per_weight, version, arch):
    """Tokens from which on BLAS multiplies instead of kernel `version`, where it can."""
    if version == "mma":
        return fused_until(bits_per_weight)
    return _HOST_TOKENS if arch == "cpu" else INVARIANT_TOKENS + 1


def by_blas(product, version, arch, installed, choice=None):
    """(Whether BLAS multiplies, why) by the model above, for more than INVARIANT_TOKENS tokens.

    `version` is the fused kernel's: "mma" or "core"; `installed` whether a BLAS may be used for `arch`; `choice` the
    tuned Choice, if there is one.
    """
    objection = blas_objection(product, arch, installed)
    if objection is not None:
        return False, f"not by BLAS: {objection}"
    if choice is not None:
        return choice.kernel == "blas", "not by BLAS: tuned"
    first = blas_from(sum(form.bits_per_weight for form in product.forms) / len(product.forms), version, arch)
    return product.tokens >= first, f"BLAS from {first} tokens on"
