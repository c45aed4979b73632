# SPDX-License-Identifier: Apache-2.0
"""RopeParams against published frequencies and an independent scalar model."""

import math

import numpy as np
import pytest

from cupyattn.rope_params import RopeParams

YARN = {"rotary_dim": 128, "base": 1e6, "scaling": "yarn", "factor": 4.0, "original_max_position": 32768}
LLAMA3 = {"rotary_dim": 128, "base": 5e5, "scaling": "llama3", "factor": 8.0, "original_max_position": 8192}
DYNAMIC = {"rotary_dim": 128, "scaling": "dynamic", "factor": 2.0, "original_max_position": 4096}
EVERY = {
    "none": {"rotary_dim": 128},
    "partial": {"rotary_dim": 24, "base": 1e6},
    "linear": {"rotary_dim": 128, "scaling": "linear", "factor": 4.0},
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn-gpt-oss": {"rotary_dim": 64, "base": 150000.0, "scaling": "yarn", "factor": 32.0,
                     "original_max_position": 4096, "truncate": False},
    "llama3": LLAMA3,
}


def frequency(j, *, rotary_dim, base=1e4, scaling="none", factor=1.0, original_max_position=None, truncate=True,
              prompt_len=0):
    """One pair's frequency from scalars, through base-2 exponents and per-pair rules as in TurboMind."""
    m = original_max_position
    if scaling == "dynamic" and factor > 1 and prompt_len > m:
        base = base * (factor * prompt_len / m - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    f = 2.0 ** (2 * j * (-math.log2(base) / rotary_dim))
    if scaling == "linear":
        return f / factor
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
    cos, sin = rope.cos_sin(np.array([7, 9000, 5]), prompt_len=np.array([100, 8192, 8192]))
    for i, (position, prompt_len) in enumerate([(7, 100), (9000, 8192), (5, 8192)]):
        whole_cos, whole_sin = rope.tables(position + 1, prompt_len=prompt_len)
        np.testing.assert_array_equal(cos[i], whole_cos[position])
        np.testing.assert_array_equal(sin[i], whole_sin[position])


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
    factor = 0.1 * math.log(rope.factor) + 1 if rope.scaling == "yarn" else 1.0
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
    cos, _ = RopeParams(rotary_dim=8).cos_sin(3)
    assert cos.shape == (4,)
    cos, _ = RopeParams(rotary_dim=8).cos_sin(np.zeros((2, 5), np.int32))
    assert cos.shape == (2, 5, 4)


def test_frozen_and_hashable():
    assert hash(RopeParams(rotary_dim=8)) == hash(RopeParams(rotary_dim=8))
    with pytest.raises(AttributeError):
        RopeParams(rotary_dim=8).base = 2.0


@pytest.mark.parametrize(("error", "argument", "options"), [
    (ValueError, "rotary_dim", {"rotary_dim": 7}),
    (ValueError, "rotary_dim", {"rotary_dim": 0}),
    (TypeError, "rotary_dim", {"rotary_dim": 8.0}),
    (ValueError, "rotary_dim", {"rotary_dim": 2, "scaling": "dynamic", "original_max_position": 4}),
    (ValueError, "style", {"style": "gptj"}),
    (ValueError, "scaling", {"scaling": "ntk"}),
    (ValueError, "base", {"base": 1.0}),
    (ValueError, "base", {"base": math.nan}),
    (TypeError, "base", {"base": "10000"}),
    (ValueError, "factor", {"factor": 0.0}),
    (ValueError, "factor", {"factor": math.inf}),
    (ValueError, "original_max_position", {"scaling": "yarn"}),
    (ValueError, "original_max_position", {"scaling": "dynamic", "original_max_position": 0}),
    (ValueError, "beta_fast", {"scaling": "yarn", "original_max_position": 64, "beta_fast": 1.0}),
    (ValueError, "attention_factor", {"scaling": "yarn", "original_max_position": 64, "attention_factor": -1.0}),
    (ValueError, "high_freq_factor", {"scaling": "llama3", "original_max_position": 64, "high_freq_factor": 1.0}),
])
def test_bad_fields_are_named(error, argument, options):
    with pytest.raises(error, match=rf"^RopeParams: {argument} must"):
        RopeParams(**{"rotary_dim": 8} | options)


@pytest.mark.parametrize(("error", "argument", "call"), [
    (TypeError, "prompt_len", lambda rope: rope.inv_freq(1.5)),
    (ValueError, "prompt_len", lambda rope: rope.inv_freq(-1)),
    (ValueError, "prompt_len", lambda rope: rope.cos_sin(np.arange(3), prompt_len=np.arange(2))),
    (TypeError, "positions", lambda rope: rope.cos_sin(np.zeros(3))),
    (ValueError, "max_pos", lambda rope: rope.tables(-1)),
    (ValueError, "max_pos", lambda rope: rope.tables(2.5)),
])
def test_bad_arguments_are_named(error, argument, call):
    with pytest.raises(error, match=rf"^RopeParams: {argument} must"):
        call(RopeParams(**DYNAMIC))
