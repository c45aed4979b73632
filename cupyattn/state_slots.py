# SPDX-License-Identifier: Apache-2.0
"""Which sequence owns which rows, and which slot of a pool of recurrent states: checks shared by the state kernels."""

import numpy as np

from .devices import to_host
from .runtime import env
from .runtime.checks import check_array, check_dtype, check_element_strides, check_shape, check_writeable

STATE_AXES = "[slots, ...]"


def contents(xp):
    """Whether the content of index arrays is looked at: on the host always, on a GPU with ``CUPYATTN_CHECK=1``."""
    return xp is np or env.check()


def check_pool(op, name, pool, dtypes, shape, axes, *, contiguous):
    """A pool of states, first axis slots, that is updated in place; its dtype's name."""
    found = check_dtype(op, name, pool, dtypes)
    check_shape(op, name, pool, shape, axes)
    if contiguous:
        check_array(op, name, pool, dtypes, shape, axes)
    check_element_strides(op, name, pool)
    check_writeable(op, name, pool)
    return found


def count_sequences(op, cu_seqlens):
    """Number of sequences of `cu_seqlens` (None: one of all rows), whose content is not looked at."""
    if cu_seqlens is None:
        return 1
    check_array(op, "cu_seqlens", cu_seqlens, "int32", (None,), "[batch + 1]")
    if not len(cu_seqlens):
        raise ValueError(f"{op}: cu_seqlens must be [batch + 1], got no entry")
    return len(cu_seqlens) - 1


def check_offsets(op, cu_seqlens, tokens):
    """The content of `cu_seqlens`, if it is given, fits `tokens` rows."""
    if cu_seqlens is None:
        return
    host = to_host(cu_seqlens)
    if host[0] != 0 or (np.diff(host) < 0).any() or host[-1] > tokens:
        found = host.tolist() if len(host) <= 20 else f"{len(host)} entries from {host[0]} to {host[-1]}"
        raise ValueError(f"{op}: cu_seqlens must start at 0, not decrease and end within the {tokens} rows, got "
                         f"{found}")


def check_sequences(op, xp, cu_seqlens, tokens):
    """`cu_seqlens` (None: one sequence of all rows) fits `tokens` rows; returns the number of sequences."""
    batch = count_sequences(op, cu_seqlens)
    if contents(xp):
        check_offsets(op, cu_seqlens, tokens)
    return batch


def check_slot_list(op, name, slots, batch, num_slots):
    """`slots` (None: sequence b has slot b) is a list for `batch` sequences; its content is not looked at."""
    if slots is not None:
        check_array(op, name, slots, "int32", (batch,), "[batch]")
    elif batch > num_slots:
        raise ValueError(f"{op}: {name} must be given when the pool has fewer slots than there are sequences, got none "
                         f"for {batch} sequences and {num_slots} slots")


def check_slot_numbers(op, name, slots, num_slots):
    """The content of `slots`, if it is given, names each slot of the pool once; negative ones skip their sequence."""
    if slots is None:
        return
    named = np.sort(to_host(slots))
    named = named[named >= 0]
    if (named[1:] == named[:-1]).any():
        raise ValueError(f"{op}: {name} must name no slot twice, got slot {named[1:][named[1:] == named[:-1]][0]} "
                         "more than once")
    if named.size and named[-1] >= num_slots:
        raise ValueError(f"{op}: {name} must be below the {num_slots} slots of the pool or negative, got {named[-1]}")


def check_slots(op, xp, name, slots, batch, num_slots):
    """`slots` (None: sequence b has slot b) names each slot of the pool once; negative ones skip their sequence."""
    check_slot_list(op, name, slots, batch, num_slots)
    if contents(xp):
        check_slot_numbers(op, name, slots, num_slots)


def has_state_bytes(op, has_state, batch):
    """`has_state`, bool or uint8 [batch] or None, as the kernels take it."""
    if has_state is None:
        return None
    check_array(op, "has_state", has_state, ("bool", "uint8"), (batch,), "[batch]")
    return has_state.view(np.uint8)
