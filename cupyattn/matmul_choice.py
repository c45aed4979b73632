# SPDX-License-Identifier: Apache-2.0
"""Which kernel quant_gemm runs for a number of tokens, by format, sizes and device.

    stream (K1)       to 8 tokens: one column tile of mma; the time of the packed bytes
    pipelined (K2)    more tokens: tiles of 16, 32 or 64 tokens, the smallest that holds them all
    CUDA cores        float32, old GPUs and the CPU: 1, 2, 4 or 8 tokens
    BLAS (K3)         `fused_until(...)` tokens and more: chunks of the weight dequantized, then a dense product

Up to `INVARIANT_TOKENS` tokens BLAS is never used: kernels share one order of additions, so a row of out has the same
bits whatever stands around it.

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
"""

import functools
from dataclasses import dataclass

INVARIANT_TOKENS = 64
_HOST_TOKENS = 128
_FLOPS, _FUSED_FLOPS, _BYTES_PER_SECOND = 790e12, 300e12, 4.3e12


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


def by_blas(product, version, arch, installed):
    """(Whether BLAS multiplies, why) by the model above, for more than INVARIANT_TOKENS tokens.

    `version` is the fused kernel's: "mma" or "core"; `installed` whether a BLAS may be used for `arch`.
    """
    objection = blas_objection(product, arch, installed)
    if objection is not None:
        return False, f"not by BLAS: {objection}"
    bits = sum(form.bits_per_weight for form in product.forms) / len(product.forms)
    first = fused_until(bits) if version == "mma" else _HOST_TOKENS if arch == "cpu" else INVARIANT_TOKENS + 1
    return product.tokens >= first, f"BLAS from {first} tokens on"
