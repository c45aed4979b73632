# SPDX-License-Identifier: Apache-2.0
"""What ExLlamaV2's tensor-parallel functions refuse, and that no array has changed then."""

import re

import numpy as np
import pytest
import standin_nccl
from standin import install
from test_tp_attn_functions import Lists, params_of

from cupyattn import InProcessCommunicator, LoRA, NCCLCommunicator


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def temps(lists, **changes):
    lists.temps.update(changes)


def weights(lists, **changes):
    lists.positional.update(changes)


def caches(lists, k=None, v=None):
    lists.caches = [lists.caches[0] if k is None else k, lists.caches[1] if v is None else v]


def both(lists, name, n):
    """The n-th of a temporary list for both ranks."""
    lists.temps[name] = [lists.temps[name][n]] * 2


REFUSED = {   # change of the Lists of two ranks and of the Params: error, and what its message says
    "context": (lambda s, p: setattr(s, "context", s.communicator), TypeError,
                "tp_context must be a TPContext, got InProcessCommunicator"),
    "head_dim": (lambda s, p: weights(s, head_dim=4), ValueError, "head_dim must be 8 like the context's, got 4"),
    "head_dim: a name": (lambda s, p: weights(s, head_dim="8"), TypeError, "head_dim must be an integer, got str"),
    "norm_epsilon": (lambda s, p: weights(s, norm_epsilon=-1.0), ValueError, "norm_epsilon must be a finite float32"),
    "rope_style": (lambda s, p: weights(s, rope_style=3), ValueError, "rope_style must be 0 (none), 1 (GPT-J), 2"),
    "rotary_dim: odd": (lambda s, p: s.keywords.update(rotary_dim=7), ValueError,
                        "rotary_dim must be even and at most head_dim 8, got 7"),
    "rotary_dim: large": (lambda s, p: s.keywords.update(rotary_dim=10), ValueError,
                          "rotary_dim must be even and at most head_dim 8, got 10"),
    "window_size": (lambda s, p: s.keywords.update(window_size=-1), ValueError, "window_size must be an int32 of at"),
    "softcap": (lambda s, p: s.keywords.update(softcap=None), TypeError, "softcap must be a number, got NoneType"),
    "k_proj: none": (lambda s, p: weights(s, k_proj=None), ValueError, "k_proj must be a list of one for each of the "
                                                                       "ranks [0, 1], got NoneType"),
    "k_proj: of the other rank": (lambda s, p: weights(s, k_proj=s.positional["k_proj"][::-1]), ValueError,
                                  "k_proj must be [heads of the rank * head_dim, hidden_size] = [32, 80], got [24"),
    "q_proj: no matrix": (lambda s, p: weights(s, q_proj=["a", "b"]), TypeError, "q_proj must be a QMatrix or an arr"),
    "o_proj: no matrix": (lambda s, p: weights(s, o_proj=[None, None]), TypeError, "o_proj must be a QMatrix or an a"),
    "o_proj: rows twice": (lambda s, p: (weights(s, o_proj=s.positional["o_proj"][1:] * 2),
                                         s.keywords.update(o_bias=None)), ValueError,
                           "o_proj must have the rows of one rank each, 80 in all, got [48, 48]; TPContext.shard_out"),
    "pre_layernorm: an array": (lambda s, p: weights(s, pre_layernorm=s.positional["pre_layernorm"][0]), ValueError,
                                "pre_layernorm must be a list of one for each of the ranks [0, 1], got ndarray"),
    "pre_layernorm: short": (lambda s, p: weights(s, pre_layernorm=[zeros(79), zeros(79)]), ValueError,
                             "pre_layernorm must be [80], got [79]"),
    "q_norm: one": (lambda s, p: s.keywords.update(q_norm=[zeros(8)]), ValueError,
                    "q_norm must be a list of one for each of the ranks [0, 1], got 1"),
    "k_norm: all heads": (lambda s, p: s.keywords.update(k_norm=[zeros(7, 8)] * 2), ValueError,
                          "k_norm must be [8] or [4, 8], got [7, 8]"),
    "temp_o_: none": (lambda s, p: temps(s, o=None), ValueError, "temp_o_ must be a list of one for each"),
    "temp_bc1_: one": (lambda s, p: temps(s, bc1=s.temps["bc1"][:1]), ValueError, "temp_bc1_ must be a list of one f"),
    "temp_bc0_: dtype": (lambda s, p: temps(s, bc0=[zeros(9, 80, dtype=np.float16)] * 2), ValueError,
                         "temp_bc0_ must be C-contiguous float32 [2 or more, 80], got float16 [9, 80]"),
    "temp_q_: rows": (lambda s, p: temps(s, q=[zeros(1, 64), zeros(1, 48)]), ValueError,
                      "temp_q_ must be C-contiguous float32 [2 or more, 64], got float32 [1, 64]"),
    "temp_k_: of the other rank": (lambda s, p: temps(s, k=s.temps["k"][::-1]), ValueError,
                                   "temp_k_ must be C-contiguous float32 [2 or more, 32], got float32 [21, 24]"),
    "temp_bc0_: one for two ranks": (lambda s, p: both(s, "bc0", 0), ValueError,
                                     "temp_bc0_[1] must share no memory with temp_bc0_[0], got arrays that overlap"),
    "temp_bc2_: one for two ranks": (lambda s, p: both(s, "bc2", 1), ValueError,
                                     "temp_bc2_[1] must share no memory with temp_bc2_[0]"),
    "temp_o_ is temp_bc1_": (lambda s, p: temps(s, o=[t.reshape(-1)[:20 * w].reshape(20, w)
                                                      for t, w in zip(s.temps["bc1"], (32, 48), strict=True)]),
                             ValueError, "temp_o_["),
    "k_cache: one for two ranks": (lambda s, p: caches(s, k=s.caches[0][:1] * 2), ValueError,
                                   "k_cache[1] must be pages, page_size, KV heads of the rank, head_dim"),
    "k_cache: overlapping heads": (lambda s, p: caches(s, k=overlapping()), ValueError,
                                   "k_cache[1] must share no memory with k_cache[0], got arrays that overlap"),
    "v_cache: the keys": (lambda s, p: caches(s, v=s.caches[0]), ValueError, "v_cache["),
    "v_cache: dtype": (lambda s, p: caches(s, v=[s.caches[1][0], s.caches[1][1].astype(np.float16)]), TypeError,
                       "v_cache must be of one format on all ranks, got float32 and float16"),
    "v_cache: pages": (lambda s, p: caches(s, v=[c[:1] for c in s.caches[1]]), ValueError,
                       "v_cache[0] must be pages, page_size, KV heads of the rank, head_dim = [2, 16, 4, 8], got [1"),
    "caches: pages": (lambda s, p: (caches(s, *([c[:1] for c in of_ranks] for of_ranks in s.caches))), ValueError,
                      "k_cache must have a page for each of the 2 sequences, got 1"),
    "caches: full": (lambda s, p: setattr(p, "past_len_tp", [np.int32([3, 16])] * 2), ValueError,
                     "past_len_tp must be from 0 to 15, with which 1 new tokens have room, got [3, 16]"),
    "past_len_tp: dtype": (lambda s, p: setattr(p, "past_len_tp", [np.int64([3, 16])] * 2), TypeError,
                           "past_len_tp must be int32, got int64"),
    "past_len_tp: a number": (lambda s, p: setattr(p, "past_len_tp", [3, 3]), TypeError,
                              "past_len_tp must be a NumPy or CuPy array, got int"),
    "past_len_tp: batch": (lambda s, p: setattr(p, "past_len_tp", [np.int32([3])] * 2), ValueError,
                           "past_len_tp must be [batch_size] = [2], got [1]"),
    "past_len_tp: ranks": (lambda s, p: setattr(p, "past_len_tp", [np.int32([3, 0]), np.int32([0, 3])]), ValueError,
                           "past_len_tp must be the same on all ranks, got [3, 0] and [0, 3]"),
    "position_offsets: dtype": (lambda s, p: setattr(p, "position_offsets_tp", [np.int64([0, 0])] * 2), TypeError,
                                "position_offsets must be int32, got int64"),
    "position_offsets: batch": (lambda s, p: setattr(p, "position_offsets_tp", [np.int32([0])] * 2), ValueError,
                                "position_offsets must be [batch_size] = [2], got [1]"),
    "sin: none": (lambda s, p: s.tables.update(sin=None), ValueError, "sin must be a list of one for each"),
    "cos: rows": (lambda s, p: s.tables.update(cos=[s.tables["cos"][0], s.tables["cos"][1][:5]],
                                               sin=[s.tables["sin"][0], s.tables["sin"][1][:5]]), ValueError,
                  "cos must be of one shape on all ranks, got [128, 4] and [5, 4]"),
    "cos: short": (lambda s, p: s.tables.update({name: [t[:2] for t in s.tables[name]] for name in ("sin", "cos")}),
                   ValueError, "sin and cos must have a row for position 3, got 2 rows"),
    "k_cache: read-only": (lambda s, p: caches(s, k=[np.broadcast_to(c, c.shape) for c in s.caches[0]]), ValueError,
                           "k_cache[0] must be writeable, got a read-only array"),
    "k_cache: none": (lambda s, p: caches(s, k=[None, None]), TypeError, "k_cache[0] must be a NumPy or CuPy array"),
    "loras: no projection": (lambda s, p: s.keywords.update(loras=[{"x": LoRA(zeros(2, 80), zeros(56, 2))}]),
                             ValueError, "adapters must hold a LoRA for q, k, v, o, got LoRA for 'x'"),
    "loras: shapes": (lambda s, p: s.keywords.update(loras=[{"k": LoRA(zeros(2, 80), zeros(55, 2))}]), ValueError,
                      "adapters must have a [rank, 80] and b [56, rank] for 'k', got [2, 80] and [55, 2]"),
    "loras: half of a pair": (lambda s, p: s.keywords.update(loras=[{"k": LoRA(zeros(2, 80), None)}]), TypeError,
                              "adapters must have arrays a and b for 'k', got ndarray and NoneType"),
    "loras: ranks": (lambda s, p: s.keywords.update(loras=[{"k": LoRA(zeros(2, 80), zeros(56, 3))}]), ValueError,
                     "adapters must have a [rank, 80] and b [56, rank] for 'k', got [2, 80] and [56, 3]"),
    "loras: no LoRA": (lambda s, p: s.keywords.update(loras=[{}, {"q": None}]), TypeError,
                       "loras must be a list of dicts of projections to LoRA, got one with NoneType"),
    "loras: names": (lambda s, p: s.keywords.update(loras=["all"]), TypeError,
                     "loras must be a list of dicts of projections to LoRA, got one with str"),
    "loras: a name": (lambda s, p: s.keywords.update(loras="all"), TypeError,
                      "loras must be a list of dicts of projections to LoRA, got str"),
    "loras: none": (lambda s, p: s.keywords.update(loras=None), TypeError, "loras must be a list of dicts of project"),
}


def overlapping():
    """Caches of the ranks that are parts of one, a head too many for the first."""
    whole = zeros(2, 16, 6, 8)
    return [whole[:, :, :4], whole[:, :, 3:]]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """The message names the argument; no array has changed."""
    change, error, message = REFUSED[name]
    lists, params = Lists("fp32, uneven", False, InProcessCommunicator(2)), params_of(False, 3, 1)
    params.prep_tp(lists.context)
    given = [*sum(lists.temps.values(), []), *sum(lists.caches, [])]
    change(lists, params)
    with pytest.raises(error, match=f"^(tp_attn_forward_|TPContext): {re.escape(message)}"):
        lists.call(lists.layer.inputs(2, 1), params)
    assert all(np.isnan(array).all() for array in given)


@pytest.mark.parametrize(("hidden", "error", "message"), [
    (zeros(2, 1, 79), ValueError, r"must be \[batch_size=2, q_len=1, 80\], got \[2, 1, 79\]"),
    (zeros(3, 80), ValueError, r"must be \[batch_size=2, q_len=1, 80\], got \[3, 80\]"),
    (zeros(2, 1, 80, dtype=np.float64), TypeError, "must be float16 or bfloat16 or float32, got float64"),
    ([[1.0]], TypeError, "must be a NumPy or CuPy array, got list"),
    ("bc0", ValueError, r"must share no memory with temp_bc0_\[0\], got arrays that overlap"),
])
def test_refused_hidden_states(hidden, error, message):
    lists = Lists("fp32, uneven", False, InProcessCommunicator(2))
    hidden = lists.temps[hidden][0][:2] if isinstance(hidden, str) else hidden
    with pytest.raises(error, match=f"tp_attn_forward_: hidden_states {message}"):
        lists.call(hidden, params_of(False, 0, 1))


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(block_index_tp=[]), ValueError, "block_index must be a list of one for each of the ranks .0, 1., got 0"),
    (dict(block_index_tp=[np.int32([[0, 1]])] * 2), ValueError, r"block_index must be \[batch_size, max_pages\] = .2,"),
    (dict(block_index_tp=[np.int32([[0], [8]])] * 2), ValueError, "got 8"),
    (dict(block_index_tp=[np.int32([[3], [3]])] * 2), ValueError, "block_index must have a place of its own for every"),
    (dict(cache_seqlens_tp=[np.int32([0, -1])] * 2), ValueError, r"past_lens must be from 0 to 15, .* got \[0, -1\]"),
])
def test_refused_pages(change, error, message):
    lists, params = Lists("fp32, uneven", True, InProcessCommunicator(2)), params_of(True, 0, 1)
    params.prep_tp(lists.context)
    vars(params).update(change)
    with pytest.raises(error, match=f"tp_attn_forward_paged_: .*{message}"):
        lists.call(lists.layer.inputs(2, 1), params)
    assert all(np.isnan(array).all() for array in [*sum(lists.temps.values(), []), *sum(lists.caches, [])])


def test_ranks_of_another_place():
    """Lists of NumPy arrays for ranks on a GPU, and of one GPU's arrays for ranks on two."""
    with install(devices=2) as xp, standin_nccl.install():
        lists = Lists("fp16", True, NCCLCommunicator.local([0, 1]), xp)
        host = Lists("fp16", True, InProcessCommunicator(2))
        hidden = lists.layer.inputs(2, 1)
        for name, error, message in (
                ("q", TypeError, "temp_q_ must be CuPy arrays for this rank, got numpy"),
                ("o", TypeError, "temp_o_ must be CuPy arrays for this rank, got numpy")):
            kept = lists.temps[name]
            lists.temps[name] = host.temps[name]
            with pytest.raises(error, match=f"tp_attn_forward_paged_: {message}"):
                lists.call(hidden, params_of(True, 0, 1))
            lists.temps[name] = kept
        for name, message in (("q_proj", "q_proj must be CuPy arrays"), ("o_proj", "o_proj must be CuPy arrays")):
            kept = lists.positional[name]
            lists.positional[name] = host.positional[name]
            with pytest.raises(TypeError, match=f"tp_attn_forward_paged_: {message}"):
                lists.call(hidden, params_of(True, 0, 1))
            lists.positional[name] = kept
        lists.temps["bc0"] = lists.temps["bc0"][::-1]
        with pytest.raises(ValueError, match="temp_bc0_ must be on GPU 0 for this rank, got GPU 1"):
            lists.call(hidden, params_of(True, 0, 1))
