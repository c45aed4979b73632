# SPDX-License-Identifier: Apache-2.0
"""The families of kernels behind quant_gemm, each made to take every call, whatever plans would choose.

    cores       CUDA cores
    stream      tensor cores, up to 8 tokens (K1)
    pipeline    tensor cores, more tokens (K2)
    blas        chunks of the weight dequantized for NumPy's BLAS (K3)
    cublas      the same for cuBLAS, on the CuPy stand-in; only what it may take
"""

import contextlib
import importlib
from unittest import mock

import numpy as np
from compare import assert_same_bits, dtype_of

import cupyattn
from cupyattn.matmul import blas as matmul_blas
from cupyattn.matmul import choice as matmul_choice
from cupyattn.runtime import arrival_counters
from cupyattn.runtime.cpu import settings

op = importlib.import_module("cupyattn.ops.quant_gemm")
FAMILIES = ("cores", "stream", "pipeline", "blas")
# relative Frobenius error by output type
BOUND = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 2e-3}
ALL_TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128, 257, 1024)


def error(got, want):
    """Relative Frobenius distance."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


class Family:
    """A family in force: ``product(x, matrix)``, all arrays NumPy's."""

    def __init__(self, name, xp=None):
        self.name, self.xp = name, xp
        self.launched = []     # plans and, for products of BLAS, "blas"

    @property
    def tokens(self):
        """Numbers of tokens to try."""
        return [m for m in ALL_TOKENS if (m <= 8 or self.name != "stream") and (m > 8 or self.name != "pipeline")]

    @property
    def some_tokens(self):
        return {"stream": (1, 5, 8), "pipeline": (9, 33, 65), "cores": (1, 3, 9), "blas": (1, 9, 66),
                "cublas": (9, 66)}[self.name]

    def takes(self, dtype, kinds=()):
        """Whether it multiplies x of `dtype` by weights whose codes are of these kinds."""
        return self.name in ("cores", "blas") or dtype != "float32" and all(
            kind == dtype or kind not in ("float16", "bfloat16", "float32") for kind in kinds)

    def product(self, x, matrix, dtype="float32", out=None, **options):
        """x @ W.T in an array of `dtype`, or in `out`, full of NaN before."""
        if out is None:
            out = np.full((len(x), matrix.shape[0]), np.nan, dtype_of(dtype))
        del self.launched[:]
        if self.xp is None:
            assert cupyattn.quant_gemm(x, matrix, out=out, **options) is out
            assert not arrival_counters(np, 0).any()
        else:
            options = {name: self.xp.array(value) if isinstance(value, np.ndarray) else value
                       for name, value in options.items()}
            there = self.xp.array(out)
            cupyattn.quant_gemm(self.xp.array(x), matrix.to(self.xp.module), out=there, **options)
            out[...] = self.xp.numpy(there)
        if out.size:
            self._assert_forced()
        return out

    def by_parts(self, x, matrix, dtype="float32"):
        """`product` of as many rows at a time as the family takes, at least and at most."""
        step = 8 if self.name == "stream" else len(x)
        least = 9 if self.name == "pipeline" else 1
        padded = np.concatenate([x, np.zeros((max(0, least - len(x)), x.shape[1]), x.dtype)])
        return np.concatenate([self.product(padded[at:at + step], matrix, dtype)
                               for at in range(0, len(padded), max(step, least))])[:len(x)]

    def _assert_forced(self):
        kernels = {plan if plan == "blas" else plan.spec.kernel for plan in self.launched}
        tiles = {dict(plan.spec.constants)["M_TILE"] for plan in self.launched
                 if plan != "blas" and plan.spec.kernel.endswith("_mma")}
        if self.name in ("blas", "cublas"):
            assert kernels == {"blas"}, kernels
        elif self.name == "cores":
            assert "quant_gemm" in kernels and kernels <= {"quant_gemm", "gather_columns"}, kernels
        else:
            assert "quant_gemm_mma" in kernels and kernels <= {"quant_gemm_mma", "gather_columns"}, kernels
            assert (tiles == {8}) == (self.name == "stream"), tiles


@contextlib.contextmanager
def forced(name):
    """A Family that takes every call until the end of the block."""
    with contextlib.ExitStack() as stack:
        family = Family(name)
        if name == "cublas":
            from standin import install

            family.xp = stack.enter_context(install())
        stack.enter_context(settings(blas=name == "blas"))
        launch, multiply = op.launch, matmul_blas.blas.multiply

        def launched(plan, args):
            family.launched.append(plan)
            return launch(plan, args)

        def multiplied(*arguments, **options):
            family.launched.append("blas")
            return multiply(*arguments, **options)

        blas = name in ("blas", "cublas")
        version = "mma" if name in ("stream", "pipeline", "cublas") else "core"
        for where, what, value in (
                (op, "launch", launched), (matmul_blas.blas, "multiply", multiplied),
                (op, "_version", lambda *of: (version, "chosen by the test")),
                (op, "INVARIANT_TOKENS", 0 if blas else 2**30),
                (matmul_choice, "_HOST_TOKENS", 1), (matmul_choice, "fused_until", lambda bits: 1),
                (matmul_blas, "_CHUNK", 1 << 16), (matmul_blas, "_WAVE", 1)):
            stack.enter_context(mock.patch.object(where, what, value))
        yield family


def assert_right(family, matrix, w, x, dtype="float32", roundings=1, **options):
    """`product` against float64, within the bound of its type or `roundings` as large as that of `out`; returns it."""
    got, want = family.product(x, matrix, dtype, **options), x.astype(np.float64) @ w.T
    found, least = error(got, want), error(want.astype(dtype_of(dtype)), want)   # of few numbers that may be above it
    most = max(BOUND[dtype], (1.01 if roundings == 1 else 1.05 * roundings**0.5) * least)
    assert found <= most, f"{family.name}, {len(x)} tokens, {matrix!r}: error {found:.2e}"
    return got


def assert_rows_alone(family, matrix, x, whole):
    """Every row by itself has the bits it has among the others."""
    for row in range(len(x)):
        assert_same_bits(family.by_parts(x[row:row + 1], matrix), whole[row:row + 1])
