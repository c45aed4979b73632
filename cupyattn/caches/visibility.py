# SPDX-License-Identifier: Apache-2.0
"""Which slots of a cache new tokens see, as a mask."""

import numpy as np


def check_masks(op, sizes, *, attention_mask, causal_mask, token_type_ids):
    """Dtypes and shapes of what `visible_slots` takes; `sizes` are (batch, tokens, capacity)."""
    batch, tokens, capacity = sizes
    for name, array in (("attention_mask", attention_mask), ("causal_mask", causal_mask),
                        ("token_type_ids", token_type_ids)):
        if array is not None and array.dtype.kind not in "biu":
            raise TypeError(f"{op}: {name} must be bool or integers, got {array.dtype.name}")
    if attention_mask is not None:
        want = (batch, capacity) if attention_mask.ndim == 2 else (batch, 1, tokens, capacity)
        _check(op, "attention_mask", attention_mask, want, broadcast=attention_mask.ndim != 2)
    if causal_mask is not None:
        _check(op, "causal_mask", causal_mask, (batch, 1, None, capacity), broadcast=causal_mask.shape[:1] == (1,))
    if token_type_ids is not None:
        _check(op, "token_type_ids", token_type_ids, (batch, tokens))


def _check(op, name, array, want, *, broadcast=False):
    fits = array.ndim == len(want) and all(
        size == wanted or wanted is None or broadcast and size == 1
        for size, wanted in zip(array.shape, want, strict=True))
    if not fits:
        axes = ", ".join("rows" if wanted is None else str(wanted) for wanted in want)
        raise ValueError(f"{op}: {name} must be {'broadcastable to ' if broadcast else ''}[{axes}], got "
                         f"{list(array.shape)}")


def visible_slots(xp, index, tokens, capacity, *, attention_mask=None, causal_mask=None, token_type_ids=None,
                  window_size=0):
    """bool [batch, 1, tokens, capacity]: what `tokens` new tokens at ``index [batch]`` see.

    The rule is that of `TransformerCacheView.concatenate_to_cache`.
    """
    slot = xp.arange(capacity, dtype=np.int32)
    position = (index[:, None] + xp.arange(tokens, dtype=np.int32))[:, :, None]   # [batch, tokens, 1]
    chosen = None
    if causal_mask is not None:
        chosen = xp.take_along_axis(causal_mask[:, 0], position, axis=1) != 0
    if window_size:
        back = position - slot
        near = (back >= 0) & (back < window_size)
        chosen = near if chosen is None else chosen & near
    if chosen is not None and token_type_ids is not None and tokens > 1:
        chosen = chosen | _same_type(xp, token_type_ids, slot - index[:, None])
    seen = (slot < (index + tokens)[:, None, None])[:, None]   # [batch, 1, 1, capacity]
    if chosen is not None:
        seen = seen & chosen[:, None]
    if attention_mask is not None:
        seen = seen & ((attention_mask if attention_mask.ndim == 4 else attention_mask[:, None, None]) != 0)
    mask = xp.zeros((len(index), 1, tokens, capacity), bool)
    mask[...] = seen
    return mask


def _same_type(xp, types, place):
    """bool [batch, tokens, capacity]: whether new token ``place [batch, capacity]`` has the query's type, not 0."""
    tokens = types.shape[1]
    new = (place >= 0) & (place < tokens)
    of_slot = xp.take_along_axis(types, place % tokens, axis=1)
    query = types[:, :, None]
    return (query == of_slot[:, None]) & (query != 0) & new[:, None]
