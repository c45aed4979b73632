# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from coded_weights import SOME, coded_weight
from compare import assert_same_bits, dtype_of, poison
from ggml_blocks import quantized
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import QMatrix
from cupyattn.quant.coded import CodedWeight
from cupyattn.reference.embedding import embedding as expected_rows
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(5)
IDS = np.array([3, 0, 47, 3, 8, 15, 16])


def _table(kind, rows=48, columns=96):
    """(table, its values by an independent decoder)."""
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    if not kind.startswith("q"):
        w = w.astype(dtype_of(kind))
        return w, w
    raw, values = quantized(kind.upper(), w)
    return QMatrix.from_gguf(raw, kind, w.shape), values


def _on(xp, table):
    return table.to(xp.module) if isinstance(table, QMatrix) else xp.array(table)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_embedding(xp, kind, out_dtype):
    table, values = _table(kind)
    got = cupyattn.embedding(xp.array(IDS), _on(xp, table), out_dtype=dtype_of(out_dtype))
    assert isinstance(got, xp.module.ndarray)
    assert_same_bits(xp.numpy(got), values[IDS].astype(np.float32).astype(dtype_of(out_dtype)))
    assert_same_bits(expected_rows(IDS, table), values[IDS].astype(np.float64))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_packed_dense_table(kind):
    values = rng.standard_normal((33, 72)).astype(dtype_of(kind))
    ids = np.array([[32, 0], [17, 9]], np.int32)
    got = cupyattn.embedding(ids, QMatrix.from_dense(values))
    assert_same_bits(got, values[ids].astype(np.float32))


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("out_dtype", ["float16", "float32"])
def test_forms(xp, form, out_dtype):
    weight = coded_weight(form, 48, 328)
    got = cupyattn.embedding(xp.array(IDS), QMatrix.from_coded(weight, xp=xp.module), out_dtype=dtype_of(out_dtype))
    rtol = {"float16": 2.0**-11 * 1.02, "float32": 2.0**-23}[out_dtype]
    np.testing.assert_allclose(xp.numpy(got).astype(np.float64), weight.dequantize()[IDS], rtol=rtol, atol=1e-7)


def test_several_segments_in_any_order(xp):
    parts = [coded_weight(f"int{bits} plain float16", 48, columns, group=24).segments[0]
             for bits, columns in ((6, 96), (3, 40))]
    weight = CodedWeight("mixed", (48, 136), tuple(parts), rng.permutation(136).astype(np.int32))
    out = xp.array(np.full((7, 136), np.nan, np.float32))
    cupyattn.embedding(xp.array(IDS), QMatrix.from_coded(weight, xp=xp.module), out=out)
    assert_same_bits(xp.numpy(out), weight.dequantize()[IDS].astype(np.float32))


def test_defaults_and_shapes(xp):
    table, values = _table("bfloat16")
    got = cupyattn.embedding(xp.array(IDS.reshape(7, 1).astype(np.int32)), xp.array(table))
    assert got.dtype == table.dtype and got.shape == (7, 1, 96)
    assert cupyattn.embedding(xp.array(IDS), _on(xp, _table("q8_0")[0])).dtype == np.float32
    assert cupyattn.embedding(xp.array(IDS[:0]), xp.array(table)).shape == (0, 96)
    scalar = cupyattn.embedding(xp.array(np.array(5)), xp.array(table))
    assert_same_bits(xp.numpy(scalar), values[5])


def test_strided_views(xp):
    table, values = _table("float16")
    wide = np.zeros((48, 101), np.float16)
    wide[:, 3:99] = table
    out = xp.array(np.full((7, 100), np.nan, np.float32))
    cupyattn.embedding(xp.array(np.repeat(IDS, 2))[::2], xp.array(wide)[:, 3:99], out=out[:, 1:97])
    host = xp.numpy(out)
    assert_same_bits(host[:, 1:97].copy(), values[IDS].astype(np.float32))
    assert np.isnan(host[:, [0, 97, 98, 99]]).all()


@pytest.mark.parametrize("kind", ["q8_0", "float16"])
@pytest.mark.parametrize("bad", [-1, 48, 2**31 - 1])
def test_an_id_out_of_range(xp, kind, bad):
    table, values = _table(kind)
    ids = np.array([3, bad, 5])
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=rf"embedding: ids must be in \[0, 48\), got {bad}"):
            cupyattn.embedding(ids, table)
    else:
        got = xp.numpy(cupyattn.embedding(xp.array(ids), _on(xp, table), out_dtype=np.float32))
        assert np.isnan(got[1]).all()
        assert_same_bits(got[[0, 2]], values[[3, 5]].astype(np.float32))


def test_errors():
    table, _ = _table("float16")
    with pytest.raises(TypeError, match="ids must be int32 or int64, got float64"):
        cupyattn.embedding(np.zeros(3), table)
    with pytest.raises(ValueError, match=r"table must be \[rows, columns\]"):
        cupyattn.embedding(IDS, table[0])
    with pytest.raises(ValueError, match=r"out must be \[..., columns\] = \[7, 96\], got \[7, 95\]"):
        cupyattn.embedding(IDS, table, out=np.zeros((7, 95), np.float16))
    with pytest.raises(TypeError, match="table must be float16 or bfloat16 or float32, got float64"):
        cupyattn.embedding(IDS, table.astype(np.float64))


@pytest.mark.parametrize("kind", ["q4_1", "q8_0", "float16"])
def test_embedding_checked(kind):
    table, values = _table(kind)
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            got = cupyattn.embedding(IDS, table, out=poison(np.empty((7, 96), np.float32)))
        assert_same_bits(got, values[IDS].astype(np.float32))


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 70), groups=st.integers(1, 9), count=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_shapes(rows, groups, count, seed):
    table, values = _table("q4_1", rows, 32 * groups)
    ids = np.random.default_rng(seed).integers(0, rows, count)
    assert_same_bits(cupyattn.embedding(ids, table), values[ids])
