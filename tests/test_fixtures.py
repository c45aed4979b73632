# SPDX-License-Identifier: Apache-2.0
"""Readers against weights that each ecosystem's own package packed and dequantized: tests/fixtures/README.md."""

import importlib
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from cupyattn.quant import gguf
from cupyattn.quant.detect import detect

FOLDER = pathlib.Path(__file__).parent / "fixtures"
PACKED = {
    "gptqmodel": """
        2bit_g16_asym_v2 2bit_g32_sym_v1 3bit_g32_asym_v1_wrapped 3bit_g32_desc_act_asym_v1 3bit_g32_sym_v1
        3bit_g64_asym_v2 4bit_all_sym_v1 4bit_g32_asym_v1 4bit_g32_asym_v1_borrowed
        4bit_g32_asym_v2 4bit_g32_desc_act_asym_v2 4bit_g32_desc_act_uneven_sym_v1 4bit_g32_sym_v1 4bit_g32_sym_v2
        4bit_g64_short_group_asym_v2
        8bit_g32_asym_v2 8bit_g32_sym_v1""",
    "auto_gptq": """
        2bit_g32_sym_v1 3bit_g32_desc_act_asym_v1 4bit_g32_asym_v1 4bit_g32_desc_act_uneven_sym_v1 8bit_g32_sym_v1""",
    "autoawq": "4bit_all 4bit_g32 4bit_g64",
    "compressed_tensors": """
        fp8_block fp8_channel fp8_tensor int8_channel_asym int8_channel_sym mxfp4 nvfp4 old_w3a16_channel_sym
        old_w3a16_g64_asym old_w4a16_g32_actorder w2a16_g32_sym w3a16_g64_asym
        w4a16_channel_asym w4a16_g32_sym w4a16_g64_asym w6a16_g32_asym w8a16_channel_sym w8a16_g32_asym""",
    "bitsandbytes": "fp4 fp4_double_b128 nf4 nf4_double",
    "hqq": "2bit_g16 3bit_g64 4bit_g32 4bit_g64 8bit_g32",
    "gguf": "mxfp4 q4_0 q4_1 q5_0 q5_1 q8_0",
    "xllamacpp": "iq4_nl iq4_xs mxfp4 nvfp4 q2_k q3_k q4_0 q4_1 q4_k q5_0 q5_1 q5_k q6_k q8_0",
    "transformers": "fp8_block mxfp4_read_only",
    "nvidia_modelopt": "nvfp4",
}
NAMES = [f"{package}_{what}" for package, names in PACKED.items() for what in names.split()]
# Packages whose own float32 arithmetic rounds more than once: (code - zero) * scale, code * (scale * number).
# Each rounding moves a number by 2^-24 of itself; all others agree to the bit.
ROUNDED = ("hqq_", "compressed_tensors_nvfp4", "nvidia_modelopt_nvfp4")


def load(name):
    """(tensors, expected, made_by) of a fixture."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    made_by = json.loads(str(arrays.pop("made_by")))
    expected = arrays.pop("expected")
    for tensor, dtype in made_by["dtypes"].items():
        arrays[tensor] = arrays[tensor].view(getattr(ml_dtypes, dtype))
    return arrays, expected, made_by


def read(name):
    """(CodedWeight of our reader, expected, made_by)."""
    tensors, expected, made_by = load(name)
    if "data" in tensors:
        kind = (made_by["options"].get("qtype") or made_by["options"]["type"]).lower()
        return gguf.read(tensors["data"], kind, expected.shape), expected, made_by
    kind, arguments = detect(tensors, made_by["config"])
    reader = importlib.import_module(f"cupyattn.quant.{kind}")
    return reader.read(tensors, **arguments), expected, made_by


@pytest.mark.parametrize("name", NAMES)
def test_reader_says_what_the_package_says(name):
    coded, expected, _ = read(name)
    assert coded.shape == expected.shape
    found = coded.dequantize().astype(np.float32)
    wrong = found != expected
    if name.startswith(ROUNDED):
        wrong = np.abs(found - expected) > 2.0 ** -23 * np.abs(expected)
    worst = np.unravel_index(np.abs(found - expected).argmax(), found.shape)
    assert not wrong.any(), f"{wrong.sum()} differ; the worst at {worst}: {found[worst]} for {expected[worst]}"


def test_folder_is_the_list():
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.npz")}
    assert sorted(files) == sorted(NAMES)
    assert max(files.values()) <= 64 * 1024 and sum(files.values()) < 1e6


@pytest.mark.parametrize("name", NAMES)
def test_made_by_names_package_and_version(name):
    _, _, made_by = load(name)
    readme = (FOLDER / "README.md").read_text()
    assert made_by["call"] and made_by["computed"]
    assert name.startswith(made_by["package"].replace("-", "_"))
    assert f"| {made_by['package']} | {made_by['version']} |" in readme
