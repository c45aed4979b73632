# SPDX-License-Identifier: Apache-2.0
import ml_dtypes
import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.ops.silu_mul import _plan_silu_mul
from cupyattn.reference.silu_mul import silu_mul as expected_silu_mul
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(11)


def _data(shape, dtype):
    gate = (rng.standard_normal(shape) * 4).astype(dtype_of(dtype))
    return gate, rng.standard_normal(shape).astype(dtype_of(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("cols", [1536, 1, 33, 8200])
def test_silu_mul(xp, dtype, cols):
    gate, up = _data((3, cols), dtype)
    out = poison(xp.array(np.empty_like(gate))) if xp.name == "numpy" else None
    got = cupyattn.silu_mul(xp.array(gate), xp.array(up), out=out)
    assert got.dtype == gate.dtype and isinstance(got, xp.module.ndarray)
    assert_close(xp.numpy(got), expected_silu_mul(gate, up), *ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_relative_accuracy_of_every_gate(xp, dtype):
    """Far from zero as near it; beyond |gate| = 80 the result is 0 or gate itself, to float32."""
    gate = np.linspace(-80, 80, 4096, dtype=np.float32).astype(dtype_of(dtype))[None]
    up = np.ones_like(gate) * dtype_of(dtype).type(1.5)
    want = expected_silu_mul(gate, up)
    atol = 2.0**-25 if dtype == "float16" else 1e-35   # float16: half its smallest step
    assert_close(xp.numpy(cupyattn.silu_mul(xp.array(gate), xp.array(up))), want, atol,
                 {"float32": 5e-7, "float16": 2.0**-11 + 5e-7, "bfloat16": 2.0**-8 + 5e-7}[dtype])


def test_extreme_gates(xp):
    gate = np.array([[0, -0.0, 500, -500, 3e38, -3e38, np.nan, np.inf, 1]], np.float32)
    up = np.array([[3, 3, 2, 2, 1, 1, 1, 1, np.nan]], np.float32)
    got = xp.numpy(cupyattn.silu_mul(xp.array(gate), xp.array(up)))
    assert_close(got, [[0, 0, 1000, 0, 3e38, 0, np.nan, np.inf, np.nan]], 0, 1e-7)


def test_halves_of_a_fused_projection(xp):
    base = (rng.standard_normal((5, 2 * 1536)) * 3).astype(np.float16)
    gate_up = xp.array(base)
    want = expected_silu_mul(base[:, :1536], base[:, 1536:])
    assert_close(xp.numpy(cupyattn.silu_mul(gate_up[:, :1536], gate_up[:, 1536:])), want, *ROUNDING["float16"])
    cupyattn.silu_mul(gate_up[:, :1536], gate_up[:, 1536:], out=gate_up[:, :1536])
    host = xp.numpy(gate_up)
    assert_close(host[:, :1536], want, *ROUNDING["float16"])
    assert_same_bits(host[:, 1536:], base[:, 1536:])


def test_unaligned_stacked_views(xp):
    base = rng.standard_normal((4, 2, 100)).astype(np.float16)
    device = xp.array(base)
    out = xp.array(np.full((4, 2, 60), np.nan, np.float16))
    cupyattn.silu_mul(device[:, :, 3:43], device[:, :, 50:90], out=out[:, :, 5:45])
    host = xp.numpy(out)
    assert_close(host[:, :, 5:45], expected_silu_mul(base[:, :, 3:43], base[:, :, 50:90]), *ROUNDING["float16"])
    assert np.isnan(host[:, :, :5]).all() and np.isnan(host[:, :, 45:]).all()


def test_in_place_on_up_and_vectors(xp):
    gate, up = _data((64,), "float32")
    device = xp.array(up)
    assert cupyattn.silu_mul(xp.array(gate), device, out=device) is device
    assert_close(xp.numpy(device), expected_silu_mul(gate, up), *ROUNDING["float32"])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(xp, shape):
    empty = xp.array(np.zeros(shape, np.float16))
    assert cupyattn.silu_mul(empty, empty).shape == shape


def test_plan_covers_a_row():
    for arch in ("cpu", "sm_90"):
        for cols in (1, 33, 1536, 14336, 3_000_001):
            for align in (2, 16):
                plan = _plan_silu_mul(4, cols, "float16", align, arch)
                vec = dict(plan.spec.constants)["VEC"]
                assert cols % vec == 0 and (vec == 1 or align == 16)
                assert plan.grid[0] == 4 and plan.grid[1] <= 65535 and plan.block[0] <= 256


def test_errors():
    x = np.zeros((2, 8), np.float16)
    with pytest.raises(ValueError, match=r"silu_mul: up must be \[..., cols\] = \[2, 8\], got \[2, 4\]"):
        cupyattn.silu_mul(x, x[:, :4])
    with pytest.raises(TypeError, match="silu_mul: gate must be float16 or bfloat16 or float32, got float64"):
        cupyattn.silu_mul(x.astype(np.float64), x)
    with pytest.raises(TypeError, match="silu_mul: up must be float16, got float32"):
        cupyattn.silu_mul(x, x.astype(np.float32))
    with pytest.raises(TypeError, match="silu_mul: out must be float16, got float32"):
        cupyattn.silu_mul(x, x, out=np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="silu_mul: up must have a contiguous last axis"):
        cupyattn.silu_mul(np.zeros((8, 8), np.float16), np.zeros((8, 8), np.float16).T)
    with pytest.raises(TypeError, match="silu_mul: up must be a NumPy or CuPy array, got list"):
        cupyattn.silu_mul(x, [1.0])
    frozen = np.zeros((2, 8), np.float16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="silu_mul: out must be writeable"):
        cupyattn.silu_mul(x, x, out=frozen)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_silu_mul_checked(dtype):
    gate, up = _data((5, 100), dtype)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(cupyattn.silu_mul(gate, up))
    assert_close(results[0], expected_silu_mul(gate, up), *ROUNDING[dtype])
    for out in results[1:]:
        assert_same_bits(out, results[0])


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), cols=st.integers(1, 300), offset=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_shapes(rows, cols, offset, seed):
    generator = np.random.default_rng(seed)
    base = generator.standard_normal((rows, 2 * cols + offset)).astype(ml_dtypes.bfloat16)
    gate, up = base[:, offset:offset + cols], base[:, offset + cols:]
    assert_close(cupyattn.silu_mul(gate, up), expected_silu_mul(gate, up), *ROUNDING["bfloat16"])
