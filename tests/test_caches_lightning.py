# SPDX-License-Identifier: Apache-2.0
"""Lightning attention's cache: one state for each head, faded and added to in place."""

import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of

from cupyattn import (
    LightningCache,
    LightningCacheMetaData,
    LightningCacheView,
    LightningMetadata,
    lightning_slopes,
)

B, H, K, V = 2, 2, 8, 16
SLOPES = np.float32([0.1, 0.7])


def make(**sizes):
    return LightningCacheView.init(LightningCacheMetaData.create(None, **sizes), 3)


def new(xp, tokens, dtype="float32", seed=0, heads=H, batch=B):
    rng = np.random.default_rng(seed)
    return [xp.array(rng.standard_normal((batch, tokens, heads, dim)).astype(dtype_of(dtype))) for dim in (K, K, V)]


def recurrence(xp, state, q, k, v, mask=None):
    """State and outputs in float64, one token after the other."""
    q, k, v = (xp.numpy(a).astype(np.float64) for a in (q, k, v))
    state, out = np.array(state, np.float64), np.empty(v.shape)
    for t in range(q.shape[1]):
        added = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        if mask is not None:
            added *= mask[:, t, None, None, None]
        state = np.exp(-SLOPES.astype(np.float64))[:, None, None] * state + added
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return state, out


def test_metadata():
    made = LightningCacheMetaData.create("axis", 1, 2, 3, 4, 5, 6, 7)
    assert made == LightningCacheMetaData("axis", 1, 2, 3, 4, 5, 6, 7)
    assert made.to_dict() == {"partition_axis": "axis", "batch_size": 1, "num_heads": 2, "head_dim": 3, "key_heads": 4,
                              "value_heads": 5, "key_dim": 6, "value_dim": 7}
    assert set(LightningCacheMetaData.create().to_dict().values()) == {None}
    assert LightningCacheMetaData.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="key_dim must be positive, got 0"):
        LightningCacheMetaData.create(key_dim=0)
    assert LightningMetadata() == LightningMetadata.from_json(LightningMetadata().to_json())


def test_init_cache():
    facts = LightningCacheMetaData.create()
    cache = LightningCache.init_cache(3, facts)
    assert [(view.key_value, view.layer_index) for view in cache.views] == [(None, 0), (None, 1), (None, 2)]
    assert cache[2].metadata is facts and cache.nbytes == 0 and LightningCache.init_empty(2).views == [None, None]
    assert cache.copy() == cache and cache.copy() is not cache and cache.reset() is cache


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_prompt_and_steps(xp, dtype):
    view, state, atol = make(), np.zeros((B, H, K, V)), ROUNDING[dtype][0] * 20
    for seed, tokens in enumerate((5, 1, 1, 3)):
        q, k, v = new(xp, tokens, dtype, seed)
        held = view.key_value
        got = view.concatenate_to_cache(q, k, v, slopes=xp.array(SLOPES), return_output=True)
        state, out = recurrence(xp, state, q, k, v)
        assert got[0] is k and got[1] is v and got[2] is None
        assert held is None or view.key_value is held   # in place
        assert view.key_value.dtype == np.float32 and isinstance(view.key_value, xp.module.ndarray)
        assert_close(xp.numpy(view.key_value), state, 2e-5, 2e-6)
        assert_close(xp.numpy(got[3]), out, 2e-5 + atol, ROUNDING[dtype][1])
    assert len(view.concatenate_to_cache(q, k, v, slopes=xp.array(SLOPES))) == 3


def test_scale_and_slopes_are_arguments(xp):
    q, k, v = new(xp, 2)
    slopes = xp.array(lightning_slopes(H, 0, 4, convention="fla"))
    first, second = (make().concatenate_to_cache(q, k, v, slopes=slopes, scale=scale, return_output=True)[3]
                     for scale in (1.0, 0.5))
    assert_same_bits(xp.numpy(first) * np.float32(0.5), xp.numpy(second))


def test_left_padding_adds_nothing(xp):
    mask = np.ones((B, 5), np.int32)
    mask[0, :3] = 0
    q, k, v = new(xp, 5)
    padded = make()
    got = padded.concatenate_to_cache(q, k, v, xp.array(mask), slopes=xp.array(SLOPES), return_output=True)
    state, out = recurrence(xp, np.zeros((B, H, K, V)), q, k, v, mask)
    assert_close(xp.numpy(padded.key_value), state, 2e-5, 2e-6)
    assert_close(xp.numpy(got[3]), out, 2e-5, 2e-6)
    short = make()
    short.concatenate_to_cache(*(xp.array(xp.numpy(a)[:1, 3:]) for a in (q, k, v)), slopes=xp.array(SLOPES))
    assert_close(xp.numpy(padded.key_value)[0], xp.numpy(short.key_value)[0], 1e-6, 1e-6)
    assert xp.numpy(got[2]).tolist() == mask.tolist()


def test_no_new_tokens(xp):
    view = make()
    view.concatenate_to_cache(*new(xp, 2), slopes=xp.array(SLOPES))
    before = view.copy()
    view.concatenate_to_cache(*new(xp, 0), slopes=xp.array(SLOPES))
    assert view == before


def test_what_does_not_fit(xp):
    view, (q, k, v), slopes = make(), new(xp, 2), xp.array(SLOPES)
    with pytest.raises(ValueError, match="slopes must be given, e.g. cupyattn.lightning_slopes"):
        view.concatenate_to_cache(q, k, v)
    with pytest.raises(TypeError, match="quantizer must be None or a format of QuantizedKV, int8"):
        view.concatenate_to_cache(q, k, v, quantizer=object(), slopes=slopes)
    with pytest.raises(NotImplementedError, match="quantizer must be None, the state is float32; got int8"):
        view.concatenate_to_cache(q, k, v, quantizer="int8", slopes=slopes)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, T\] = \[2, 2\], got \[2, 3\]"):
        view.concatenate_to_cache(q, k, v, xp.array(np.ones((B, 3), bool)), slopes=slopes)
    with pytest.raises(ValueError, match=r"key must be .* got \[2, 1, 2, 8\]"):
        view.concatenate_to_cache(q, k[:, :1], v, slopes=slopes)
    with pytest.raises(ValueError, match="lightning_attention: slopes must be"):
        view.concatenate_to_cache(q, k, v, slopes=slopes[:1])
    for sizes in ({"batch_size": 3}, {"num_heads": 3}, {"head_dim": 4}, {"key_dim": 4}):
        with pytest.raises(ValueError, match="query must be"):
            make(**sizes).concatenate_to_cache(q, k, v, slopes=slopes)
    for name in ("key", "value"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make(num_heads=H, **{f"{name}_heads": 1}).concatenate_to_cache(q, k, v, slopes=slopes)
    with pytest.raises(ValueError, match="value must be"):
        make(value_dim=8).concatenate_to_cache(q, k, v, slopes=slopes)
    assert view.key_value is None   # a refused call leaves no state behind
    make(batch_size=B, num_heads=H, head_dim=K, value_dim=V).concatenate_to_cache(q, k, v, slopes=slopes)
    view.concatenate_to_cache(q, k, v, slopes=slopes)
    with pytest.raises(ValueError, match="key_value of the view must be"):
        view.concatenate_to_cache(*new(xp, 1, batch=3), slopes=slopes)


def test_saving_and_reset(xp):
    cache = LightningCache.init_cache(2, LightningCacheMetaData.create())
    cache[1].concatenate_to_cache(*new(xp, 2), slopes=xp.array(SLOPES))
    back = LightningCache.from_json(cache.to_json(), xp=xp.module)
    assert back == cache and back[0].key_value is None
    assert LightningCache.from_pure(*cache.to_pure()) == cache
    held = cache[1].key_value
    assert not xp.numpy(cache.reset()[1].key_value).any() and cache[1].key_value is held and back != cache
