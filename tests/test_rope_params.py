# SPDX-License-Identifier: Apache-2.0
"""RopeParams against published frequencies and an independent scalar model."""

import math

import numpy as np
import pytest

from cupyattn.rope_params import RopeKernelParam, RopeParams

YARN = {"rotary_dim": 128, "base": 1e6, "scaling": "yarn", "factor": 4.0, "original_max_position": 32768}
LLAMA3 = {"rotary_dim": 128, "base": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position": 8192}
DYNAMIC = {"rotary_dim": 128, "scaling": "dynamic", "factor": 2.0, "original_max_position": 4096}
LONGROPE = {"rotary_dim": 96, "scaling": "longrope", "factor": 32.0, "original_max_position": 4096,
            "short_factor": tuple(1 + 0.01 * j for j in range(48)), "long_factor": tuple(1 + j for j in range(48))}
EVERY = {
    "none": {"rotary_dim": 128},
    "partial": {"rotary_dim": 24, "base": 1e6},
    "linear": {"rotary_dim": 128, "scaling": "linear", "factor": 4.0},
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn-gpt-oss": {"rotary_dim": 64, "base": 150000.0, "scaling": "yarn", "factor": 32.0,
                     "original_max_position": 4096, "truncate": False},
    "llama3": LLAMA3,
    "ntk": {"rotary_dim": 128, "scaling": "ntk", "alpha": 1000.0},
    "longrope": LONGROPE,
}


def frequency(j, *, rotary_dim, base=1e4, scaling="none", factor=1.0, original_max_position=None, truncate=True,
              alpha=1.0, short_factor=None, long_factor=None, prompt_len=0):
    """One pair's frequency from scalars, through base-2 exponents and per-pair rules as in TurboMind."""
    m = original_max_position
    if scaling == "dynamic" and factor > 1 and prompt_len > m:
        base = base * (factor * prompt_len / m - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    if scaling == "ntk":
        base = base * alpha ** (rotary_dim / (rotary_dim - 2))
    f = 2.0 ** (2 * j * (-math.log2(base) / rotary_dim))
    if scaling == "linear":
        return f / factor
    if scaling == "longrope":
        return f / (long_factor if prompt_len > m else short_factor)[j]
    if scaling == "yarn":
        def d(r):
            return rotary_dim * math.log(m / (2 * math.pi * r)) / (2 * math.log(base))

        low, high = d(32), d(1)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        a = min(max((j - low) / (high - low), 0), 1)
        return f * (1 - a) + f / factor * a
    if scaling == "llama3":
        wavelength = 2 * math.pi / f
        if wavelength < m / 4:
            return f
        if wavelength > m / 1:
            return f / factor
        s = (m / wavelength - 1) / (4 - 1)
        return (1 - s) * f / factor + s * f
    return f


@pytest.mark.parametrize("name", EVERY)
def test_frequencies_match_scalar_model(name):
    options = EVERY[name]
    for prompt_len in (0, 4096, 9000):
        expected = [frequency(j, prompt_len=prompt_len, **options) for j in range(options["rotary_dim"] // 2)]
        actual = RopeParams(**options).inv_freq(prompt_len)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-13)


@pytest.mark.parametrize(("options", "prompt_len", "digits", "golden"), [
    ({"rotary_dim": 128}, None, 6, {0: 1.0, 1: 0.865964, 2: 0.749894, 63: 1.15478e-4}),
    ({"rotary_dim": 128, "scaling": "linear", "factor": 4.0}, None, 6, {1: 0.216491}),
    (DYNAMIC, 8192, 6, {1: 0.850994, 63: 3.84927e-5}),
    (DYNAMIC, 4096, 6, {1: 0.865964, 63: 1.15478e-4}),
    (YARN, None, 7, {20: 1.333521e-2, 30: 1.064361e-3, 40: 4.445699e-5, 63: 3.102344e-7}),
    (LLAMA3, None, 7, {28: 3.211446e-3, 30: 1.371894e-3, 32: 5.248462e-4, 35: 9.556212e-5, 63: 3.068926e-7}),
])
def test_published_frequencies(options, prompt_len, digits, golden):
    freq = RopeParams(**options).inv_freq(prompt_len)
    assert {pair: float(f"{freq[pair]:.{digits}g}") for pair in golden} == golden


def test_dynamic_base():
    freq = RopeParams(**DYNAMIC).inv_freq(8192)
    assert freq[1] ** (-128 / 2) == pytest.approx(30527.737, rel=1e-7)


def test_dynamic_prompt_lengths_per_sequence():
    rope = RopeParams(**DYNAMIC)
    freq = rope.inv_freq(np.array([100, 4096, 8192, 20000]))
    assert freq.shape == (4, 64)
    for row, prompt_len in zip(freq, (100, 4096, 8192, 20000), strict=True):
        np.testing.assert_array_equal(row, rope.inv_freq(prompt_len))
    np.testing.assert_array_equal(freq[0], freq[1])
    assert (freq[2, 1:] < freq[1, 1:]).all() and (freq[3, 1:] < freq[2, 1:]).all()
    # a mixed batch in one table: row i belongs to token i
    cos, sin = rope.tables_for(np.array([7, 9000, 5]), prompt_len=np.array([100, 8192, 8192]))
    for i, (position, prompt_len) in enumerate([(7, 100), (9000, 8192), (5, 8192)]):
        whole_cos, whole_sin = rope.tables(position + 1, prompt_len=prompt_len)
        np.testing.assert_array_equal(cos[i], whole_cos[position])
        np.testing.assert_array_equal(sin[i], whole_sin[position])


def test_bases():
    rope = RopeParams(**DYNAMIC)
    np.testing.assert_allclose(rope.bases(np.array([4096, 8192])), [10000, 30527.737], rtol=1e-7)
    np.testing.assert_array_equal(rope.inv_freq(base=rope.bases(8192)), rope.inv_freq(8192))
    assert RopeParams(rotary_dim=128, scaling="ntk", alpha=2.5).bases() == pytest.approx(1e4 * 2.5 ** (128 / 126))
    assert RopeParams(rotary_dim=2, base=77.0).bases() == 77.0


@pytest.mark.parametrize("name", EVERY)
def test_base_of_each_sequence(name):
    """A batch whose sequences have bases of their own is the rows of one table per base."""
    options = EVERY[name] | {"alpha": 1.0}
    bases = np.array([5e3, 1e4, 1e6], dtype=np.float32)
    sequence = np.array([2, 0, 0, 1, 2], dtype=np.int32)
    positions = np.array([0, 3, 700, 9, 5000], dtype=np.int32)
    cos, sin = RopeParams(**options).tables_for(positions, sequence=sequence, base=bases)
    for t, (b, p) in enumerate(zip(sequence, positions, strict=True)):
        # as if the base had been given to the constructor; with base= "dynamic" grows it no further
        whole = RopeParams(**options | {"base": float(bases[b])}).tables(5001)
        np.testing.assert_allclose(cos[t], whole[0][p], rtol=0, atol=2.0 ** -24)
        np.testing.assert_allclose(sin[t], whole[1][p], rtol=0, atol=2.0 ** -24)


def test_sequence_picks_the_prompt_length():
    rope = RopeParams(**LONGROPE)
    sequence, positions = np.array([1, 0, 1]), np.array([9, 9, 4])
    cos, _ = rope.tables_for(positions, sequence=sequence, prompt_len=np.array([4096, 4097]))
    np.testing.assert_array_equal(cos[0], rope.tables(10, prompt_len=5000)[0][9])
    np.testing.assert_array_equal(cos[1], rope.tables(10)[0][9])
    np.testing.assert_array_equal(cos[2], rope.tables(10, prompt_len=5000)[0][4])


@pytest.mark.parametrize(("interleaved", "golden"), [
    (False, [5, 5, 7, 7, 7, 9, 9, 9]), (True, [5, 7, 9, 5, 7, 9, 5, 7]),
])
def test_mrope(interleaved, golden):
    rope = RopeParams(rotary_dim=16, mrope_section=[2, 3, 3], mrope_interleaved=interleaved)
    assert np.array([5, 7, 9])[rope.mrope_axes()].tolist() == golden
    cos, sin = rope.tables_for(np.array([[5, 100], [7, 200], [9, 300]], dtype=np.int32))
    assert cos.shape == sin.shape == (2, 8)
    angle = np.array(golden) * rope.inv_freq()
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=2.0 ** -24)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=2.0 ** -24)
    angle = np.array([100, 200, 300])[(np.array(golden) - 5) // 2] * rope.inv_freq()
    np.testing.assert_allclose(cos[1], np.cos(angle), atol=2.0 ** -24)
    # text: three equal positions are the one-position table
    text = np.arange(6000)
    np.testing.assert_array_equal(rope.tables_for(np.stack([text] * 3))[0], rope.tables_for(text)[0])
    np.testing.assert_array_equal(rope.tables_for(text)[0], RopeParams(rotary_dim=16).tables(6000)[0])


def test_mrope_interleaved_sections_of_qwen3_vl():
    axes = RopeParams(rotary_dim=128, mrope_section=(24, 20, 20), mrope_interleaved=True).mrope_axes()
    assert [(axes == axis).sum() for axis in range(3)] == [24, 20, 20]
    assert axes[:60].tolist() == [0, 1, 2] * 20 and not axes[60:].any()


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_tables_where_the_positions_are(xp):   # the stand-in runs no kernels of CuPy's own
    rope = RopeParams(**YARN, mrope_section=(16, 24, 24))
    positions = np.array([[5, 100, 131071], [7, 4000, 131072], [9, 1, 2]], dtype=np.int32)
    bases, sequence = np.array([1e4, 1e6]), np.array([1, 0, 1], dtype=np.int32)
    expected = rope.tables_for(positions, sequence=sequence, base=bases)
    for base in (bases, xp.array(bases)):
        actual = rope.tables_for(xp.array(positions), sequence=xp.array(sequence), base=base)
        for a, e in zip(actual, expected, strict=True):
            assert isinstance(a, xp.module.ndarray) and a.dtype == np.float32
            np.testing.assert_allclose(xp.numpy(a), e, atol=2.0 ** -23)


HF = {
    "llama-2": ({"hidden_size": 4096, "num_attention_heads": 32}, {"rotary_dim": 128}),
    "llama-3.1": ({"head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072,
                   "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, LLAMA3),
    "linear": ({"head_dim": 128, "rope_scaling": {"type": "linear", "factor": 4.0}},
               {"rotary_dim": 128, "scaling": "linear", "factor": 4.0}),
    "internlm2": ({"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 32768,
                   "rope_scaling": {"type": "dynamic", "factor": 2.0}},
                  DYNAMIC | {"base": 1e6, "original_max_position": 32768}),
    "hunyuan": ({"head_dim": 128, "max_position_embeddings": 32768, "rope_scaling": {
        "type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}}, EVERY["ntk"]),
    "gpt-oss": ({"head_dim": 64, "rope_theta": 150000, "max_position_embeddings": 131072, "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}}, EVERY["yarn-gpt-oss"]),
    "yarn without factor": ({"head_dim": 64, "rope_theta": 150000, "max_position_embeddings": 131072,
                             "rope_scaling": {"rope_type": "yarn", "truncate": False,
                                              "original_max_position_embeddings": 4096}}, EVERY["yarn-gpt-oss"]),
    "deepseek-v3": ({"qk_rope_head_dim": 64, "model_type": "deepseek_v3", "max_position_embeddings": 163840,
                     "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                                      "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}},
                    {"rotary_dim": 64, "style": "interleaved", "scaling": "yarn", "factor": 40,
                     "original_max_position": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "phi-3": ({"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072,
               "original_max_position_embeddings": 4096, "rope_scaling": {
                   "type": "su", "short_factor": list(LONGROPE["short_factor"]),
                   "long_factor": list(LONGROPE["long_factor"])}}, LONGROPE),
    "phi-moe": ({"head_dim": 96, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
                 "rope_scaling": {"type": "longrope", "short_mscale": 1.24, "long_mscale": 1.24,
                                  "short_factor": list(LONGROPE["short_factor"]),
                                  "long_factor": list(LONGROPE["long_factor"])}},
                LONGROPE | {"attention_factor": 1.24}),
    "glm4": ({"head_dim": 128, "partial_rotary_factor": 0.5, "model_type": "glm4"},
             {"rotary_dim": 64, "style": "interleaved"}),
    "gpt-neox": ({"hidden_size": 6144, "num_attention_heads": 64, "rotary_pct": 0.25, "rotary_emb_base": 10000},
                 {"rotary_dim": 24}),
    "qwen2-vl": ({"hidden_size": 8192, "num_attention_heads": 64, "rope_theta": 1e6,
                  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
                 {"rotary_dim": 128, "base": 1e6, "mrope_section": (16, 24, 24)}),
    "qwen3-vl": ({"model_type": "qwen3_vl", "text_config": {"head_dim": 128, "rope_theta": 5e6, "rope_scaling": {
        "rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}}},
        {"rotary_dim": 128, "base": 5e6, "mrope_section": (24, 20, 20), "mrope_interleaved": True}),
    "rope_parameters": ({"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
                        {"rotary_dim": 128, "base": 1e6}),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face_configurations(name):
    config, fields = HF[name]
    assert RopeParams.from_hf_config(config) == RopeParams(**fields)


def test_hugging_face_layers_of_two_kinds():
    config = {"head_dim": 256, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    older = {"head_dim": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for c in (config, older):
        full = RopeParams.from_hf_config(c, layer_type="full_attention")
        assert full == RopeParams(rotary_dim=256, base=1e6, scaling="linear", factor=8.0)
        assert RopeParams.from_hf_config(c, layer_type="sliding_attention") == RopeParams(rotary_dim=256)
    with pytest.raises(ValueError, match="^RopeParams: layer_type must be one of .*sliding_attention.*, got None"):
        RopeParams.from_hf_config(config)


def test_hugging_face_objects_and_style():
    class Config:
        def to_dict(self):
            return {"head_dim": 64}

    assert RopeParams.from_hf_config(Config(), style="interleaved") == RopeParams(rotary_dim=64, style="interleaved")
    with pytest.raises(TypeError, match="^RopeParams: config must be a dict"):
        RopeParams.from_hf_config("config.json")


@pytest.mark.parametrize(("error", "words", "config"), [
    (ValueError, "config must have head_dim", {}),
    (ValueError, "config must have factor", {"rope_scaling": {"type": "linear"}}),
    (ValueError, "config must have max_position_embeddings", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    (ValueError, "config must have original_max_position_embeddings",
     {"rope_scaling": {"type": "llama3", "factor": 2}}),
    (ValueError, "config must have mrope_section", {"rope_scaling": {"type": "mrope"}}),
    (ValueError, "config must have short_factor", {"max_position_embeddings": 9, "rope_scaling": {"type": "su"}}),
    (TypeError, "factor must be a number", {"rope_scaling": {"type": "linear", "factor": "4"}}),
    (NotImplementedError, "RoPE of type 'proportional'", {"rope_scaling": {"type": "proportional"}}),
    (NotImplementedError, "short_mscale", {"max_position_embeddings": 9, "rope_scaling": {
        "type": "longrope", "short_mscale": 1.0, "long_mscale": 2.0}}),
])
def test_bad_configurations_are_named(error, words, config):
    with pytest.raises(error, match=f"^RopeParams: {words}"):
        RopeParams.from_hf_config(({"head_dim": 64} if "head_dim" not in words else {}) | config)


def test_yarn_range():
    assert RopeParams(**YARN).yarn_range() == (23, 40)
    assert RopeParams(**EVERY["yarn-gpt-oss"] | {"truncate": True}).yarn_range() == (8, 18)
    low, high = RopeParams(**EVERY["yarn-gpt-oss"]).yarn_range()
    assert (round(low, 2), round(high, 2)) == (8.09, 17.40)


def test_yarn_equal_ends_are_pulled_apart():
    rope = RopeParams(rotary_dim=8, scaling="yarn", factor=4.0, original_max_position=6)
    assert rope.yarn_range() == (0, 0.001)
    np.testing.assert_allclose(rope.inv_freq(), [1.0, 0.1 / 4, 0.01 / 4, 0.001 / 4])


def test_attention_factor():
    assert RopeParams(**YARN).table_factor() == pytest.approx(1.1386294, abs=5e-8)
    assert RopeParams(**YARN, attention_factor=0.75).table_factor() == 0.75
    assert RopeParams(**YARN | {"factor": 1.0}).table_factor() == 1.0
    ratio = (0.1 * 0.707 * math.log(4) + 1) / (0.1 * 0.5 * math.log(4) + 1)
    assert RopeParams(**YARN, mscale=0.707, mscale_all_dim=0.5).table_factor() == pytest.approx(ratio, rel=1e-15)
    assert RopeParams(**YARN, mscale=0.707).table_factor() == pytest.approx(1.1386294, abs=5e-8)
    assert RopeParams(**LLAMA3).table_factor() == 1.0
    assert RopeParams(**LONGROPE).table_factor() == pytest.approx(1.1902380714238083, rel=1e-15)   # Phi-3 128k
    assert RopeParams(**LONGROPE | {"attention_factor": 2.0}).table_factor() == 2.0
    assert RopeParams(**LONGROPE | {"factor": 0.5}).table_factor() == 1.0
    cos, sin = RopeParams(**YARN).tables(3)
    np.testing.assert_allclose(cos[0], np.float32(1.1386294361119891), rtol=1e-7)
    np.testing.assert_array_equal(sin[0], 0)


@pytest.mark.parametrize("name", EVERY)
def test_tables_to_position_200000(name):
    """Every entry is the float64 value, rounded once."""
    rope = RopeParams(**EVERY[name])
    cos, sin = rope.tables(200_001)
    pairs = rope.rotary_dim // 2
    assert cos.shape == sin.shape == (200_001, pairs)
    assert cos.dtype == sin.dtype == np.float32
    factor = {"yarn": 0.1 * math.log(rope.factor) + 1,
              "longrope": math.sqrt(1 + math.log(32) / math.log(4096))}.get(rope.scaling, 1.0)
    for position in (0, 1, 4095, 4096, 4097, 131_071, 200_000):
        for j in range(pairs):
            angle = position * frequency(j, **EVERY[name])
            # half a float32 step, plus what one float64 rounding of the frequency does to the angle
            slack = 2.0 ** -24 * factor + 4 * position * 2.0 ** -52
            assert abs(cos[position, j] - math.cos(angle) * factor) <= slack, (position, j)
            assert abs(sin[position, j] - math.sin(angle) * factor) <= slack, (position, j)


@pytest.mark.parametrize(("rotary_dim", "golden"), [
    (8, [-1.272233, -1.838865, 1.683929, 4.707907, 4.817777, 6.147278, 6.975969, 8.020964]),
    (4, [-1.272233, -1.838865, 2.878668, 4.088187, 5, 6, 7, 8]),
])
def test_published_rotation(rotary_dim, golden):
    cos, sin = RopeParams(rotary_dim=rotary_dim, style="interleaved").tables(4)
    x = np.arange(1.0, 9.0)
    even, odd = x[:rotary_dim:2].copy(), x[1:rotary_dim:2].copy()
    x[:rotary_dim:2] = even * cos[3] - odd * sin[3]
    x[1:rotary_dim:2] = odd * cos[3] + even * sin[3]
    np.testing.assert_allclose(x, golden, atol=6e-7)


def test_empty_tables_and_scalar_positions():
    cos, sin = RopeParams(rotary_dim=8).tables(0)
    assert cos.shape == sin.shape == (0, 4)
    cos, _ = RopeParams(rotary_dim=8).tables_for(3)
    assert cos.shape == (4,)
    cos, _ = RopeParams(rotary_dim=8).tables_for(np.zeros((2, 5), np.int32))
    assert cos.shape == (2, 5, 4)


def test_frozen_and_hashable():
    assert hash(RopeParams(rotary_dim=8)) == hash(RopeParams(rotary_dim=8))
    listed = RopeParams(**LONGROPE | {"short_factor": list(LONGROPE["short_factor"])})
    assert hash(listed) == hash(RopeParams(**LONGROPE))
    assert RopeParams(rotary_dim=8, scaling="default") == RopeParams(rotary_dim=8) and RopeKernelParam is RopeParams
    with pytest.raises(AttributeError):
        RopeParams(rotary_dim=8).base = 2.0


@pytest.mark.parametrize(("error", "argument", "options"), [
    (ValueError, "rotary_dim", {"rotary_dim": 7}),
    (ValueError, "rotary_dim", {"rotary_dim": 0}),
    (TypeError, "rotary_dim", {"rotary_dim": 8.0}),
    (ValueError, "rotary_dim", {"rotary_dim": 2, "scaling": "dynamic", "original_max_position": 4}),
    (ValueError, "style", {"style": "gptj"}),
    (ValueError, "scaling", {"scaling": "ntkk"}),
    (ValueError, "base", {"base": 1.0}),
    (ValueError, "base", {"base": math.nan}),
    (TypeError, "base", {"base": "10000"}),
    (ValueError, "factor", {"factor": 0.0}),
    (ValueError, "factor", {"factor": math.inf}),
    (ValueError, "original_max_position", {"scaling": "yarn"}),
    (ValueError, "original_max_position", {"scaling": "dynamic", "original_max_position": 0}),
    (ValueError, "beta_fast", {"scaling": "yarn", "original_max_position": 64, "beta_fast": 1.0}),
    (ValueError, "attention_factor", {"scaling": "yarn", "original_max_position": 64, "attention_factor": -1.0}),
    (ValueError, "rotary_dim", {"rotary_dim": 2, "scaling": "ntk"}),
    (ValueError, "alpha", {"scaling": "ntk", "alpha": 0.0}),
    (TypeError, "short_factor", {"scaling": "su", "original_max_position": 64}),
    (ValueError, "short_factor", {"scaling": "su", "original_max_position": 64, "short_factor": [1.0] * 3}),
    (ValueError, "long_factor", {"scaling": "su", "original_max_position": 64, "short_factor": [1.0] * 4,
                                 "long_factor": [1.0, 1.0, 1.0, 0.0]}),
    (TypeError, "mrope_section", {"mrope_section": 4}),
    (TypeError, "mrope_section", {"mrope_section": (1.0, 1.0, 2.0)}),
    (ValueError, "mrope_section", {"mrope_section": (2, 2)}),
    (ValueError, "mrope_section", {"mrope_section": (2, 2, 2)}),
    (ValueError, "high_freq_factor", {"scaling": "llama3", "original_max_position": 64, "high_freq_factor": 1.0}),
])
def test_bad_fields_are_named(error, argument, options):
    with pytest.raises(error, match=rf"^RopeParams: {argument} must"):
        RopeParams(**{"rotary_dim": 8} | options)


@pytest.mark.parametrize(("error", "argument", "call"), [
    (TypeError, "prompt_len", lambda rope: rope.inv_freq(1.5)),
    (ValueError, "prompt_len", lambda rope: rope.inv_freq(-1)),
    (ValueError, "prompt_len", lambda rope: rope.tables_for(np.arange(3), prompt_len=np.arange(2))),
    (TypeError, "positions", lambda rope: rope.tables_for(np.zeros(3))),
    (ValueError, "base", lambda rope: rope.inv_freq(base=[1e4, 1.0])),
    (TypeError, "base", lambda rope: rope.inv_freq(base="1e4")),
    (ValueError, "base", lambda rope: rope.inv_freq([1, 2, 3], base=[1e4, 1e4])),
    (ValueError, "base", lambda rope: rope.tables_for(np.arange(3), base=[1e4, 1e4])),
    (ValueError, "sequence", lambda rope: rope.tables_for(np.arange(3), sequence=np.array([0, 1, 2]), base=[9.0, 9.0])),
    (ValueError, "sequence", lambda rope: rope.tables_for(np.arange(3), sequence=np.array([0, 1]), base=[9.0, 9.0])),
    (TypeError, "sequence", lambda rope: rope.tables_for(np.arange(3), sequence=np.zeros(3), base=[9.0, 9.0])),
    (ValueError, "positions", lambda rope: RopeParams(rotary_dim=8, mrope_section=(1, 1, 2)).tables_for(
        np.zeros((2, 5), np.int32))),
    (ValueError, "max_pos", lambda rope: rope.tables(-1)),
    (ValueError, "max_pos", lambda rope: rope.tables(2.5)),
])
def test_bad_arguments_are_named(error, argument, call):
    with pytest.raises(error, match=rf"^RopeParams: {argument} must"):
        call(RopeParams(**DYNAMIC))
