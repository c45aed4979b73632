# SPDX-License-Identifier: Apache-2.0
"""Readers of integer checkpoints against vectors worked by hand and decoders that go one weight at a time."""

import struct
import time
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn import QMatrix
from cupyattn.quant import awq, compressed_tensors, exl2, gptq, hqq
from cupyattn.quant.bit_stream import pack_stream, unpack_stream
from cupyattn.quant.detect import detect
from cupyattn.quant.groups import group_columns

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=["f16", "bf16", "f32"])


# ---- decoders and packers, one number at a time

def stream(words):
    """The words of a stream as one integer."""
    return sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))


def field(words, bits, e):
    return stream(words) >> e * bits & (1 << bits) - 1


def int32(words):
    return np.array(words, np.uint32).view(np.int32)


def packed(codes, bits):
    """A dense stream of one vector of codes."""
    number = sum(int(code) << e * bits for e, code in enumerate(codes))
    return int32([number >> 32 * i & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))])


def packed_down(codes, bits):
    return np.stack([packed(column, bits) for column in codes.T], axis=1)


def packed_along(codes, bits):
    return np.stack([packed(row, bits) for row in codes])


def packed_whole(codes, bits):
    """Rows of codes, ``32 // bits`` to a word."""
    each = 32 // bits
    return np.stack([int32([sum(int(c) << bits * i for i, c in enumerate(row[at:at + each]))
                            for at in range(0, len(row), each)]) for row in codes])


def packed_awq(codes):
    """[rows, N] in words of 8 columns: column 8c + j in nibble [0, 4, 1, 5, 2, 6, 3, 7][j]."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for r, n in np.ndindex(codes.shape):
        words[r, n // 8] |= np.uint32(int(codes[r, n]) << 4 * (0, 4, 1, 5, 2, 6, 3, 7)[n % 8])
    return words.view(np.int32)


def frozen(**tensors):
    """A checkpoint whose arrays nobody may write."""
    for array in tensors.values():
        array.setflags(write=False)
    return tensors


def dequantized(weight):
    """The weight, after a look at the rules of `CodedWeight`."""
    rows, in_features = weight.shape
    columns = 0
    for segment in weight.segments:
        assert segment.codes.dtype == np.uint8 and segment.codes.flags.c_contiguous
        assert segment.codes.max() < 1 << segment.bits
        assert segment.centre in (0, 1 << segment.bits - 1)
        columns += segment.codes.shape[1]
        assert segment.scale.shape == (rows, -(-segment.codes.shape[1] // segment.group))
        if segment.zero is not None:
            assert (segment.zero.shape, segment.zero.dtype) == (segment.scale.shape, segment.scale.dtype)
    if weight.order is None:
        assert columns == in_features
    else:
        assert weight.order.dtype == np.int32 and len(weight.order) == columns
        assert np.array_equal(np.sort(weight.order[weight.order >= 0]), np.arange(in_features))
        assert weight.order.min() >= -1
    return weight.dequantize()


class Matrix:
    """A logical matrix: codes [K, N], zero points and scales [groups, N], the group of each column."""

    def __init__(self, bits=4, shape=(16, 64), group=32, dtype=np.float16, symmetric=False, g_idx=None, seed=0):
        rng = np.random.default_rng(seed)
        self.bits, (n, k) = bits, shape
        self.g_idx = np.arange(k) // group if g_idx is None else np.asarray(g_idx)
        groups = -(-k // group) if g_idx is None else int(self.g_idx.max()) + 1
        self.codes = rng.integers(0, 1 << bits, (k, n))
        self.zeros = rng.integers(0, 1 << bits, (groups, n))
        self.zeros.flat[:2] = 0, (1 << bits) - 1
        if symmetric:
            self.zeros[:] = 1 << bits - 1
        self.scales = rng.uniform(0.001, 0.01, (groups, n)).astype(dtype)

    def weight(self):
        """[N, K], float64."""
        scales = self.scales.astype(np.float64)
        return np.array([[scales[g, n] * (int(self.codes[k, n]) - int(self.zeros[g, n]))
                          for k, g in enumerate(self.g_idx)] for n in range(self.codes.shape[1])])

    def gptq(self, stored=-1, g_idx=None):
        """`stored`: -1 for v1, 0 for v2."""
        fields = (self.zeros + stored) % (1 << self.bits)
        extra = {} if g_idx is None else {"g_idx": np.asarray(g_idx, np.int32)}
        return frozen(qweight=packed_down(self.codes, self.bits), scales=self.scales.copy(),
                      qzeros=packed_along(fields, self.bits), **extra)

    def awq(self):
        return frozen(qweight=packed_awq(self.codes), qzeros=packed_awq(self.zeros), scales=self.scales.copy())

    def compressed(self, pack=packed_along, **extra):
        """q + 2^(bits-1) with signed q is the code itself, and likewise the zero point."""
        return frozen(weight_packed=pack(self.codes.T, self.bits), weight_scale=self.scales.T.copy(),
                      weight_zero_point=pack(self.zeros, self.bits).T,
                      weight_shape=np.array(self.codes.T.shape, np.int64), **extra)


# ---- the bit stream

def test_straddling_codes_of_three_bits():
    """Code 10 is bits 30-32, code 21 bits 63-65."""
    words = int32([0x40000000, 0x80000001, 0x00000001])
    expected = np.zeros(32, np.uint8)
    expected[10], expected[21] = 0b101, 0b011
    assert np.array_equal(unpack_stream(words, 3), expected)
    assert np.array_equal(pack_stream(expected, 3), words)
    words = int32([0x88FAC688] * 3)   # octal 0 1 2 3 4 5 6 7 0 1 then two bits of the next
    assert unpack_stream(words, 3)[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_stream_round_trip(bits, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 1 << bits, shape).astype(np.uint8)
    words = pack_stream(codes, bits, axis)
    count = shape[axis]
    assert words.dtype == np.int32 and words.shape[axis] == -(-count * bits // 32)
    assert np.array_equal(unpack_stream(words, bits, axis, count), codes)
    first = np.moveaxis(words, axis, -1).reshape(-1, words.shape[axis])[0]
    assert [field(first, bits, e) for e in range(count)] == np.moveaxis(codes, axis, -1).reshape(-1, count)[0].tolist()
    assert stream(first) >> count * bits == 0


def test_stream_of_several_chunks():
    words = np.random.default_rng(0).integers(0, 1 << 32, (3, 300_000), np.uint64).astype(np.uint32)
    codes = unpack_stream(words, 5)
    assert codes.shape == (3, 1_920_000)
    assert np.array_equal(pack_stream(codes, 5).view(np.uint32), words)
    for row, e in ((0, 0), (1, 262_143), (1, 262_144), (2, 1_919_999)):
        near = e * 5 // 32 // 5 * 5
        assert codes[row, e] == field(words[row, near:near + 5], 5, e - near * 32 // 5)


def test_stream_refuses():
    words = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        unpack_stream(words, 9)
    with pytest.raises(TypeError, match="words of 32 bits, got int64"):
        unpack_stream(words.astype(np.int64), 4)
    with pytest.raises(ValueError, match="count must be at most 24"):
        unpack_stream(words, 4, count=25)
    with pytest.raises(TypeError, match="uint8, got int32"):
        pack_stream(words, 4)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_unpack_keeps_up_with_a_disk(bits, axis):
    """100 MB of words a second, asked of the best of five runs of a thread among others."""
    words = np.ones((1536, 1536), np.int32)
    seconds = min(_timed(lambda: unpack_stream(words, bits, axis)) for _ in range(5))
    assert words.nbytes / seconds > 50e6


def _timed(run):
    start = time.thread_time()
    run()
    return time.thread_time() - start


# ---- GPTQ

def test_gptq_by_hand():
    """Codes 0 to 7 down K, fields of 7 along N: zero points of 8 in v1."""
    tensors = frozen(qweight=int32([[0x76543210] * 8]), qzeros=int32([[0x77777777]]),
                     scales=np.full((1, 8), 0.5, np.float16))
    weight = gptq.read(tensors)
    assert weight.format == "gptq" and weight.shape == (8, 8) and weight.order is None
    assert weight.segments[0].zero is None
    assert np.array_equal(dequantized(weight), np.tile((np.arange(8) - 8) * 0.5, (8, 1)))


@DTYPES
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_gptq(bits, dtype, symmetric):
    matrix = Matrix(bits, (32, 96), 32, dtype, symmetric)
    expected = matrix.weight()
    for tensors, label in ((matrix.gptq(-1), "gptq"), (matrix.gptq(0), "gptq_v2")):
        weight = gptq.read(tensors, checkpoint_format=label)
        assert (weight.segments[0].zero is None) == symmetric and weight.segments[0].scale.dtype == dtype
        assert weight.segments[0].bits == bits and weight.segments[0].group == 32
        assert np.array_equal(dequantized(weight), expected)
        assert np.array_equal(dequantized(gptq.read(tensors, bits, 32, checkpoint_format=label)), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored, label, actual", [(0, None, "gptq_v2"), (0, "gptq", "gptq_v2"),
                                                   (-1, "gptq_v2", "gptq")])
def test_gptq_mislabelled(bits, stored, label, actual):
    matrix = Matrix(bits, (32, 32), symmetric=True)
    with pytest.warns(UserWarning, match=f"every field is {(1 << bits - 1) + stored}, which '{actual}' stores"):
        weight = gptq.read(matrix.gptq(stored), checkpoint_format=label)
    assert np.array_equal(dequantized(weight), matrix.weight())
    believed = gptq.read(matrix.gptq(stored), checkpoint_format=label, sym=False)
    matrix.zeros += 1 if stored == 0 else -1
    assert np.array_equal(dequantized(believed), matrix.weight())


def test_gptq_zero_wrap():
    """Field 15 of v1 is zero point 0 where the packer wrapped and 16 where kernels do not."""
    matrix = Matrix(4)
    matrix.zeros[0, :4] = 0
    assert np.array_equal(dequantized(gptq.read(matrix.gptq())), matrix.weight())
    tensors = matrix.gptq()
    matrix.zeros[matrix.zeros == 0] = 16
    assert np.array_equal(dequantized(gptq.read(tensors, zero_wrap=False)), matrix.weight())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_that_borrowed(bits):
    """A writer that takes 1 from whole words: a zero point of 0 leaves 2^bits - 1 and one less in the next field."""
    matrix = Matrix(bits, (32, 64))
    matrix.zeros[:, :6] = 0, 1, 0, 0, 2, 0
    ones = np.uint32(sum(1 << bits * i for i in range(32 // bits)))
    tensors = matrix.gptq(0) | {"qzeros": (packed_along(matrix.zeros, bits).view(np.uint32) - ones).view(np.int32)}
    for read in (gptq.read, QMatrix.from_gptq):
        weight = read(tensors, zero_wrap="word")
        found = weight.reconstruct() if isinstance(weight, QMatrix) else dequantized(weight)
        np.testing.assert_allclose(found, matrix.weight(), rtol=1e-6)
        wrong = read(tensors, zero_wrap=True)
        wrong = wrong.reconstruct() if isinstance(wrong, QMatrix) else dequantized(wrong)
        assert not np.allclose(wrong, matrix.weight())
        with pytest.raises(ValueError, match="zero_wrap must be True, False or 'word', got 'words'"):
            read(tensors, zero_wrap="words")


@pytest.mark.parametrize("kind", ["permuted", "partial", "negative", "static"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_act_order(kind, bits):
    k = 80 if kind == "partial" else 96
    g_idx = np.arange(k) // 32
    if kind != "static":
        g_idx = np.random.default_rng(5).permutation(g_idx)
    matrix = Matrix(bits, (32, k), g_idx=g_idx)
    given_idx = np.where(np.arange(k) % 3 == 0, g_idx - 3, g_idx) if kind == "negative" else g_idx
    weight = gptq.read(matrix.gptq(g_idx=given_idx), group_size=32)
    assert len(weight.segments) == 1 and weight.segments[0].group == 32
    assert weight.segments[0].codes.shape == (32, k)
    assert (weight.order is None) == (kind == "static")
    assert np.array_equal(dequantized(weight), matrix.weight())


def test_gptq_g_idx_of_one_value_is_no_act_order():
    matrix = Matrix(4, (16, 96))
    for value in (0, -1):
        weight = gptq.read(matrix.gptq(g_idx=np.full(96, value)))
        assert weight.order is None and np.array_equal(dequantized(weight), matrix.weight())


@pytest.mark.parametrize("sizes, group, columns", [
    ((48, 16, 32), 16, 96),        # 16 divides all
    ((64, 64, 96), 64, 224),       # the last is longer and falls into two
    ((40, 30, 0, 10), 32, 128),    # filled up to 64 + 32 + 32; one group has no column
    ((1, 3, 60), 32, 128),
    ((8, 8, 8), 32, 96),
    ((48, 48, 24), 48, 120),
    ((1, 63), 32, 96),
    ((0, 64, 32), 64, 96),
])
def test_gptq_groups_of_any_size(sizes, group, columns):
    g_idx = np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes)), sizes))
    matrix = Matrix(4, (16, len(g_idx)), g_idx=g_idx)
    weight = gptq.read(matrix.gptq(g_idx=g_idx))
    assert weight.segments[0].group == group and weight.segments[0].codes.shape[1] == columns
    assert np.array_equal(dequantized(weight), matrix.weight())
    assert (weight.order < 0).sum() == columns - len(g_idx)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
def test_any_g_idx(eighths, groups, seed):
    g_idx = np.random.default_rng(seed).integers(0, groups + 1, 8 * eighths)
    g_idx[:2] = 0, groups   # two values at least, or it would be none
    group, index, order = group_columns(8 * eighths, groups + 1, None, g_idx)
    order = np.arange(8 * eighths) if order is None else order
    real = order >= 0
    assert np.array_equal(np.sort(order[real]), np.arange(8 * eighths)) and len(index) == -(-len(order) // group)
    assert np.array_equal(np.repeat(index, group)[:len(order)][real], g_idx[order[real]])


@pytest.mark.parametrize("k, group", [(96, -1), (96, 96), (96, 16), (88, 16), (104, 64), (8, 8)])
def test_gptq_group_sizes(k, group):
    size = k if group == -1 else group
    matrix = Matrix(4, (8, k), size)
    weight = gptq.read(matrix.gptq(), group_size=group)
    assert weight.segments[0].group == size and np.array_equal(dequantized(weight), matrix.weight())


def test_gptq_of_three_bits_whose_last_word_is_half_full():
    matrix = Matrix(3, (32, 40), 16)
    with pytest.raises(ValueError, match="in_features must follow from the shapes or be given"):
        gptq.read(matrix.gptq(), 3, 16)
    assert np.array_equal(dequantized(gptq.read(matrix.gptq(), 3, 16, in_features=40)), matrix.weight())
    assert np.array_equal(dequantized(gptq.read(matrix.gptq(g_idx=matrix.g_idx))), matrix.weight())


def test_gptq_refuses():
    good = Matrix(4, (16, 64)).gptq(g_idx=np.arange(64) // 32)

    def but(**changed):
        return {name: array for name, array in {**good, **changed}.items() if array is not None}

    with pytest.raises(ValueError, match="tensors must have 'qzeros', got g_idx, qweight, scales"):
        gptq.read(but(qzeros=None))
    with pytest.raises(TypeError, match="qweight must be int32 or uint32, got int64"):
        gptq.read(but(qweight=good["qweight"].astype(np.int64)))
    with pytest.raises(TypeError, match="scales must be float16 or bfloat16 or float32, got float64"):
        gptq.read(but(scales=good["scales"].astype(np.float64)))
    with pytest.raises(ValueError, match=r"scales must have shape \[any, 16\], got \[2, 8\]"):
        gptq.read(but(scales=good["scales"][:, :8]))
    with pytest.raises(ValueError, match=r"qzeros must have shape \[2, any\]"):
        gptq.read(but(qzeros=good["qzeros"][:1]))
    with pytest.raises(ValueError, match="bits must follow from the shapes"):
        gptq.read(good, 8)
    with pytest.raises(NotImplementedError, match="bits must be one of"):
        gptq.read(good, 5)
    with pytest.raises(NotImplementedError, match="checkpoint_format must be one of gptq, gptq_v2, got 'gptq_p'"):
        gptq.read(good, checkpoint_format="gptq_p")
    with pytest.raises(ValueError, match="g_idx must be below 2 groups, got 0 to 2"):
        gptq.read(but(g_idx=np.arange(64, dtype=np.int32) // 31))
    with pytest.raises(ValueError, match="group_size must give 2 groups of 64 columns, got 64"):
        gptq.read(but(g_idx=None), group_size=64)
    with pytest.raises(ValueError, match="group_size must follow from the shapes or be given, got 2 groups of 80 col"):
        gptq.read(Matrix(4, (16, 80), 64).gptq())   # 40 + 40 or 64 + 16


# ---- AWQ

def test_awq_by_hand():
    """Nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i]; zero points 0 and 15 stay what they are."""
    tensors = frozen(qweight=int32([[0x76543210]] * 8), qzeros=int32([[0x0000FFFF]]),
                     scales=np.ones((1, 8), np.float16))
    expected = np.array([0, 4, 1, 5, 2, 6, 3, 7]) - np.array([15, 0, 15, 0, 15, 0, 15, 0])
    assert np.array_equal(dequantized(awq.read(tensors)), np.tile(expected[:, None], (1, 8)))


@DTYPES
@pytest.mark.parametrize("k, group", [(64, 32), (80, 32), (64, -1)])
def test_awq(k, group, dtype):
    matrix = Matrix(4, (24, k), k if group == -1 else group, dtype)
    assert np.array_equal(dequantized(awq.read(matrix.awq(), 4, group)), matrix.weight())


def test_awq_of_eight_bits():
    """Byte i of a word is column [0, 2, 1, 3][i]."""
    word = [[0x03010200, 0x07050604]]
    tensors = frozen(qweight=int32(word * 8), qzeros=int32(word), scales=np.ones((1, 8), np.float16))
    weight = awq.read(tensors)
    assert weight.segments[0].bits == 8 and weight.segments[0].codes[:, 0].tolist() == list(range(8))
    assert not dequantized(weight).any()


def test_awq_refuses_other_layouts():
    n, k = 16, 64
    fast = {"qweight": np.zeros((n // 4, k), np.int16), "qzeros": np.zeros((8, n), np.float16),
            "scales": np.zeros((8, n), np.float16)}
    gemv = {"qweight": np.zeros((n, k // 8), np.int32), "qzeros": np.zeros((n, 1), np.int32),
            "scales": np.zeros((n, 8), np.float16)}
    rule = "version must be 'gemm' for awq, whose qweight is int32 .K, N/8., got the layout "
    for tensors, name in ((fast, "gemv_fast"), (gemv, "gemv")):
        with pytest.raises(NotImplementedError, match=rule + f"'{name}'"):
            awq.read(tensors)
    with pytest.raises(NotImplementedError, match=rule + "'gemv_fast'"):
        awq.read(Matrix().awq(), version="GEMV_fast")
    with pytest.raises(ValueError, match=r"qzeros must have shape \[2, 2\]"):
        awq.read({**Matrix().awq(), "qzeros": np.zeros((2, 3), np.int32)})


# ---- one matrix in every format

def test_every_format_says_the_same():
    matrix = Matrix(4, (16, 64), 32)
    assert {0, 15} <= set(matrix.zeros.flat)
    weights = [gptq.read(matrix.gptq(-1)), gptq.read(matrix.gptq(0), checkpoint_format="gptq_v2"),
               awq.read(matrix.awq()), compressed_tensors.read(matrix.compressed())]
    for weight in weights:
        assert np.array_equal(dequantized(weight), matrix.weight()), weight.format
        (segment,) = weight.segments                    # not only their product
        assert np.array_equal(segment.codes, matrix.codes.T) and np.array_equal(segment.scale, matrix.scales.T)
        assert np.array_equal(segment.zero + np.float16(8), matrix.zeros.T)


def test_every_format_says_the_same_of_a_symmetric_weight():
    matrix = Matrix(4, (16, 64), 32, symmetric=True)
    weights = [gptq.read(matrix.gptq(-1)), gptq.read(matrix.gptq(0), checkpoint_format="gptq_v2"),
               awq.read(matrix.awq()), compressed_tensors.read(matrix.compressed())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights += [gptq.read(matrix.gptq(0)), gptq.read(matrix.gptq(-1), checkpoint_format="gptq_v2")]
    for weight in weights:
        assert weight.segments[0].zero is None
        assert np.array_equal(dequantized(weight), matrix.weight()), weight.format


# ---- compressed-tensors

def test_compressed_by_hand():
    """q = -8 .. -1 along K; zero points 1, 0, 1, 0... are fields 9, 8, 9, 8... down N."""
    tensors = frozen(weight_packed=int32([[0x76543210]] * 8), weight_scale=np.ones((8, 1), np.float32),
                     weight_zero_point=int32([[0x89898989]]), weight_shape=np.array([8, 8]))
    expected = np.arange(-8, 0)[None] - (np.arange(8) % 2 == 0)[:, None]
    assert np.array_equal(dequantized(compressed_tensors.read(tensors)), expected)


@DTYPES
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("k, group", [(96, 32), (96, -1), (104, 32), (1024, 128)])
def test_compressed(bits, k, group, dtype):
    matrix = Matrix(bits, (16, k), k if group == -1 else group, dtype)
    tensors = matrix.compressed()
    assert np.array_equal(dequantized(compressed_tensors.read(tensors, bits, group)), matrix.weight())
    del tensors["weight_zero_point"]
    matrix.zeros[:] = 1 << bits - 1
    weight = compressed_tensors.read(tensors, bits, group)
    assert weight.segments[0].zero is None and np.array_equal(dequantized(weight), matrix.weight())


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("shape", [(64, 1024), (16, 40), (8, 24), (64, 48)])
def test_compressed_of_whole_codes_in_a_word(bits, shape):
    matrix = Matrix(bits, shape, shape[1])
    for pack in (packed_along, packed_whole):
        weight = compressed_tensors.read(matrix.compressed(pack), bits, -1)
        assert np.array_equal(dequantized(weight), matrix.weight())


def test_compressed_bits_from_the_shapes():
    for bits in (2, 3, 4, 5, 6, 8):
        for pack in (packed_along, packed_whole):
            matrix = Matrix(bits, (16, 1024), 128)
            assert compressed_tensors.read(matrix.compressed(pack)).segments[0].bits == bits


def test_compressed_g_idx():
    g_idx = np.random.default_rng(1).permutation(np.arange(96) // 32)
    matrix = Matrix(4, (16, 96), g_idx=g_idx)
    weight = compressed_tensors.read(matrix.compressed(weight_g_idx=g_idx.astype(np.int32)))
    assert weight.order is not None and np.array_equal(dequantized(weight), matrix.weight())
    matrix = Matrix(4, (16, 96))
    weight = compressed_tensors.read(matrix.compressed(weight_g_idx=np.full(96, -1, np.int32)))
    assert weight.order is None and np.array_equal(dequantized(weight), matrix.weight())


def test_compressed_zero_points_as_int8():
    matrix = Matrix(4, (16, 64), 32)
    tensors = {**matrix.compressed(), "weight_zero_point": (matrix.zeros.T - 8).astype(np.int8)}
    assert np.array_equal(dequantized(compressed_tensors.read(tensors)), matrix.weight())


@pytest.mark.parametrize("scale_shape", [(16, 1), (16, 2), (1,), ()])
def test_compressed_naive_int8(scale_shape):
    rng = np.random.default_rng(2)
    weight = rng.integers(-128, 128, (16, 64)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, scale_shape).astype(BFLOAT16)
    zero = rng.integers(-128, 128, scale_shape).astype(np.int8)
    wide = [np.repeat(a, 32, axis=1) if a.shape == (16, 2) else a for a in (scale, np.asarray(zero))]
    tensors = frozen(weight=weight, weight_scale=scale)
    assert np.array_equal(dequantized(compressed_tensors.read(tensors)), weight * wide[0].astype(np.float64))
    tensors["weight_zero_point"] = np.asarray(zero)
    expected = (weight.astype(np.float64) - wide[1]) * wide[0].astype(np.float64)
    assert np.array_equal(dequantized(compressed_tensors.read(tensors)), expected)


def test_compressed_refuses():
    good = Matrix(4, (16, 64)).compressed()
    with pytest.raises(NotImplementedError, match="bits must be one of"):
        compressed_tensors.read(good, 7)
    with pytest.raises(ValueError, match="bits must follow from the shapes"):
        compressed_tensors.read(good, 8)
    with pytest.raises(ValueError, match="weight_packed must have 24 rows"):
        compressed_tensors.read({**good, "weight_shape": np.array([24, 64])})
    with pytest.raises(ValueError, match=r"weight_zero_point must have shape \[2, 2\], got \[3, 2\]"):
        compressed_tensors.read({**good, "weight_zero_point": np.zeros((3, 2), np.int32)})
    with pytest.raises(ValueError, match="tensors must have 'weight', got weight_scale"):
        compressed_tensors.read({"weight_scale": good["weight_scale"]})
    with pytest.raises(TypeError, match="weight_scale must be float16 or bfloat16 or float32, got float64"):
        compressed_tensors.read({**good, "weight_scale": np.ones(1)})


# ---- HQQ

def hqq_words(parts, bits):
    """Codes [R, group_size] as W_q: field p from the top of a word is row p * (R / fields)."""
    if bits in (5, 6, 8):
        return parts.astype(np.uint8)
    fields, dtype = {4: (2, np.uint8), 2: (4, np.uint8), 3: (10, np.int32)}[bits]
    step = -(-len(parts) // fields)
    words = np.zeros((step, parts.shape[1]), np.int64)
    for r, i in np.ndindex(parts.shape):
        words[r % step, i] |= int(parts[r, i]) << bits * (fields - 1 - r // step)
    return words.astype(dtype)


def hqq_tensors(bits, shape=(16, 64), group=32, dtype=np.float16, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 1 << bits, (shape[0] * shape[1] // group, group))
    scale = rng.uniform(0.01, 0.02, (len(parts), 1)).astype(dtype)
    zero = rng.uniform(0, (1 << bits) - 1, (len(parts), 1)).astype(dtype)
    expected = (parts - zero.astype(np.float64)) * scale.astype(np.float64)
    return frozen(W_q=hqq_words(parts, bits), scale=scale, zero=zero), expected.reshape(shape)


def test_hqq_by_hand():
    """4 bits: row 0 of two is the high nibble. 3 bits: row 0 of ten is bits 27-29."""
    ones = np.ones((16, 1), np.float32)
    weight = hqq.read(frozen(W_q=np.full((8, 8), 0x2E, np.uint8), scale=ones, zero=ones * 1.5), shape=(16, 8))
    assert np.array_equal(dequantized(weight), np.repeat([[0.5], [12.5]], 8, axis=0) * np.ones(8))
    word = 0b101 << 27 | 0b110 << 24 | 0b011
    weight = hqq.read(frozen(W_q=np.full((4, 8), word, np.int32), scale=np.ones((40, 1), np.float32),
                             zero=np.zeros((40, 1), np.float32)), shape=(40, 8))
    assert dequantized(weight)[::4, 0].tolist() == [5, 6, 0, 0, 0, 0, 0, 0, 0, 3]


@DTYPES
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_hqq(bits, dtype, group):
    tensors, expected = hqq_tensors(bits, group=group, dtype=dtype)
    assert np.array_equal(dequantized(hqq.read(tensors, bits, (16, 64))), expected)
    if bits not in (5, 6):
        assert hqq.read(tensors, shape=(16, 64)).segments[0].bits == bits
    meta = frozen(nbits=np.array(bits, np.int32), axis=np.array(1), shape=np.array([16, 64]))
    assert np.array_equal(dequantized(hqq.read({**tensors, **meta})), expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_hqq_bytes_seen_as_floats(bits):
    tensors, expected = hqq_tensors(bits)
    tensors["W_q"] = tensors["W_q"].view(np.float16)
    assert np.array_equal(dequantized(hqq.read(tensors, shape=(16, 64))), expected)


def test_hqq_refuses():
    tensors, _ = hqq_tensors(4)
    with pytest.raises(NotImplementedError, match="axis must be 1 for hqq, got 0"):
        hqq.read({**tensors, "axis": np.array(0)}, shape=(16, 64))
    with pytest.raises(NotImplementedError, match="axis must be 1 for hqq, got 0"):
        hqq.read({**tensors, "scale": tensors["scale"].T}, shape=(16, 64))
    with pytest.raises(NotImplementedError, match="must not be quantized themselves for hqq, got .'zero_q'"):
        hqq.read({"W_q": tensors["W_q"], "scale": tensors["scale"], "zero_q": tensors["zero"]}, shape=(16, 64))
    with pytest.raises(NotImplementedError, match=r"bits must be one of .* for hqq, got 1.58"):
        hqq.read({**tensors, "nbits": np.array(1.58)}, shape=(16, 64))
    with pytest.raises(ValueError, match="shape must be given for hqq"):
        hqq.read(tensors)
    with pytest.raises(ValueError, match="scale must have 64 rows"):
        hqq.read(tensors, shape=(32, 64))
    with pytest.raises(NotImplementedError, match="in_features must be a multiple of group_size for hqq, got 8 and 32"):
        hqq.read(tensors, shape=(128, 8))


# ---- EXL2

def half(x):
    """Nearest half, by the standard library."""
    return struct.unpack("e", struct.pack("e", x))[0]


def exl2_tensors(groups, padded, seed=0):
    """`groups`: (bits, rows) of each. Returns the tensors and the weight [K, Npad], one number at a time."""
    rng = np.random.default_rng(seed)
    k = sum(rows for _, rows in groups)
    codes = [rng.integers(0, 1 << bits, (rows, padded)) for bits, rows in groups]
    words = [packed_down(c, bits) for c, (bits, _) in zip(codes, groups, strict=True)]
    starts = np.cumsum([0] + [len(w) for w in words[:-1]])
    nibbles = rng.integers(0, 16, (len(groups), padded))
    largest = rng.uniform(0.0005, 0.02, len(groups)).astype(np.float16)
    perm = rng.permutation(k)   # row r of the packed matrix is row perm[r] of the weight
    weight, r = np.empty((k, padded)), 0
    for g, (bits, rows) in enumerate(groups):
        for i in range(rows):
            for n in range(padded):
                scale = half(half((int(nibbles[g, n]) + 1) ** 2) * half(float(largest[g]) / 256))
                weight[perm[r], n] = (int(codes[g][i, n]) - (1 << bits - 1)) * scale
            r += 1
    return frozen(q_weight=np.concatenate(words), q_invperm=np.argsort(perm).astype(np.int32),
                  q_scale=packed_along(nibbles, 4), q_scale_max=largest,
                  q_groups=np.stack([[b for b, _ in groups], starts], axis=1).reshape(-1).astype(np.int16)), weight


@pytest.mark.parametrize("groups, segments", [
    ([(4, 32)], [(4, 32)]),
    ([(8, 32), (6, 32), (5, 64), (5, 64), (4, 32), (3, 32), (3, 32), (3, 32), (2, 16)],
     [(8, 32), (6, 32), (5, 64), (4, 32), (3, 32), (2, 16)]),
    ([(6, 32), (6, 64), (4, 128), (4, 8)], [(6, 32), (4, 128)]),      # groups of 32 and 64: halves with one scale
    ([(3, 32), (3, 8)], [(3, 32)]),                                   # 24 bits in the last word
    ([(5, 64), (4, 32), (5, 32)], [(5, 64), (4, 32), (5, 32)]),
])
def test_exl2(groups, segments):
    tensors, expected = exl2_tensors(groups, 32)
    weight = exl2.read(tensors)
    assert [(s.bits, s.group) for s in weight.segments] == segments
    assert all(s.scale.dtype == np.float16 and s.zero is None for s in weight.segments)
    assert np.array_equal(dequantized(weight), expected.T)
    assert np.array_equal(dequantized(exl2.read(tensors, out_features=24)), expected.T[:24])


def test_exl2_scale_by_hand():
    """0.0008 is 0.00080013 as a half, of which 1/256 is 52.44 steps of 2^-24, rounded to 52; 16^2 steps of that."""
    tensors = frozen(q_weight=int32([[0x99999999] * 8]), q_invperm=np.arange(8, dtype=np.int32),
                     q_scale=int32([[0xFFFFFFFF]]), q_scale_max=np.array([0.0008], np.float16),
                     q_groups=np.array([4, 0], np.int16))
    weight = exl2.read(tensors)
    assert weight.order is None
    assert (dequantized(weight) == 256 * 52 * 2.0 ** -24).all()


def test_exl2_starts_past_int16():
    """Word rows from 32768 on come as negative int16."""
    words = np.zeros((40000, 8), np.int32)
    words[36000:] = -1
    tensors = {"q_weight": words, "q_invperm": np.arange(160000, dtype=np.int32),
               "q_scale": np.zeros((2, 1), np.int32), "q_scale_max": np.ones(2, np.float16),
               "q_groups": np.array([8, 0, 8, 36000 - 65536], np.int16)}
    weight = exl2.read(tensors)
    assert [s.group for s in weight.segments] == [144000]
    assert (weight.segments[0].codes == (np.arange(160000) >= 144000) * 255).all()


def test_exl2_refuses():
    good, _ = exl2_tensors([(4, 32), (3, 32)], 32)
    with pytest.raises(ValueError, match="q_invperm must be a permutation of 64 rows"):
        exl2.read({**good, "q_invperm": np.zeros(64, np.int32)})
    with pytest.raises(ValueError, match="q_weight must have words for 72 rows"):
        exl2.read({**good, "q_invperm": np.arange(72, dtype=np.int32)})
    with pytest.raises(ValueError, match="q_groups must have bits in .*, got .7."):
        exl2.read({**good, "q_groups": np.array([7, 0, 3, 4], np.int16)})
    with pytest.raises(ValueError, match="q_groups must start at row 0"):
        exl2.read({**good, "q_groups": np.array([4, 4, 3, 0], np.int16)})
    with pytest.raises(ValueError, match="q_groups must give each group a whole number of rows"):
        exl2.read({**good, "q_groups": np.array([6, 0, 3, 4], np.int16)})
    with pytest.raises(ValueError, match=r"q_scale must have shape \[2, 4\]"):
        exl2.read({**good, "q_scale": good["q_scale"][:1]})
    with pytest.raises(ValueError, match="q_weight must have 40 columns"):
        exl2.read(good, out_features=40)


# ---- shapes

def test_features_are_multiples_of_eight():
    rule = "shape must be .out_features, in_features., multiples of 8, got "
    cases = [
        (gptq, Matrix(8, (12, 32)).gptq(), {}), (gptq, Matrix(8, (16, 36)).gptq(), {"group_size": 32}),
        (awq, {"qweight": np.zeros((36, 2), np.int32), "qzeros": np.zeros((1, 2), np.int32),
               "scales": np.zeros((1, 16), np.float16)}, {}),
        (compressed_tensors, Matrix(8, (16, 36)).compressed(), {}),
        (compressed_tensors, Matrix(8, (12, 64)).compressed(), {}),
        (hqq, hqq_tensors(8, (12, 64))[0], {"shape": (12, 64)}),
        (exl2, exl2_tensors([(4, 32)], 32)[0], {"out_features": 20}),
    ]
    for module, tensors, arguments in cases:
        with pytest.raises(ValueError, match=rule):
            module.read(tensors, **arguments)


def test_detect_feeds_the_reader():
    matrix = Matrix(4, (16, 64), 32)
    config = {"quantization_config": {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}}
    for tensors, module in ((matrix.gptq(0), gptq), (matrix.awq(), awq), (matrix.compressed(), compressed_tensors)):
        name, arguments = detect(tensors, config)
        assert module.__name__ == f"cupyattn.quant.{name}"
        assert np.array_equal(module.read(tensors, **arguments).dequantize(), matrix.weight())
