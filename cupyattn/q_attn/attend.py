# SPDX-License-Identifier: Apache-2.0
"""What a layer does between its projections: new heads go into the cache, then they attend.

`prepare` checks a call and decides all of it before anything is written; `attend` launches it.
"""

from typing import NamedTuple

import numpy as np

from ..attn.args import check_options
from ..attn.scheduling import Lengths
from ..errors import CaptureError
from ..ops.attention import attention
from ..ops.kv_append import kv_append
from ..ops.paged_decode import MAX_Q_LEN, paged_decode
from ..ops.schedule import Schedule, schedule
from ..runtime.arrays import array_namespace
from ..runtime.capturing import tape
from ..runtime.checks import check_array, check_flag
from ..runtime.launch import scratch_owner
from .buffers import row_numbers
from .step import OP, Step, block_borders


class Options(NamedTuple):
    """Keywords of `QAttn.forward` that attention has, too."""

    softmax_scale: object = None
    window_size: int = 0
    softcap: float = 0.0
    sinks: object = None
    invariant: bool = False

    def check(self, attn):
        check_options(OP, True, self.softmax_scale, self.window_size, self.softcap, attn.head_dim)
        check_flag(OP, "invariant", self.invariant)
        if self.sinks is not None:
            if array_namespace(OP, sinks=self.sinks) is not attn.xp:
                raise TypeError(f"{OP}: sinks must be a {attn.xp.__name__} array like the weights, got another kind")
            check_array(OP, "sinks", self.sinks, "float32", (attn.num_heads,), "[num_heads]")


class Part(NamedTuple):
    """The attention of one Step over its cache, decided."""

    step: Step
    pools: tuple         # (keys, values) of the layer in the cache, or None
    cu_seqlens: object   # int32 [blocks + 1] on the device, where the layer attends in blocks; None elsewhere
    decode: bool         # by `paged_decode`
    schedule: Schedule


# ---- before anything is written --------------------------------------------------------------------------


def prepare(attn, params, step, cache, layer, turn, options, given):
    """The Part of a call, with the Schedule it was `given`, if any."""
    if turn and step.last_position >= turn["cos"].shape[0]:
        raise ValueError(f"{OP}: sin and cos must have a row for position {step.last_position}, got "
                         f"{turn['cos'].shape[0]} rows")
    if attn.max_seq_len is not None and step.longest > attn.max_seq_len:
        raise ValueError(f"{OP}: params must have at most max_seq_len {attn.max_seq_len} tokens, got {step.longest}")
    if step.mask is not None and step.mask.shape[1] not in (1, attn.num_heads):
        raise ValueError(f"{OP}: params must have an input_mask of 1 or {attn.num_heads} heads, got "
                         f"{step.mask.shape[1]}")
    pools = None if cache is None else _pools(attn, cache, layer)
    blocks = block_borders(params, step, layer) if params.block_diag_layers else None
    if given is not None and not isinstance(given, Schedule):
        raise TypeError(f"{OP}: schedule must be a Schedule, got {type(given).__name__}")
    if cache is not None and is_kept(attn.xp):
        _refuse_what_stays(params, step, turn, given)
    elif params.paged:
        if given is None and params.cache_seqlens_after.tobytes() != step.after_host.tobytes():
            raise ValueError(f"{OP}: schedule must be given for lengths of params that were changed in place, got "
                             "None; QAttn.schedule makes it")
        if attn.xp is np:
            _check_changed(step, cache, options, attn.max_seq_len)
    if blocks is not None:
        made, decode = _schedule_of_step(attn, step, None, blocks, options), False
        blocks = params.get_cu_seqlens(None if attn.xp is np else attn.xp.cuda.runtime.getDevice())
    else:
        made, decode = given, _decodes(step, cache, options)
        if given is None:
            made = _schedule_of_step(attn, step, cache, None, options)
        else:
            _check_schedule(attn, step, cache, options, given)
    return Part(step, pools, blocks, decode, made)


def _pools(attn, cache, layer):
    if (cache.num_kv_heads, cache.head_dim) != (attn.num_kv_heads, attn.head_dim):
        raise ValueError(f"{OP}: cache must have {attn.num_kv_heads} heads of {attn.head_dim}, got "
                         f"{cache.num_kv_heads} of {cache.head_dim}")
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"{OP}: layer must be one of the cache's {cache.num_layers}, got {layer}")
    return cache.k[layer], cache.v[layer]


def is_kept(xp):
    """Whether the launches of this call will be launched again without it."""
    current = tape()
    return current is not None and current.keep or xp is not np and xp.cuda.get_current_stream().is_capturing()


def _refuse_what_stays(params, step, turn, given):
    """CaptureError for what a replay would not see change though lengths do."""
    if not params.paged:
        raise CaptureError(f"{OP}: params must be PagedParams while a step over a cache is captured, got Params, whose "
                           "past_len would stay; a contiguous cache is one with a page for each sequence")
    if turn and step.rope_rows is not None:
        raise CaptureError(f"{OP}: params must have no rope_offsets while a step over a cache is captured, which would "
                           "go on with their sums with the first lengths")
    if given is None or given.limits is None:
        found = "None" if given is None else "one of these lengths only"
        raise CaptureError(f"{OP}: schedule must be given, with room for other lengths, while a step over a cache is "
                           f"captured, got {found}; QAttn.schedule makes it")


def _check_changed(step, cache, options, most):
    """NumPy arrays that were changed in place still agree with each other, hold pages and `most` tokens at most.

    Each op sees for itself that its arrays are right, but attention only when new keys are in the cache.
    """
    if most is not None and step.after.max() > most:
        raise ValueError(f"{OP}: params must have at most max_seq_len {most} tokens, got {step.after.max()}")
    if (step.before + np.int32(step.q_len)).tobytes() != step.after.tobytes():
        raise ValueError(f"{OP}: params must have cache_seqlens_after = cache_seqlens + {step.q_len}, got "
                         f"{step.after.tolist()} and {step.before.tolist()}; one of them was changed in place")
    first = np.maximum(step.before - options.window_size + 1, 0) if options.window_size else None
    step.table.check(OP, step.after, cache.num_pages, cache.page_size, starts=first)


# ---- who attends what ------------------------------------------------------------------------------------


def _decodes(step, cache, options):
    """Whether `paged_decode` attends."""
    return cache is not None and step.mask is None and step.causal and (
        step.q_len == 1 or step.q_len <= MAX_Q_LEN and not options.invariant)


def _facts(attn, step, cache, options):
    """Arguments of `schedule` beside lengths."""
    return {"num_heads": attn.num_heads, "num_kv_heads": attn.num_kv_heads, "head_dim": attn.head_dim,
            "dtype": attn._dtype_name, "kv_format": attn._dtype_name if cache is None else cache.k_format,
            "window_size": options.window_size, "causal": step.causal, "invariant": options.invariant,
            "one_list": options.invariant and not _decodes(step, cache, options)}


def _schedule_of_step(attn, step, cache, blocks, options):
    """The Schedule of the step's first lengths, or of `blocks`; kept for other layers and calls."""
    facts, decode = _facts(attn, step, cache, options), _decodes(step, cache, options)
    # launches count in it
    key = scratch_owner(attn.xp), decode, None if blocks is None else blocks.tobytes(), *facts.values()
    found = step.schedules.get(key)
    if found is None:
        lengths, queries = step.after_host, {"q_len": step.q_len}
        if blocks is not None:
            lengths, queries, facts["causal"] = np.diff(blocks), {"cu_seqlens_q": blocks}, False
        elif not decode:
            queries = {"cu_seqlens_q": np.arange(step.batch + 1, dtype=np.int32) * np.int32(step.q_len)}
        found = step.schedules[key] = schedule(lengths, xp=attn.xp, **facts, **queries)
    return found


def schedule_on_device(attn, step, cache, options, out):
    """The Schedule of the lengths that are on the device now, with room for all that the pages hold."""
    queries = {"q_len": step.q_len} if _decodes(step, cache, options) else {
        "cu_seqlens_q": step.cu_seqlens_q, "max_q_len": step.q_len}
    return schedule(step.after, max_k_len=step.table.capacity(cache.page_size), out=out,
                    **_facts(attn, step, cache, options), **queries)


def _check_schedule(attn, step, cache, options, given):
    """What attention would refuse only when new keys are in the cache."""
    decode = _decodes(step, cache, options)
    given.check(OP, device=attn.xp.__name__, batch=step.batch, num_heads=attn.num_heads, head_dim=attn.head_dim,
                num_kv_heads=attn.num_kv_heads, causal=step.causal, tree_mask=False, window_size=options.window_size,
                key_stride=1, key_offset=0, dtype=attn._dtype_name)
    formats = (attn._dtype_name,) if cache is None else (cache.k_format, cache.v_format)
    if given.kv_format not in formats:
        raise ValueError(f"{OP}: schedule must be made for kv_format {formats[0]}, got one for {given.kv_format}")
    if options.invariant:
        given.check(OP, invariant=True, num_splits=None, one_list=not decode)
    if given.made_from is not None:
        starts, heads_per_kv = step.cu_seqlens_q, attn.num_heads // attn.num_kv_heads
        lengths = Lengths(attn.num_kv_heads, heads_per_kv, None if cache is None else step.after,
                          starts if cache is None else None, None if decode else starts, step.q_len,
                          causal=step.causal, window_size=options.window_size)
        given.made_from.check(OP, lengths, step.table)
        if attn.xp is np:
            given.made_from.check_contents(OP, lengths, np.full(step.batch, step.q_len), step.table,
                                           None if cache is None else cache.page_size)


# ---- launches --------------------------------------------------------------------------------------------


def attend(attn, part, buffers, turn, options):
    """Finish new heads, append them and attend; `buffers.mixed` then holds the result.

    Parameters
    ----------
    attn : QAttn
    part : Part
    buffers : Buffers
        Of its rows.
    turn : dict
        Arguments of `kv_append` that turn heads.
    options : Options
    """
    step, q, q_len = part.step, buffers.mixed, part.step.q_len
    heads = {"q": buffers.q, "q_out": q, "q_len": q_len, **attn._finish, **turn}
    if turn and step.rope_rows is not None:
        heads["rope_rows"] = step.rope_rows
    options = {**options._asdict(), "schedule": part.schedule, "out": q}
    if part.pools is None or part.cu_seqlens is not None:
        _attend_to_new(attn, part, buffers, heads, options)
        return
    kv_append(buffers.k, buffers.v, *part.pools, block_table=step.table, positions=step.before, **heads)
    if part.decode:
        q = options["out"] = q.reshape(step.batch, q_len, attn.num_heads, attn.head_dim)
        paged_decode(q, *part.pools, block_table=step.table, cache_seqlens=step.after, **options)
    else:
        attention(q, *part.pools, cu_seqlens_q=step.cu_seqlens_q, cache_seqlens=step.after, block_table=step.table,
                  causal=step.causal, mask=step.mask, max_q_len=q_len, **options)


def _attend_to_new(attn, part, buffers, heads, options):
    """New tokens see each other only; they go into the cache, if any, for others."""
    step, keys, values = part.step, buffers.k_out, buffers.v_out
    if "cos" in heads and step.rope_rows is None:
        heads["rope_base"] = 0   # positions count from 0
    kv_append(buffers.k, buffers.v, keys[:, None], values[:, None], slots=row_numbers(attn.xp, buffers.tokens), **heads)
    if part.pools is not None:
        kv_append(keys, values, *part.pools, block_table=step.table, positions=step.before, q_len=step.q_len)
    blocks = part.cu_seqlens
    starts = step.cu_seqlens_q if blocks is None else blocks
    attention(buffers.mixed, keys, values, cu_seqlens_q=starts, cu_seqlens_k=starts, mask=step.mask,
              causal=step.causal and blocks is None, max_q_len=buffers.tokens, **options)
