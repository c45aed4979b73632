# SPDX-License-Identifier: Apache-2.0
"""Decoding steps of a layer that come again with the same objects: their launches without their Python."""

import weakref

import numpy as np

from ..caches import PagedCache
from ..graphs import BoundSteps, place
from ..kv.quantized import QuantizedKV
from ..ops.paged_decode import MAX_Q_LEN
from ..params import PagedParams
from .attend import is_kept
from .lora import names_of
from .step import steps_of

_MOST = 4   # steps of a layer remembered for a PagedParams, with which their x and out are kept alive
_REFUSED = AttributeError, IndexError, TypeError   # of arguments that the layer's checks will name


class Repeats:
    """Steps of one layer that were run before, gone with their PagedParams or their cache.

    A layer of which an attribute is assigned takes a new object, and a copy of it keeps the old one.

    What NumPy arrays of lengths and pages hold is always checked: a step is repeated only where they hold what the last
    step with all checks has found in them, of this or of another layer. So in a step of many layers the first checks.
    """

    def __init__(self):
        self._known = weakref.WeakKeyDictionary()   # PagedParams -> PagedCache -> (Step, BoundSteps)

    def run(self, attn, x, params, cache, layer, sin, cos, options, schedule, loras, sequence_loras, out):
        """What `QAttn.forward` does."""
        def prepare():
            return attn.checked(x, params, cache, layer, sin, cos, options, schedule, loras, sequence_loras, out)

        def prepare_to_keep():
            step = prepare()
            return lambda: (step(), arrays, sin, cos)   # kept, so that nothing else gets their ids and places

        if sequence_loras is not None or type(loras) is not tuple or loras:
            loras, sequence_loras = names_of(loras, sequence_loras)
        xp = attn.xp
        known = self._known_of(params, cache, xp)
        if known is None:
            return prepare()()
        step, steps = known
        try:
            arrays, target = (*_arrays(cache.k[layer]), *_arrays(cache.v[layer])), x if out is None else out
            plain = layer, *options[:3], options.invariant
            key = (place(x), place(sin), place(cos), place(options.sinks), place(out), plain, *map(type, plain),
                   None if schedule is None else (schedule.decode, schedule.prefill), *map(id, arrays),
                   loras, sequence_loras, getattr(target.flags, "writeable", True))
            hash(key)
            # what decides which contents are checked
            read = options.window_size, attn.max_seq_len, attn.rope_style and cos.shape
            found = _contents(step, params, schedule, xp)
        except _REFUSED:
            return prepare()()
        if step.checked.get(read) != found:
            result = prepare()()
            step.checked[read] = found
            return result
        steps.run_prepared(key, prepare_to_keep)
        return target

    def _known_of(self, params, cache, xp):
        """(Step, BoundSteps) of these, None where their steps are not remembered, or not yet."""
        if not isinstance(params, PagedParams) or not isinstance(cache, PagedCache) or params.q_len > MAX_Q_LEN or \
                params.block_diag_layers or params.alt_rope_embed is not None or params.alt_rope_embed_dict or \
                is_kept(xp):
            return None
        caches = self._known.get(params)
        if caches is None:
            self._known[params] = ()   # perhaps never seen again: no more is done for it
            return None
        if caches == ():
            caches = self._known[params] = weakref.WeakKeyDictionary()
        found = caches.get(cache)
        if found is None:
            step, = steps_of(params, cache, xp)
            found = caches[cache] = step, BoundSteps(xp, most=_MOST)
        return found


def _arrays(pool):
    """The arrays behind keys or values of a layer."""
    return (pool.codes, pool.scale, pool.zero) if isinstance(pool, QuantizedKV) else (pool,)


def _contents(step, params, schedule, xp):
    """What NumPy arrays that a caller may change in place hold, and what a Schedule was made from."""
    made = None if schedule is None else schedule.made_from
    made = made and (made, dict(vars(made)))
    if xp is not np:
        return made if schedule is not None else params.cache_seqlens_after.tobytes()
    return made, step.before.tobytes(), step.after.tobytes(), step.table.block_table.tobytes()
