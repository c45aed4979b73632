# SPDX-License-Identifier: Apache-2.0
"""QMatrix from what other packages packed, through its constructors; and everything that they refuse."""

import functools

import numpy as np
import pytest
from compare import assert_same_bits
from families import error
from test_fixtures import NAMES, load, read

import cupyattn
from cupyattn import QMatrix
from cupyattn.quant.detect import detect
from cupyattn.quant.layout import TRAITS


@functools.cache
def made(name):
    """(QMatrix of a fixture, by the constructor of its format; its weights in float64)."""
    tensors, expected, made_by = load(name)
    weights = read(name)[0].dequantize()
    if "data" in tensors:
        options = made_by["options"]
        return QMatrix.from_gguf(tensors["data"], options.get("qtype") or options["type"], expected.shape), weights
    kind, arguments = detect(tensors, made_by["config"])
    return getattr(QMatrix, f"from_{kind}")(tensors, **arguments), weights


@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_become_products(name, tmp_path):
    matrix, w = made(name)
    assert {segment.form.trait for segment in matrix.segments} <= set(TRAITS)
    assert_same_bits(matrix.reconstruct(), w.astype(np.float32))
    matrix.save(tmp_path / "w.safetensors")
    x = np.random.default_rng(1).standard_normal((3, w.shape[1]), np.float32)
    got = QMatrix.load(tmp_path / "w.safetensors").matmul(x)
    assert error(got, x.astype(np.float64) @ w.T) <= 1e-5


def test_every_constructor_is_met():
    constructors = {name for name in vars(QMatrix.__mro__[1]) if name.startswith("from_")}
    kinds = {"gguf" if "data" in load(name)[0] else detect(load(name)[0], load(name)[2]["config"])[0]
             for name in NAMES}
    # these have tests of their own: no package makes EXL2 without a GPU
    assert constructors - {f"from_{kind}" for kind in kinds} == {"from_exl2", "from_dense", "from_coded",
                                                                 "from_safetensors"}


W = np.ones((32, 64), np.float32)
GPTQ = {"qweight": np.zeros((8, 32), np.int32), "qzeros": np.zeros((1, 4), np.int32),
        "scales": np.ones((1, 32), np.float16)}
AWQ = {"qweight": np.zeros((64, 4), np.int32), "qzeros": np.zeros((1, 4), np.int32),
       "scales": np.ones((1, 32), np.float16)}
BLOCK = np.zeros(18, np.uint8)
MATRIX = QMatrix.from_dense(W)
REFUSED = {
    "accumulate must be True or False, got 'yes'": lambda: MATRIX.matmul(W, accumulate="yes", out=W),
    "xp must be the module numpy or cupy, got 'cupy'": lambda: MATRIX.to("cupy"),
    "xp must be the module numpy or cupy, got None": lambda: MATRIX.to(None),
    "xp must be the module numpy or cupy, got 'numpy'": lambda: QMatrix.from_dense(W, xp="numpy"),
    "size must be an integer, got float": lambda: MATRIX.row_shard(0, 1.5),
    "rank must be an integer, got str": lambda: MATRIX.column_shard("a", 2),
    "matrices must be a sequence of QMatrix, got QMatrix": lambda: QMatrix.concat(MATRIX),
    "matrices must hold QMatrix only, got int": lambda: QMatrix.stack([MATRIX, 3]),
    "scheme must be a str, got 4": lambda: QMatrix.quantize(W, 4),
    "w must be a NumPy or CuPy array, got list": lambda: QMatrix.quantize(W.tolist(), "int4"),
    "w must be [out_features, in_features], both at least 1 and in_features a multiple of 8, got [32, 60]":
        lambda: QMatrix.quantize(W[:, :60], "int4"),
    "tensors must be a dict of arrays, got NoneType": lambda: QMatrix.from_gptq(None),
    "bits must be one of (2, 3, 4, 8) for gptq, got '4'": lambda: QMatrix.from_gptq(GPTQ, bits="4"),
    "version must be a str, got None": lambda: QMatrix.from_awq(AWQ, version=None),
    "shape must be (out_features, in_features), got 64": lambda: QMatrix.from_gguf(BLOCK, "Q4_0", 64),
    "type must be a GGMLQuantizationType, its number or name, got None":
        lambda: QMatrix.from_gguf(BLOCK, None, (1, 32)),
    "data must hold 1 blocks of 18 bytes, got 3 bytes": lambda: QMatrix.from_gguf(b"123", "Q4_0", (1, 32)),
    "rows must be (first, last), two integers, got 3": lambda: cupyattn.dequantize(MATRIX, rows=3),
    "rows must be (first, last), two integers, got (0.5, 2)": lambda: cupyattn.dequantize(MATRIX, rows=(0.5, 2)),
    "dequantize: out_dtype must be float16 or bfloat16 or float32, got nonsense":
        lambda: MATRIX.reconstruct(out_dtype="nonsense"),
    "rms_norm: out_dtype must be float16 or bfloat16 or float32, got float64":
        lambda: cupyattn.rms_norm(W, W[0], out_dtype="f8"),
    "got 'trellis', which is EXL3's; EXL3 is not read": lambda: QMatrix.from_exl2({"trellis": W}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        REFUSED[message]()
    assert message in str(caught.value)


def test_kinds_are_not_mixed(xp):
    other = QMatrix.from_dense(W)
    if xp.module is np:
        assert QMatrix.concat([MATRIX, other]).shape == (64, 64)
        return
    for join in (QMatrix.concat, QMatrix.stack):
        with pytest.raises(TypeError, match="matrices must be of one kind, got NumPy and CuPy arrays"):
            join([MATRIX, other.to(xp.module)])


def test_any_number_of_rows():
    w = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    matrix = QMatrix.quantize(w, "int8-g32")
    assert matrix.shape == (3, 64) and error(matrix.reconstruct(), w) < 0.01
