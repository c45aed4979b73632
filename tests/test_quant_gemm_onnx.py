# SPDX-License-Identifier: Apache-2.0
"""quant_gemm and dequantize against onnxruntime's CPU kernels MatMulNBits and GatherBlockQuantized."""

import families
import numpy as np
import pytest
from compare import assert_same_bits
from families import FAMILIES, error
from test_attention import onnx_run
from test_formats_integer import hqq_words, packed_along

from cupyattn import QMatrix
from cupyattn.quant.coded import CodedWeight, Segment

N, K = 40, 512


def bytes_of(fields, bits):
    """Fields of the last axis, low bits first, as both operators want codes and zero points."""
    each = 8 // bits
    fields = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, -fields.shape[-1] % each)])
    return (fields.reshape(*fields.shape[:-1], -1, each) << bits * np.arange(each)).sum(-1).astype(np.uint8)


class Weight:
    """Codes [N, K], scales float16 and zero points [N, groups]: integers, none (2^(bits-1)), or float16."""

    def __init__(self, bits, group, zeros):
        rng = np.random.default_rng((bits, group))
        self.bits, self.group, groups = bits, group, K // group
        self.codes = rng.integers(0, 1 << bits, (N, K))
        self.scales = rng.uniform(0.01, 0.02, (N, groups)).astype(np.float16)
        self.zeros = {"none": None, "integers": rng.integers(0, 1 << bits, (N, groups)),
                      "floats": rng.uniform(0, (1 << bits) - 1, (N, groups)).astype(np.float16)}[zeros]

    def inputs(self):
        """Of either operator, behind x or indices."""
        zeros = self.zeros
        if zeros is not None:
            zeros = zeros.astype(np.float32) if zeros.dtype == np.float16 else bytes_of(zeros, self.bits)
        return {"codes": bytes_of(self.codes, self.bits), "scales": self.scales.astype(np.float32), "zeros": zeros}

    def product(self, x):
        """x @ W.T by onnxruntime, in float32."""
        from onnx import helper

        inputs = self.inputs()
        inputs["codes"] = inputs["codes"].reshape(N, K // self.group, -1)
        node = helper.make_node(
            "MatMulNBits", ["x", *(name for name, a in inputs.items() if a is not None)], ["y"], K=K, N=N,
            domain="com.microsoft", bits=self.bits, block_size=self.group, accuracy_level=1)
        return onnx_run(node, {"x": x.astype(np.float32), **inputs}, {"y": np.float32})[0]

    def matrices(self):
        """Ours of the same codes. MatMulNBits' bytes are the stream that GPTQ and compressed-tensors have in words."""
        words = bytes_of(self.codes, self.bits).view(np.int32)
        if self.zeros is None:
            yield QMatrix.from_compressed_tensors({"weight_packed": words, "weight_scale": self.scales},
                                                  self.bits, self.group)
        elif self.zeros.dtype == np.float16:
            parts = self.codes.reshape(-1, self.group)
            yield QMatrix.from_hqq({"W_q": hqq_words(parts, self.bits), "scale": self.scales.reshape(-1, 1),
                                    "zero": self.zeros.reshape(-1, 1)}, self.bits, (N, K))
        else:
            yield QMatrix.from_gptq({"qweight": words.T, "scales": self.scales.T,
                                     "qzeros": packed_along(self.zeros.T, self.bits)},
                                    self.bits, self.group, checkpoint_format="gptq_v2")
            signed = (self.zeros - (1 << self.bits - 1)).astype(np.int8)
            yield QMatrix.from_compressed_tensors({"weight_packed": words, "weight_scale": self.scales,
                                                   "weight_zero_point": signed}, self.bits, self.group)


CASES = [(bits, zeros) for bits in (2, 4, 8) for zeros in ("none", "integers", "floats")
         if (bits, zeros) != (8, "floats")]   # which onnxruntime lacks


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits, zeros", CASES)
def test_products(bits, zeros, group):
    weight = Weight(bits, group, zeros)
    matrices = list(weight.matrices())
    for name in FAMILIES:
        with families.forced(name) as family:
            m = family.some_tokens[0]
            x = np.random.default_rng(m).standard_normal((m, K)).astype(np.float16)
            want = weight.product(x)
            for matrix in matrices:
                found = error(family.product(x, matrix), want)
                assert found <= 1e-5, f"{name}, {matrix!r}: {found:.2e}"


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights(bits, group):
    """Numbers, not products: to the bit."""
    from onnx import helper

    weight = Weight(bits, group, "integers")
    node = helper.make_node("GatherBlockQuantized", ["codes", "rows", "scales", "zeros"], ["w"], block_size=group,
                            domain="com.microsoft", bits=bits, gather_axis=0, quantize_axis=1)
    inputs = weight.inputs()
    (want,) = onnx_run(node, {"codes": inputs.pop("codes"), "rows": np.arange(N), **inputs}, {"w": np.float32})
    for matrix in weight.matrices():
        assert_same_bits(matrix.reconstruct(), want)


def test_hand_over_of_coded_weights():
    """`from_coded`, which all readers go through, with nothing of theirs."""
    weight = Weight(4, 32, "integers")
    segment = Segment(weight.codes.astype(np.uint8), 4, "int", 32, weight.scales, 8,
                      (weight.zeros - 8).astype(np.float16))
    x = np.random.default_rng(0).standard_normal((3, K)).astype(np.float32)
    assert error(QMatrix.from_coded(CodedWeight("made here", (N, K), (segment,))).matmul(x), weight.product(x)) <= 1e-6
