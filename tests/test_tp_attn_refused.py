# SPDX-License-Identifier: Apache-2.0
"""What TPAttn refuses, and that nothing has changed then."""

import re

import numpy as np
import pytest
from compare import assert_same_bits
from test_tp_attn import contiguous, three_ranks, whole_layer

import cupyattn
from cupyattn import InProcessCommunicator, Params, TPAttn, TPContext, TPShard


def replaced(values, n, value):
    return [*values[:n], value, *values[n + 1:]]


def _plan(heads=2, kv_heads=1, length=1, **options):
    return cupyattn.schedule(np.int32([length]), num_heads=heads, num_kv_heads=kv_heads, head_dim=16, dtype="float32",
                             **options)


STEPS_REFUSED = {   # arguments from (x, caches, layer): what the message says
    "x: too few": (lambda x, c, _: dict(x=x[:2]), "x must be a list of one for each of the ranks [0, 1, 2], got 2"),
    "x: an array": (lambda x, c, _: dict(x=x[0]), "x must be a list of one for each of the ranks [0, 1, 2], got nda"),
    "x: one for two ranks": (lambda x, c, _: dict(x=[x[0], x[1], x[0]]),
                             "x[2] must share no memory with x[0], got the same array twice"),
    "x: shapes": (lambda x, c, _: dict(x=replaced(x, 1, x[1].reshape(1, 48))),
                  "x must be of one shape on all ranks, got [1, 1, 48] and [1, 48]"),
    "x: overlap": (lambda x, c, _: dict(x=[x[0], (pair := np.zeros((1, 1, 72), np.float32))[..., :48], pair[..., 24:]]),
                   "x[2] must share no memory with x[1], got arrays that overlap"),
    "x: a last axis with steps": (lambda x, c, _: dict(x=replaced(x, 2, np.zeros((1, 1, 96), np.float32)[..., ::2])),
                                  "x must have a contiguous last axis"),
    "x: another dtype": (lambda x, c, _: dict(x=[a.astype(np.float16) for a in x]), "x must be float32, got float16"),
    "x: dtypes": (lambda x, c, _: dict(x=replaced(x, 1, x[1].astype(np.float16))),
                  "x must be of one dtype on all ranks, got float32 and float16"),
    "x: read-only": (lambda x, c, _: dict(x=replaced(x, 2, np.broadcast_to(x[2], x[2].shape))),
                     "x must be writeable, got a read-only array"),
    "x: a list": (lambda x, c, _: dict(x=replaced(x, 2, [1.0])), "x must be a NumPy or CuPy array, got list"),
    "caches: one": (lambda x, c, _: dict(caches=c[0]), "caches must be a list of one for each of the ranks [0, 1, 2], "
                                                       "got PagedCache"),
    "caches: too many": (lambda x, c, _: dict(caches=[*c, c[0]]), "caches must be a list of one for each of the ranks "
                                                                  "[0, 1, 2], got 4"),
    "caches: one for two ranks": (lambda x, c, _: dict(caches=replaced(c, 2, c[1])),
                                  "caches[2]'s "),   # keys or values
    "caches: keys that are values": (lambda x, c, _: dict(caches=replaced(c, 1, _shared(c[1]))),
                                     "caches[1]'s values must share no memory with caches[1]'s keys, got the same"),
    "caches: another kind": (lambda x, c, _: dict(caches=replaced(c, 2, c[2].k[0])),
                             "caches must be PagedCache objects, got ndarray"),
    "caches: heads": (lambda x, c, _: dict(caches=replaced(c, 1, contiguous(2))),
                      "caches must have 1 heads for rank 1, got 2"),
    "caches: tokens": (lambda x, c, _: dict(caches=replaced(c, 1, contiguous(1, tokens=8)), params=Params(1, 1, 9)),
                       "params must have at most the 8 tokens of the cache, got 10"),
    "caches: head_dim": (lambda x, c, _: dict(caches=replaced(c, 2, contiguous(1, dim=8))),
                         "cache must have 1 heads of 16, got 1 of 8"),
    "caches: lists": (lambda x, c, _: dict(caches=[[c[0]], [c[1]], [c[2], c[2]]], params=Params(1, 1, [0])),
                      "cache must be a list exactly with a past_len for each of its caches, got 2 caches for past_len"),
    "caches: some": (lambda x, c, _: dict(caches=replaced(c, 1, None)), "caches must be PagedCache objects, got None"),
    "layer": (lambda x, c, _: dict(layer=1), "layer must be one of the cache's 1, got 1"),
    "layer: a name": (lambda x, c, _: dict(layer="first"), "layer must be an integer, got str"),
    "sin: shapes": (lambda x, c, layer: dict(sin=[layer.sin, layer.sin, layer.sin[:9]]),
                    "sin must be [positions, 8] or [1, 1, positions, 16] for 16 rotated dims, got [9, 8]"),
    "cos: too few": (lambda x, c, layer: dict(cos=[layer.cos]), "cos must be a list of one for each of the ranks"),
    "sinks: heads of a rank": (lambda x, c, _: dict(sinks=np.zeros(2, np.float32)),
                               "sinks must be [num_heads] = [6], got [2]"),
    "sinks: dims": (lambda x, c, _: dict(sinks=[np.zeros(6, np.float32)] * 2 + [np.zeros(96, np.float32)]),
                    "sinks must be [num_heads] = [6], got [96]"),
    "sinks: numbers": (lambda x, c, _: dict(sinks=0.5), "sinks must be a NumPy or CuPy array, got float"),
    "schedules: one": (lambda x, c, _: dict(schedules=_plan()), "schedules must be a list of one for each"),
    "schedules: other kind": (lambda x, c, _: dict(schedules=[_plan(), _plan(), 3]),
                              "schedule must be a Schedule, got int"),
    "schedules: of all heads": (lambda x, c, _: dict(schedules=[_plan(), _plan(), _plan(6, 3)]),
                                "schedule must be made for num_heads 2, got one for 6"),
    "schedules: another window": (lambda x, c, _: dict(schedules=[_plan(), _plan(), _plan(window_size=3)]),
                                 "schedule must be made for window_size 0, got one for 3"),
    "schedules: other lengths": (lambda x, c, _: dict(schedules=[_plan(), _plan(), _plan(length=2)]),
                                 "schedule must be made for"),
    "params": (lambda x, c, _: dict(params=3), "params must be Params or PagedParams, got int"),
    "too many tokens": (lambda x, c, _: dict(params=Params(1, 1, 16)), "params must have at most the 16 tokens"),
    "window": (lambda x, c, _: dict(window_size=-1), "window_size must be an int32 of at least 0, got -1"),
    "no adapter": (lambda x, c, _: dict(loras=["a"]), "loras must be among none, got 'a'"),
}


@pytest.mark.parametrize("heads", [2, 6])
def test_masks_of_heads_are_refused(heads):
    """Also one that has as many as a rank, which none of its own would be."""
    layer, _, attn, x, caches = three_ranks()
    mask = np.zeros((1, heads, 1, 1), bool)
    with pytest.raises(NotImplementedError, match="TPAttn: params must have an input_mask that is the same for all "
                                                  f"heads, got one of {heads}"):
        attn.forward(x, Params(1, 1, 0, mask), caches, **layer.tables)
    assert all((pool == 7).all() for cache in caches for pool in (*cache.k, *cache.v))


def _shared(cache):
    """`cache` with its keys for values."""
    cache.v = cache.k
    return cache


@pytest.mark.parametrize("name", STEPS_REFUSED)
def test_steps_refused(name):
    """The message names the argument, and nothing has changed on any rank."""
    layer, _, attn, x, caches = three_ranks()
    change, message = STEPS_REFUSED[name]
    before, pools = [a.copy() for a in x], [cache.k[0] for cache in caches]
    given = dict(x=x, params=Params(1, 1, 0), caches=caches, **layer.tables) | change(x, list(caches), layer)
    with pytest.raises((TypeError, ValueError), match=f"^(TPAttn|TPContext|QAttn): {re.escape(message)}"):
        attn.forward(**given)
    for mine, want in zip(x, before, strict=True):
        assert_same_bits(mine, want)
    assert all((pool == 7).all() for pool in pools)


def test_a_schedule_has_one_name():
    layer, _, attn, x, caches = three_ranks()
    for given in (dict(schedule=_plan()), dict(schedule=_plan(), schedules=[_plan()] * 3)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'schedule'"):
            attn.forward(x, Params(1, 1, 0), caches, **layer.tables, **given)


def test_layers_refused():
    layer, context, attn, _, _ = three_ranks()
    _, arguments = whole_layer("fp32")
    for name, value, error, message in (
            ("q_k_proj", np.ones((3, 4), np.float32), ValueError, "must be [out_features, in_features] = [48, 48],"),
            ("q_o_proj", [1], TypeError, "must be a NumPy or CuPy array, got list"),
            ("q_bias", np.ones(9, np.float32), ValueError, "must be [6 heads, ...] or [96, ...], got [9]"),
            ("v_bias", [1.0] * 48, TypeError, "must be a NumPy or CuPy array, got list"),
            ("k_norm", np.ones((2, 16), np.float32), ValueError, "must be [3 heads, ...] or [48, ...], got [2, 16]")):
        with pytest.raises(error, match=f"^TPContext: {name} {re.escape(message)}"):
            TPAttn.from_layer(context, **arguments | {name: value})
    with pytest.raises(TypeError, match="QAttn: q_norm must be a float16, bfloat16, float32 array, got list"):
        TPAttn.from_layer(context, **arguments | {"q_norm": [1.0] * 16})
    wrong = [
        (ValueError, "shards must be a list of one for each of the ranks [0, 1, 2], got 2",
         lambda: TPAttn(attn.shards[:2], context)),
        (ValueError, "shards must have (rank, heads, KV heads, head_dim, hidden_size) = (0, 2, 1, 16, 48), got (2,",
         lambda: TPAttn(attn.shards[::-1], context)),
        (TypeError, "shards must be TPShard objects, got QAttn",
         lambda: TPAttn(replaced(attn.shards, 1, layer.attn), context)),
        (ValueError, "shards must be alike in dtype, got float32 and float16",
         lambda: TPAttn(replaced(attn.shards, 1, three_ranks(dtype="float16")[2].shards[1]), context)),
        (ValueError, "shards must be alike in x_dtype, got float16 and float32",
         lambda: TPAttn(replaced(three_ranks(dtype="float16")[2].shards, 2,
                                 three_ranks(dtype="float16", residual_fp32=True)[2].shards[2]), context)),
        (ValueError, "shards must be alike in has_post_norm, got False and True",
         lambda: TPAttn(replaced(attn.shards, 2, three_ranks(post=True)[2].shards[2]),
                        context)),
        (ValueError, "shards must be where their ranks are, 0 for rank 0, got 'cpu'",
         lambda: TPAttn(attn.shards, TPContext(InProcessCommunicator(3, device=0), num_heads=6, num_kv_heads=3,
                                               head_dim=16, hidden_size=48))),
        (ValueError, "shards must be a list of one for each of the ranks [0, 1], got 3",
         lambda: TPAttn(attn.shards, TPContext(InProcessCommunicator(2), num_heads=6, num_kv_heads=3, head_dim=16,
                                               hidden_size=48))),
        (TypeError, "context must be a TPContext, got InProcessCommunicator",
         lambda: TPAttn(attn.shards, context.communicator)),
        (TypeError, "context must be a TPContext, got InProcessCommunicator",
         lambda: TPAttn.from_layer(context.communicator, **arguments)),
        (TypeError, "q_k_proj must be a QMatrix or an array, got none",
         lambda: TPAttn.from_layer(context, **arguments | {"q_k_proj": None})),
        (ValueError, "num_heads must be 6 like the context's, got 8",
         lambda: TPAttn.from_layer(context, **arguments | {"num_heads": 8})),
        (ValueError, "post_layernorm_bias must come with a post_layernorm that is",
         lambda: TPAttn.from_layer(context, **arguments | {"post_layernorm_bias": np.zeros(48, np.float32)})),
        (TypeError, "attn must be a QAttn, got TPShard", lambda: TPShard(0, attn.shards[0])),
        (ValueError, "attn must have no post-norm, and the residual on rank 0 alone",
         lambda: TPShard(1, attn.shards[0].attn)),
    ]
    for error, message, make in wrong:
        with pytest.raises(error, match=f"^(TPAttn|TPShard): {re.escape(message)}"):
            make()


def test_after_close():
    layer, _, attn, x, caches = three_ranks()
    with pytest.raises(ValueError, match="QAttn: it must not be used after close"), attn:
        attn.close()
        attn.forward(x, Params(1, 1, 0), caches, **layer.tables)
