# SPDX-License-Identifier: Apache-2.0
"""Selective state space models over packed sequences. Kernel: ``cuda_src/selective_scan.cu``."""

import functools
import itertools

import numpy as np

from ..runtime import Plan, Specialisation, arch_of, launch, make_args, workspace
from ..runtime.arrays import alignment, array_namespace, head_view, strides
from ..runtime.checks import FLOATS, check_array, check_number, check_writeable
from ..selective_inputs import check_inputs, find_sizes, with_heads
from ..state_slots import check_pool, check_sequences, check_slots, has_state_bytes

MAX_STATES = 512
TILE = 32   # tokens that the dual form multiplies at once; pieces are whole tiles
DUAL_DIMS = (64, 32, 16)
MMA_DIMS, MMA_TOKENS, MMA_STATES = 64, 64, (64, 128, 256)   # of a block on tensor cores
_KERNELS = ("selective_scan_carry", "selective_scan", "selective_scan_dual", "selective_scan_mma")


def _spec(form, x, dt, state, outputs, state_decays, vec, lanes=1, count=1, dims=0, states=0):
    """`form` is 0 for the carry, 1 for the recurrence with `lanes` and `count`, 2 for the dual form with `dims`, 3 for
    that on tensor cores with up to `states`."""
    return Specialisation("selective_scan", _KERNELS[form], "SelectiveScanArgs",
                          {"FORM": form, "T": x, "DT": dt, "S": state, "OUTPUTS": int(outputs),
                           "STATE_DECAYS": int(state_decays), "VEC": vec, "LANES": lanes, "COUNT": count,
                           "DIMS": dims or 16, "STATES": states},
                          min_sm=80 if form == 3 else 75, expects=("HMMA", "LDSM", "LDGSTS") if form == 3 else (),
                          # only the CPU's hold so many; sm_120a is short of three registers
                          spill_bytes=8192 if count > 4 else 12 if states == 128 else 0)


def _carry(state, state_decays):
    return _spec(0, "float32", "float32", state, True, state_decays, 1)


def _recurrence(*case):
    return _spec(1, *case)


def _dual(x, dt, state, outputs, vec, dims):
    return _spec(2, x, dt, state, outputs, False, vec, dims=dims)


def _mma(x, dt, state, outputs, states):
    return _spec(3, x, dt, state, outputs, False, 8, dims=MMA_DIMS, states=states)


CORE = [
    _carry("float32", True), _carry("bfloat16", False), _carry("float16", True),
    _recurrence("float16", "float16", "float32", True, True, 4, 1, 4),
    _recurrence("bfloat16", "float32", "float32", False, True, 4, 1, 4),
    _recurrence("float32", "float32", "bfloat16", True, False, 4, 8, 4),
    _recurrence("bfloat16", "bfloat16", "float32", False, False, 4, 8, 4),
    _recurrence("float32", "float32", "float32", True, True, 8, 1, 2),
    _recurrence("float16", "float32", "float32", False, True, 8, 1, 2),
    _recurrence("float32", "float32", "float16", True, False, 8, 1, 16),
    _dual("float16", "float16", "float32", True, 4, 64), _dual("bfloat16", "float32", "float32", False, 4, 64),
    _dual("float32", "float32", "bfloat16", True, 4, 16), _dual("float32", "float32", "float32", True, 8, 64),
    _dual("bfloat16", "bfloat16", "float16", False, 8, 16), _dual("float16", "float32", "float32", True, 4, 32),
    _mma("float16", "float32", "float32", True, 128), _mma("float16", "float16", "float32", False, 128),
    _mma("bfloat16", "bfloat16", "float32", True, 128), _mma("bfloat16", "float32", "float32", False, 64),
    _mma("float16", "float16", "float32", True, 256), _mma("bfloat16", "float32", "bfloat16", True, 64),
]


def more_specs():
    """What plans pick on a GPU: every type with one shape of work, and every shape with two types."""
    yield from (_carry(state, decays) for state in FLOATS for decays in (True, False))
    for x, state, outputs in itertools.product(FLOATS, FLOATS, (True, False)):
        for dt in dict.fromkeys((x, "float32")):
            yield from (_recurrence(x, dt, state, outputs, decays, 4, 1, 4) for decays in (True, False))
            yield _dual(x, dt, state, outputs, 4, 64)
            if x != "float32":
                yield from (_mma(x, dt, state, outputs, states) for states in MMA_STATES)
    for outputs, x in itertools.product((True, False), ("bfloat16", "float32")):
        yield from (_recurrence(x, x, "float32", outputs, decays, 4, lanes, 4)
                    for decays in (True, False) for lanes in (2, 4, 8, 16, 32))
        yield from (_dual(x, x, "float32", outputs, 4, dims) for dims in DUAL_DIMS)


def _power_of_two(n):
    return 1 << max(0, n - 1).bit_length()


def _dual_bytes(dims, states):
    """Dynamic shared memory of selective_dual.cuh."""
    states = -(-states // 4) * 4
    return 4 * (5 * TILE + 2 * TILE * dims + states * (TILE + 4 + dims + 4) + TILE * (TILE + 4) + TILE * (states + 4))


def _dual_dims(head_dim, states, arch):
    """Dims of a block of the dual form: as many as there are and shared memory allows; None if that is too little."""
    most = 64 if arch == "sm_75" else 96   # KiB; 99 on sm_86 and sm_120
    for i, dims in enumerate(DUAL_DIMS):
        needed = i == len(DUAL_DIMS) - 1 or head_dim > DUAL_DIMS[i + 1]
        if needed and _dual_bytes(dims, states) <= most * 1024:
            return dims
    return None


def _mma_bytes(states, outputs):
    """Dynamic shared memory of selective_mma.cuh."""
    rows = states + 8 + MMA_DIMS + 8 + (states + 8 + 2 * (MMA_TOKENS + 8) if outputs else 0)
    return 2 * MMA_TOKENS * rows + 4 * (6 * MMA_TOKENS + MMA_DIMS)


def _no_mma(head_dim, states, x, align, arch):
    """Why the dual form of these arrays does not run on tensor cores; None if it does."""
    if arch == "cpu" or int(arch[3:].rstrip("af")) < 80 or x == "float32":
        return f"{x} on {arch}"
    if align < 16 or head_dim % 8 or states % 8:
        return f"alignment {align}, {head_dim} dims, {states} states"
    return f"{states} states" if states > MMA_STATES[-1] else None


@functools.lru_cache(maxsize=4096)
def _plan_selective_scan(tokens, batch, heads, head_dim, states, x, dt, state, state_decays, per_head, chunk_size,
                         outputs, align, arch):
    """Plan of one of the two steps that read tokens, from sizes, dtype names, alignment in bytes and arch.

    `per_head`: the dims of a head have one step and one rate, which the dual form needs.
    """
    pieces = tokens // chunk_size + batch + 1
    why = _no_mma(head_dim, states, x, align, arch)
    if per_head and why is None:
        width = next(width for width in MMA_STATES if states <= width)
        return Plan(_mma(x, dt, state, outputs, width), arch, (pieces, heads, -(-head_dim // MMA_DIMS)), (128,),
                    shared_bytes=_mma_bytes(width, outputs), note="dual form on tensor cores")
    dims = _dual_dims(head_dim, states, arch) if per_head else None
    vec = 8 if arch == "cpu" else 4
    if dims is not None:
        threads = 1 if arch == "cpu" else 128
        return Plan(_dual(x, dt, state, outputs, vec, dims), arch,
                    (pieces, heads, -(-head_dim // dims)), (threads,), shared_bytes=_dual_bytes(dims, states),
                    note=f"dual form, {dims} dims per block; CUDA cores: {why}")
    if arch == "cpu":
        lanes, count, threads = 1, _power_of_two(-(-states // 8)), 32
    else:
        lanes, count, threads = _power_of_two(-(-states // 16)), 4, 128
    slots = lanes * count * vec
    return Plan(_recurrence(x, dt, state, outputs, state_decays, vec, lanes, count), arch,
                (pieces, heads, -(-head_dim * lanes // threads)), (threads,),
                shared_bytes=2 * 4 * slots * (8 if slots > 128 else 32), note=f"recurrence, {lanes} threads per dim")


@functools.lru_cache(maxsize=4096)
def _plan_carry(batch, states, state, state_decays, arch):
    """Plan from the sequences and the states of one."""
    threads, blocks = (1, max(1, states // 32768)) if arch == "cpu" else (256, min(65535, -(-states // 256)))
    return Plan(_carry(state, state_decays), arch, (batch, blocks), (threads,))


def _check_state(op, xp, state, sizes, slots, has_state, batch):
    """The pool and what goes with it; its dtype's name, fields of the kernel's struct."""
    if state is None:
        for name, given in (("slots", slots), ("has_state", has_state)):
            if given is not None:
                raise ValueError(f"{op}: {name} must come with state, got it without")
        return "float32", {"state": None, "slots": None, "has_state": None, "stride_slot": 0, "stride_head": 0,
                           "stride_dim": 0, "num_slots": batch}
    axes = "[slots, heads, head_dim, state_size]" if sizes.with_heads else "[slots, channels, state_size]"
    found = check_pool(op, "state", state, FLOATS, (None, *sizes.dims, sizes.state_size), axes, contiguous=True)
    check_slots(op, xp, "slots", slots, batch, state.shape[0])
    slot, head, dim, _ = strides(with_heads(state, sizes.with_heads))
    return found, {"state": state, "slots": slots, "has_state": has_state_bytes(op, has_state, batch),
                   "stride_slot": slot, "stride_head": head, "stride_dim": dim, "num_slots": state.shape[0]}


def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, *, state=None, cu_seqlens=None,
                   slots=None, has_state=None, dt_limit=None, chunk_size=256, out=None):
    """A selective state space model (Mamba, Mamba-2) over packed sequences, the prefill of `selective_state_update`.

    For the tokens t of a sequence in turn:

    step = dt[t] + dt_bias, with dt_softplus log1p(exp(step)), then limited to dt_limit
    state[p,n] <- exp(step[p] * A[p,n]) * state[p,n] + step[p] * x[t,p] * B[t,n]
    out[t,p] = (sum_n state[p,n] * C[t,n] + D[p] * x[t,p]) * z[t,p] * sigmoid(z[t,p])

    Mamba-1 has channels p; Mamba-2 has dims p of heads h, one A, dt and D for a head, and B and C of group
    ``h // (heads // groups)``.

    Parameters
    ----------
    x : ndarray [tokens, channels] or [tokens, heads, head_dim], float16, bfloat16 or float32
        Rows of all sequences, one after another.
    dt : ndarray, shape of x, or [tokens, heads]; float32 or x.dtype
        The raw step, before bias and softplus. May repeat a head's step over its dims by a stride of 0.
    A : ndarray [channels, state_size], or [heads] or [heads, head_dim, state_size], float32
        Negative. With heads, the axes after the first may repeat it by strides of 0, which is as fast as [heads].
    B, C : ndarray [tokens, state_size] or [tokens, groups, state_size], dtype of x
        state_size is at most 512.
    D : ndarray [channels], or [heads] or [heads, head_dim], float32, optional
        Adds ``D * x``.
    z : ndarray, shape and dtype of x, optional
        Gate, applied last.
    dt_bias : ndarray, as D, optional
    dt_softplus : bool
        A step above 20 is its own softplus.
    state : ndarray [slots, channels, state_size] or [slots, heads, head_dim, state_size], optional
        A pool of states, float32 (recommended), float16 or bfloat16, any strides with a contiguous last axis: where
        sequences begin and, in place, where they end. Default: they begin with zeros and nothing is kept.
    cu_seqlens : ndarray [batch + 1], int32, optional
        First row of each sequence, from 0 on, and the end of the last. A sequence without tokens leaves its slot as it
        is. Rows past the end give zeros. Default: one sequence of all rows.
    slots : ndarray [batch], int32, optional
        Slot of each sequence; a negative one skips the sequence: its rows give zeros. Default: sequence b has slot b.
    has_state : ndarray [batch], bool or uint8, optional
        False where a sequence begins with `x`: its slot is then not read, whatever it holds. Default: all True.
    dt_limit : (float, float), optional
        Smallest and largest step. Default: none, also for negative steps.
    chunk_size : int
        Tokens of a sequence that are computed one after another, a multiple of 32; its chunks are computed at once.
        Changes results by rounding only.
    out : ndarray, shape and dtype of x, optional
        Overlaps no input.

    Returns
    -------
    out : ndarray, shape and dtype of x

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or an option of the wrong kind.
    ValueError
        Shapes or strides that do not fit. For NumPy arrays also offsets that decrease or leave `x`, a slot past the
        pool and one named twice; for CuPy arrays only with ``CUPYATTN_CHECK=1``, else a sequence with a slot past the
        pool is skipped.
    NotImplementedError
        A state_size above 512.

    Notes
    -----
    Computed in float32. Chunks are counted from the beginning of each sequence: a row's bits do not depend on the
    other sequences. What all chunks but the last make of zeros comes first, then the state each begins with, in their
    order, then the outputs; sequences of one chunk need only the last. With one step and rate per head (Mamba-2) 32 or
    64 tokens at a time are products of matrices, the state space dual; else every token follows its predecessor. The
    dual form of float16 and bfloat16 arrays runs on tensor cores on GPUs from sm_80 on, with head_dim and state_size
    multiples of 8, the latter up to 256, and 16-byte rows of x, z, B, C and out: exact products with float32 sums, in
    which scores with their decay, inputs with their step and states count as sums of two 16-bit numbers each (at least
    16 bits of each), and what is 2**39 times smaller than others of its 64 tokens may vanish in float16. All else runs
    on CUDA cores, which is what limits it. Scratch: at most ``2 * tokens / chunk_size + 1`` float32 states. On CuPy
    arrays asynchronous on the current stream. Kernel: ``cuda_src/selective_scan.cu``. Mamba: arXiv:2312.00752,
    Mamba-2: arXiv:2405.21060.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> ones = np.ones((3, 1), np.float32)
    >>> A = -np.log(np.float32([[2]]))    # a step of 1 halves
    >>> cupyattn.selective_scan(8 * ones, ones, A, ones, ones)[:, 0]
    array([ 8., 12., 14.], dtype=float32)
    """
    op = "selective_scan"
    xp = array_namespace(op, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state, cu_seqlens=cu_seqlens,
                         slots=slots, has_state=has_state, out=out)
    sizes = find_sizes(op, x, A, B, "tokens")
    found = check_inputs(op, sizes, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, rows="tokens")
    check_number(op, "chunk_size", chunk_size, least=TILE, integer=True)
    if chunk_size % TILE:
        raise ValueError(f"{op}: chunk_size must be a multiple of {TILE}, got {chunk_size}")
    if sizes.state_size > MAX_STATES:
        raise NotImplementedError(f"{op}: state_size must be at most {MAX_STATES}, got {sizes.state_size}")
    batch = check_sequences(op, xp, cu_seqlens, x.shape[0])
    state_type, fields = _check_state(op, xp, state, sizes, slots, has_state, batch)
    if out is None:
        out = xp.empty(x.shape, x.dtype)
    check_array(op, "out", out, found.x_type, x.shape, "the shape of x")
    check_writeable(op, "out", out)
    if x.size:
        longest = x.shape[0] if xp is not np or cu_seqlens is None else int(np.diff(cu_seqlens).max(initial=0))
        fields |= {"in": found.fields, "out": head_view(with_heads(out, sizes.with_heads)), "cu_seqlens": cu_seqlens,
                   "batch": batch, "tokens": x.shape[0], "piece": chunk_size}
        align = min(alignment(array) for array in (x, B, C, out, out if z is None else z))
        _launch(xp, sizes, found, state_type, fields, longest > chunk_size, align)
    return out


def _launch(xp, sizes, found, state_type, fields, in_pieces, align):
    """The three steps, or if no sequence has several pieces the last one."""
    tokens, batch, chunk_size, arch = fields["tokens"], fields["batch"], fields["piece"], arch_of(xp)
    channels = sizes.heads * sizes.head_dim
    plans = [_plan_selective_scan(
        tokens, batch, sizes.heads, sizes.head_dim, sizes.state_size, found.x_type, found.dt_type, state_type,
        found.state_decays, found.per_head, chunk_size, outputs, align, arch) for outputs in (False, True)]
    fields |= {"carried": None, "totals": None}
    if in_pieces:
        kept = -(-2 * tokens // chunk_size)
        scratch = workspace(xp, 4 * kept * channels * (sizes.state_size + 1)).view(np.float32)
        fields["carried"] = scratch[:kept * channels * sizes.state_size]
        fields["totals"] = scratch[kept * channels * sizes.state_size:]
        carry = _plan_carry(batch, channels * sizes.state_size, state_type, found.state_decays, arch)
        for plan in (plans[0], carry):
            launch(plan, make_args(plan, **fields))
    launch(plans[1], make_args(plans[1], **fields))
