# SPDX-License-Identifier: Apache-2.0
"""GGUF blocks read to CodedWeight, against the gguf package's dequantizer."""

import gguf
import numpy as np
import pytest
from families import FAMILIES, error, forced
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn import QMatrix
from cupyattn.quant.gguf import BLOCKS, read, type_name

# where a block of each type keeps float16 numbers
FLOAT16 = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82], "q3_k": [108],
           "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_nl": [0], "iq4_xs": [0], "mxfp4": [], "nvfp4": []}
BITS = {"q2_k": 2, "q3_k": 3, "q5_0": 5, "q5_1": 5, "q5_k": 5, "q6_k": 6, "q8_0": 8}


def random_blocks(name, shape, rng):
    """Any bytes, but float16 numbers are finite; and no e8m0 NaN, which the package takes for 2**128."""
    columns, size = BLOCKS[name][:2]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // columns, size), dtype=np.uint8)
    for at in FLOAT16[name]:
        numbers = np.ldexp(rng.uniform(-2, 2, blocks.shape[:2]), rng.integers(-20, 8, blocks.shape[:2]))
        blocks[..., at:at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
    if name == "mxfp4":
        blocks[..., 0] = rng.integers(0, 252, blocks.shape[:2])
    if name == "nvfp4":
        blocks[..., :4] &= 127
    return blocks


def oracle(name, blocks):
    return gguf.quants.dequantize(blocks.reshape(len(blocks), -1), gguf.GGMLQuantizationType[name.upper()])


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_package(name):
    rng = np.random.default_rng(1)
    shape = (24, 1280)
    blocks = random_blocks(name, shape, rng)
    before = blocks.copy()
    coded = read(blocks, name, shape)
    assert np.array_equal(coded.dequantize().astype(np.float32), oracle(name, blocks))
    assert np.array_equal(blocks, before)
    assert coded.format == name and coded.shape == shape and coded.order is None
    (segment,) = coded.segments
    assert segment.codes.shape == shape and segment.codes.dtype == np.uint8
    assert segment.bits == BITS.get(name, 4) and segment.codes.max() == 2**segment.bits - 1
    assert segment.scale.shape == (24, 1280 // segment.group)
    for array in (segment.scale, segment.minimum, segment.super_scale, segment.super_minimum):
        assert array is None or not np.shares_memory(array, blocks)


@pytest.mark.parametrize("name", [name for name, (columns, *_) in BLOCKS.items() if columns == 256])
def test_sub_scales_stay_integers(name):
    (segment,) = read(random_blocks(name, (8, 512), np.random.default_rng(2)), name, (8, 512)).segments
    assert segment.scale.dtype == np.int8 and segment.super_scale.dtype == np.float16
    assert segment.super_scale.shape == (8, 2) and segment.super_group == 256
    if name in ("q2_k", "q4_k", "q5_k"):
        assert segment.minimum.dtype == np.int8 and segment.minimum.max() <= 0
        assert segment.super_minimum.dtype == np.float16


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(sorted(BLOCKS)), rows=st.integers(1, 20), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_shape(name, rows, blocks, seed):
    shape = (rows, blocks * BLOCKS[name][0])
    raw = random_blocks(name, shape, np.random.default_rng(seed))
    assert np.array_equal(read(raw.reshape(-1), name, shape).dequantize().astype(np.float32), oracle(name, raw))


@pytest.mark.parametrize("name", BLOCKS)
def test_matrices_are_what_the_package_says(name):
    """Packed and read by the kernels: weights to the bit, products of every family within the bound."""
    shape, rng = (40, 512), np.random.default_rng(6)
    raw = random_blocks(name, shape, rng)
    if name == "mxfp4":
        raw[..., 0] = rng.integers(100, 140, raw.shape[:2])   # no product past float32
    if name == "nvfp4":
        raw[..., :4] = np.minimum(raw[..., :4], 126)          # a NaN, which stands for 0 here
    want = oracle(name, raw)
    matrix = QMatrix.from_gguf(raw, name, shape)
    assert np.array_equal(matrix.reconstruct(), want)
    for family_name in FAMILIES:
        with forced(family_name) as family:
            m = family.some_tokens[0]
            x = rng.standard_normal((m, 512)).astype(np.float16)
            found = error(family.product(x, matrix), x.astype(np.float64) @ want.astype(np.float64).T)
            assert found <= 1e-5, f"{family_name}: {found:.2e}"


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_what_the_package_quantizes(name):
    w = np.random.default_rng(3).normal(size=(16, 256)).astype(np.float32)
    raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType[name.upper()])
    weight = read(raw, name, w.shape).dequantize()
    assert np.abs(weight - w).max() < (1.5 if name == "mxfp4" else 0.6)
    assert np.array_equal(weight.astype(np.float32), oracle(name, raw))


def test_special_scales():
    blocks = random_blocks("mxfp4", (1, 96), np.random.default_rng(4))
    blocks[0, :, 0] = 0, 255, 254
    blocks[0, :, 1:] = 0x21             # 0.5 in the first half of a block, 1.0 in the second
    weight = read(blocks, "mxfp4", (1, 96)).dequantize()[0]
    assert (weight[:16] == 2.0**-128).all() and (weight[16:32] == 2.0**-127).all()
    assert np.isnan(weight[32:64]).all()
    assert (weight[64:80] == 2.0**126).all() and (weight[80:] == 2.0**127).all()

    blocks = random_blocks("nvfp4", (1, 64), np.random.default_rng(5))
    blocks[0, 0, :4] = 127, 0, 126, 1
    weight = read(blocks, "nvfp4", (1, 64)).dequantize()[0]
    assert not weight[:32].any() and abs(weight[32:48]).max() <= 6 * 448 and abs(weight[48:]).max() <= 6 * 2.0**-9


def test_names_and_numbers():
    for name in (*BLOCKS, "f32", "f16", "bf16"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert type_name(kind) == type_name(int(kind)) == type_name(kind.name) == type_name(name) == name
    for kind, found in ((gguf.GGMLQuantizationType.IQ2_XS, "IQ2_XS"), (17, "17"), ("TQ1_0", "'TQ1_0'"), (99, "99")):
        with pytest.raises(NotImplementedError, match=f"type must be one of Q4_0, .*NVFP4, .*BF16, got .*{found}"):
            type_name(kind)


def test_refusals():
    data = np.zeros(144, np.uint8)
    for arguments, kind, message in (
            ((data, "q4_k", (1, 255)), ValueError, "in_features a multiple of 256 for Q4_K, got \\[1, 255\\]"),
            ((data, "q4_k", (2, 256)), ValueError, "data must hold 2 blocks of 144 bytes, got 144 bytes"),
            ((data.view(np.int8), "q4_k", (1, 256)), TypeError, "data must be uint8, got int8"),
            ((data, "iq2_xs", (1, 256)), NotImplementedError, "type must be one of Q4_0, .*, got 'iq2_xs'")):
        with pytest.raises(kind, match=message):
            read(*arguments)
