# SPDX-License-Identifier: Apache-2.0
"""Formats told by the names, dtypes and shapes of a weight's tensors, and what config.json adds."""

import ml_dtypes
import numpy as np
import pytest

from cupyattn.quant.detect import detect

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


GPTQ = {"qweight": zeros(np.int32, 8, 16), "qzeros": zeros(np.int32, 1, 2), "scales": zeros(np.float16, 1, 16)}
AWQ = {"qweight": zeros(np.int32, 64, 2), "qzeros": zeros(np.int32, 1, 2), "scales": zeros(np.float16, 1, 16)}
CT4 = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128, "type": "int"}}}}


@pytest.mark.parametrize("tensors, config, name, arguments", [
    (GPTQ, None, "gptq", {}),
    ({**GPTQ, "g_idx": zeros(np.int32, 64), "bias": zeros(np.float16, 16)},
     {"quantization_config": {"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2", "sym": True,
                              "quant_method": "gptq", "desc_act": False}}, "gptq",
     {"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2", "sym": True}),
    (GPTQ, {"bits": 4, "group_size": 128, "sym": False, "dynamic": {"+:lm_head": {"bits": 8}}}, "gptq",
     {"sym": False}),
    (AWQ, {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "awq",
     {"bits": 4, "group_size": 128, "version": "gemm"}),
    ({**AWQ, "qweight": zeros(np.int16, 4, 16)}, None, "awq", {}),
    ({"q_weight": zeros(np.int32, 8, 32), "q_invperm": zeros(np.int32, 64)}, None, "exl2", {}),
    ({"W_q": zeros(np.uint8, 8, 64), "scale": zeros(np.float16, 16, 1), "zero": zeros(np.float16, 16, 1)},
     {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}, "hqq",
     {"bits": 4, "axis": 1}),
    ({"weight_packed": zeros(np.int32, 8, 8), "weight_scale": zeros(BFLOAT16, 8, 1)}, CT4, "compressed_tensors",
     {"bits": 4, "group_size": 128}),
    ({"weight": zeros(np.int8, 8, 8), "weight_scale": zeros(np.float32, 8, 1)}, None, "compressed_tensors", {}),
    ({"weight_packed": zeros(np.uint8, 8, 8), "weight_scale": zeros(E4M3, 8, 1),
      "weight_global_scale": zeros(np.float32, 1)}, None, "nvfp4", {}),
    ({"weight": zeros(np.uint8, 8, 8), "weight_scale": zeros(E4M3, 8, 1), "weight_scale_2": zeros(np.float32, 1)},
     None, "nvfp4", {}),
    ({"weight_packed": zeros(np.uint8, 8, 16), "weight_scale": zeros(np.uint8, 8, 1)}, None, "mxfp4", {}),
    ({"blocks": zeros(np.uint8, 8, 1, 16), "scales": zeros(np.uint8, 8, 1)}, None, "mxfp4", {}),
    ({"weight": zeros(E4M3, 8, 8), "weight_scale_inv": zeros(np.float32, 1, 1)},
     {"quant_method": "fp8", "weight_block_size": [64, 128]}, "fp8", {"block": (64, 128)}),
    ({"weight": zeros(E4M3, 8, 8), "weight_scale": zeros(np.float32, 1, 1)},
     {"config_groups": {name: {"weights": {"block_structure": [128, 64]}} for name in "ab"}}, "fp8",
     {"block": (128, 64)}),
    ({"weight_packed": zeros(np.int32, 8, 8), "weight_scale": zeros(BFLOAT16, 8, 1)},
     {"config_groups": {"a": {"weights": {"num_bits": 4, "group_size": None}}, "b": {"weights": {"num_bits": 8}}}},
     "compressed_tensors", {}),
    ({"weight": zeros(E4M3, 8, 8), "weight_scale": zeros(np.float32, 1)}, None, "fp8", {}),
    ({"weight": zeros(np.uint8, 32, 1), "weight.absmax": zeros(np.float32, 1),
      "weight.quant_state.bitsandbytes__nf4": zeros(np.uint8, 9)}, None, "bitsandbytes", {}),
    ({"weight": zeros(np.uint8, 32, 1), "absmax": zeros(np.float32, 1)}, {"bnb_4bit_quant_type": "fp4"},
     "bitsandbytes", {}),
    ({"weight": zeros(BFLOAT16, 8, 8), "bias": zeros(BFLOAT16, 8)}, {"bits": 4}, "dense", {}),
])
def test_detect(tensors, config, name, arguments):
    assert detect(tensors, config) == (name, arguments)


def test_detect_refuses():
    with pytest.raises(NotImplementedError, match="EXL3"):
        detect({"trellis": zeros(np.int16, 1, 1, 64), "suh": zeros(np.float16, 16)})
    with pytest.raises(NotImplementedError, match="LLM.int8"):
        detect({"weight": zeros(np.int8, 8, 8), "SCB": zeros(np.float32, 8)})
    with pytest.raises(ValueError, match="must be a weight of a known format, got gamma"):
        detect({"gamma": zeros(np.float32, 8)})
    with pytest.raises(ValueError, match="got weight of int16 with bias"):
        detect({"weight": zeros(np.int16, 8, 8), "bias": zeros(np.float32, 8)})
