# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a decay per head over a recurrent state. Kernels: ``cuda_src/lightning_attention.cu``."""

import functools
import itertools

import numpy as np

from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, make_args
from ..runtime.arrays import alignment, array_namespace, dtype_name, head_view, strides
from ..runtime.checks import FLOATS, check_array, check_number, check_writeable
from ..state_slots import (
    check_offsets,
    check_pool,
    check_slot_list,
    check_slot_numbers,
    contents,
    count_sequences,
    has_state_bytes,
)

MAX_DIM, MAX_BLOCK = 256, 256
TILE = 32            # tokens a prefill block holds at a time, and the default of block_size
MMA_BLOCK = 64       # tokens a block of the tensor cores' version holds at a time, and the default of block_size there
KEY_DIMS = (64, 128, 256)   # it is compiled for
CONVENTIONS = ("minimax", "easydel", "fla")
_OP = "lightning_attention"


def _spec(x, state, vec, prefill, on_cpu=False):
    """The CPU's versions have more work for a thread: a fiber costs more than a few more numbers."""
    chunks = 8 if on_cpu and not prefill else 1
    if prefill:
        rows = 8 if on_cpu else 4
    else:
        rows = 1 if on_cpu else 4 if state != "float32" and vec > 1 else 8
    return Specialisation(_OP, f"{_OP}_prefill" if prefill else _OP, "LightningAttentionArgs",
                          {"T": x, "S": state, "VEC": vec, "CHUNKS": chunks, "ROWS": rows, "PREFILL": int(prefill),
                           "TENSOR_CORES": 0, "KEY_DIM": 0, "COLUMNS": 0, "STAGES": 0},
                          spill_bytes=256 if chunks > 1 else 0)   # no GPU is given these


def _mma_spec(x, state, key_dim, columns, stages):
    return Specialisation(_OP, f"{_OP}_mma", "LightningAttentionArgs",
                          {"T": x, "S": state, "VEC": 8, "CHUNKS": 1, "ROWS": 16, "PREFILL": 1, "TENSOR_CORES": 1,
                           "KEY_DIM": key_dim, "COLUMNS": columns, "STAGES": stages},
                          min_sm=80, expects=("HMMA", "LDSM", "LDGSTS"))


CORE = [_spec(*case) for case in (
    ("float16", "float32", 4, False), ("bfloat16", "float32", 4, False), ("float32", "float32", 4, False),
    ("float16", "float16", 8, False), ("bfloat16", "bfloat16", 8, False), ("float32", "float16", 1, False),
    ("bfloat16", "float32", 8, False, True), ("float16", "bfloat16", 1, False, True),
    ("float32", "float32", 8, True), ("bfloat16", "float32", 8, True), ("float16", "float16", 8, True),
    ("float16", "float32", 1, True), ("float32", "bfloat16", 1, True), ("float16", "float32", 8, True, True),
)] + [_mma_spec(*case) for case in (
    ("float16", "float32", 128, 64, 2), ("bfloat16", "float32", 128, 64, 2), ("float16", "float32", 128, 32, 1),
    ("bfloat16", "bfloat16", 64, 64, 1), ("float16", "float16", 64, 32, 2), ("float16", "float32", 256, 32, 2),
    ("bfloat16", "float32", 256, 32, 1),
)]


def more_specs():
    """Every legal one."""
    for x, state, on_cpu in itertools.product(FLOATS, FLOATS, (False, True)):
        wide = 4 if state == "float32" and not on_cpu else 8
        for vec in (1, wide):
            yield _spec(x, state, vec, False, on_cpu)
        for vec in (1, 8):
            yield _spec(x, state, vec, True, on_cpu)
    for x, state, key_dim, columns, stages in itertools.product(FLOATS[:2], FLOATS, KEY_DIMS, (32, 64), (1, 2)):
        if key_dim < 256 or columns == 32:
            yield _mma_spec(x, state, key_dim, columns, stages)


def _divisor(number, most):
    """Largest divisor of `number` up to `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


@functools.lru_cache(maxsize=4096)
def _plan_lightning_attention(batch, heads, key_dim, value_dim, x, state, align, arch):
    """(Plan, columns of a block) for one token per sequence, from sizes, dtype names, alignment in bytes and arch."""
    on_cpu = arch == "cpu"
    vec = (4 if state == "float32" and not on_cpu else 8) if align == 16 else 1
    note = "16-byte accesses" if align == 16 else f"one element per access: alignment {align}"
    spec = _spec(x, state, vec, False, on_cpu)
    if on_cpu:
        lanes, groups = 1, 1
    else:
        # few states: more blocks of 128 bytes of a row each; many: whole rows
        lanes = _divisor(value_dim // vec, 8 if batch * heads < 512 else 32)
        groups = _divisor(key_dim // dict(spec.constants)["ROWS"], 128 // lanes)
    columns = lanes * vec * dict(spec.constants)["CHUNKS"]
    slices = -(-value_dim // columns)
    return Plan(spec, arch, (batch * heads * slices,), (lanes, groups), shared_bytes=4 * columns * groups,
                note=note), columns


def _shared_bytes(block_size, tile, key_dim, columns):
    """Of `BlockMemory`."""
    floats = -(-(block_size + 1) // 4) * 4 + tile * (key_dim + 4) + key_dim * (tile + 4) + tile * (tile + 4)
    return 4 * (floats + (tile + key_dim + tile * (block_size > tile)) * columns)


def _most_shared_bytes(arch):
    """Of a block's dynamic shared memory, by generation; the CPU takes what suits its caches."""
    if arch == "cpu":
        return 227 * 1024
    number = int(arch[3:].rstrip("af"))
    return 1024 * (64 if number < 80 else 163 if number in (80, 87) else 99 if number < 90 or number >= 120 else 227)


def _mma_shared_bytes(key_dim, columns, stages):
    """Of `MmaBlocks`."""
    tokens = 2 * MMA_BLOCK * (2 * (key_dim + 8) + columns + 8)
    return stages * tokens + 4 * key_dim * (columns + 8) + 4 * (MMA_BLOCK + 8)


def _mma_shape(batch, heads, key_dim, value_dim, most):
    """(KEY_DIM, COLUMNS, STAGES, shared bytes) on tensor cores; None when a block has too little memory."""
    width = next(width for width in KEY_DIMS if key_dim <= width)
    # half as wide where whole ones are too few for the GPU, or do not fit registers
    columns = 32 if width == 256 or value_dim <= 32 or batch * heads * -(-value_dim // 64) < 96 else 64
    for stages in (2, 1):
        shared = _mma_shared_bytes(width, columns, stages)
        if shared <= most:
            return width, columns, stages, shared
    return None


@functools.lru_cache(maxsize=4096)
def _plan_lightning_attention_prefill(batch, heads, key_dim, value_dim, block_size, x, state, align, arch):
    """(Plan, columns of a block, tile, block_size) for any number of tokens per sequence; arguments as above, and
    block_size or None. The rows of no sequence are one more."""
    most, why = _most_shared_bytes(arch), None
    if arch == "cpu" or int(arch[3:].rstrip("af")) < 80 or x == "float32":
        why = f"{x} on {arch}"
    elif align < 16:
        why = f"alignment {align}"
    elif (block_size or MMA_BLOCK) > MMA_BLOCK:
        why = f"block_size {block_size}"
    shape = _mma_shape(batch, heads, key_dim, value_dim, most) if why is None else None
    if shape is not None:
        width, columns, stages, shared = shape
        plan = Plan(_mma_spec(x, state, width, columns, stages), arch,
                    ((batch + 1) * heads * -(-value_dim // columns),), (128,), shared_bytes=shared,
                    note=f"tensor cores, {stages} blocks of {MMA_BLOCK} tokens at hand")
        return plan, columns, MMA_BLOCK, block_size or MMA_BLOCK
    block_size = block_size or TILE
    tile, columns = next(
        (tile, columns) for tile, columns in ((TILE, 64), (TILE, 32), (16, 32), (16, 16), (8, 8))
        if _shared_bytes(block_size, tile, key_dim, columns) <= most)
    tile, columns = min(tile, -(-block_size // 8) * 8), min(columns, value_dim)
    on_cpu = arch == "cpu"
    note = f"CUDA cores: {why or f'{most} bytes of shared memory'}; tiles of {tile} tokens"
    plan = Plan(_spec(x, state, 8 if align == 16 else 1, True, on_cpu), arch,
                ((batch + 1) * heads * -(-value_dim // columns),), (1 if on_cpu else 128,),
                shared_bytes=_shared_bytes(block_size, tile, key_dim, columns), note=note)
    return plan, columns, tile, block_size


def _check_dims(q, v):
    for name, dim, axis in (("q", q.shape[2], "key_dim"), ("v", v.shape[2], "value_dim")):
        if not 0 < dim <= MAX_DIM or dim % 8:
            raise ValueError(f"{_OP}: {name} must have a {axis} that is a multiple of 8 up to {MAX_DIM}, got {dim}")


def lightning_attention(q, k, v, state, slopes, /, *, scale=1.0, cu_seqlens=None, slots=None, has_state=None, mask=None,
                        block_size=None, out=None):
    """Linear attention with a decay per head (MiniMax's Lightning attention): a step, or a prefill in blocks.

    For the tokens t of a sequence in order, and every head h:

    state[h] <- exp(-slopes[h]) * state[h] + outer(k[t, h], v[t, h]),   out[t, h] = scale * q[t, h] @ state[h]

    Without `cu_seqlens` every sequence has one new token, the decode step; with it any number. There is no softmax, no
    normaliser and no scale of its own. The state of a sequence takes the place of a KV cache.

    Parameters
    ----------
    q, k : ndarray [tokens, heads, key_dim], float16, bfloat16 or float32
        Queries and keys after the model's activation, of all sequences one after the other. Any strides with a
        contiguous last axis; key_dim is a multiple of 8 up to 256.
    v : ndarray [tokens, heads, value_dim], dtype of q
        Values; value_dim is a multiple of 8 up to 256, and may differ from key_dim.
    state : ndarray [slots, heads, key_dim, value_dim], float32, float16 or bfloat16
        A pool of states, updated in place. Any strides with a contiguous last axis. float32 is recommended: what a
        16-bit state rounds away at every call adds up.
    slopes : ndarray [heads], float32
        Decay of each head, not negative; 0 keeps everything, infinity forgets at once. See `lightning_slopes`.
    scale : float
        Of the output. Default 1, as in MiniMax; flash-linear-attention uses ``key_dim ** -0.5``.
    cu_seqlens : ndarray [batch + 1], int32, optional
        First row of each sequence, from 0 on, and the end of the last. A sequence without tokens leaves its slot as it
        is. Rows past the end give zeros. Default: one token each, ``batch = tokens``.
    slots : ndarray [batch], int32, optional
        Slot of each sequence; a negative one skips the sequence: its rows give zeros (padding of a batch). Default:
        sequence b has slot b.
    has_state : ndarray [batch], bool or uint8, optional
        False: the sequence starts here, from zeros, and its old state is not read. Default: all go on.
    mask : ndarray [tokens], bool or uint8, optional
        False: key and value of the token count as zeros, whatever they hold. Since zeros do not fade, padding on the
        left of a fresh sequence is exact; leave padding on the right out by `cu_seqlens`.
    block_size : int, optional
        Tokens between two updates of the state in a prefill, 1 to 256. Changes rounding and speed, nothing else.
        Default 64 on tensor cores, which take no more, else 32.
    out : ndarray [tokens, heads, value_dim], dtype of q, optional
        Where to write. Must overlap no input.

    Returns
    -------
    out : ndarray [tokens, heads, value_dim], dtype of q

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes or strides that do not fit, or numbers out of range. For NumPy arrays also offsets that decrease or leave
        `q`, a slot past the pool and one named twice; for CuPy arrays only with ``CUPYATTN_CHECK=1``, else a sequence
        with a slot past the pool is skipped.

    Notes
    -----
    Computed in float32 with one rounding on each store, never TF32. On GPUs from sm_80 on, prefills of float16 and
    bfloat16 arrays with 16-byte rows run on tensor cores: products of these with float32 sums, in which scores, faded
    keys and the state count as sums of two 16-bit numbers each (at least 16 bits of each). States of other slots are
    neither read nor written. A step reads and writes each number of a state once; a prefill does so once per call. On
    the same GPU the bits of a sequence depend neither on its slot nor on what the sequences around it hold; a step and
    a prefill of one token differ by rounding. An infinity or NaN in a key or value reaches earlier tokens of its block
    in a prefill. On CuPy arrays asynchronous on the current stream. Kernels: ``cuda_src/lightning_attention.cu``.

    References
    ----------
    MiniMax-01: Scaling Foundation Models with Lightning Attention, arXiv 2501.08313; Lightning Attention-2, arXiv
    2401.04658.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> x = np.ones((3, 1, 8), np.float32)                              # three tokens, one head
    >>> state = np.zeros((1, 1, 8, 8), np.float32)
    >>> halving = np.log(np.float32([2]))
    >>> cupyattn.lightning_attention(x, x, x, state, halving, cu_seqlens=np.int32([0, 3]))[:, 0, 0]
    array([ 8., 12., 14.], dtype=float32)
    >>> cupyattn.lightning_attention(x[:1], x[:1], x[:1], state, halving)[:, 0, 0]   # the fourth
    array([15.], dtype=float32)
    """
    xp = array_namespace(_OP, v=v)
    if out is None:
        out = xp.empty(v.shape, v.dtype)
    found, *where = _prepared((q, k, v, state, slopes, cu_seqlens, slots, has_state, mask, out), scale, block_size)
    if contents(xp):
        check_offsets(_OP, cu_seqlens, q.shape[0])
        check_slot_numbers(_OP, "slots", slots, state.shape[0])
    if found is not None:
        found.launch(*where)
    return out


@Prepared
def _prepared(q, k, v, state, slopes, cu_seqlens, slots, has_state, mask, out, scale, block_size):
    """The launch for arrays of these kinds; None where there is nothing to do."""
    xp = array_namespace(_OP, q=q, k=k, v=v, state=state, slopes=slopes, cu_seqlens=cu_seqlens, slots=slots,
                         has_state=has_state, mask=mask, out=out)
    x_type = check_array(_OP, "q", q, FLOATS, (None, None, None), "[tokens, heads, key_dim]")
    tokens, heads, key_dim = q.shape
    check_array(_OP, "k", k, x_type, q.shape, "[tokens, heads, key_dim]")
    check_array(_OP, "v", v, x_type, (tokens, heads, None), "[tokens, heads, value_dim]")
    value_dim = v.shape[2]
    _check_dims(q, v)
    check_pool(_OP, "state", state, FLOATS, (None, heads, key_dim, value_dim), "[slots, heads, key_dim, value_dim]",
               contiguous=True)
    check_array(_OP, "slopes", slopes, "float32", (heads,), "[heads]", contiguous=False)
    check_number(_OP, "scale", scale)
    if block_size is not None:
        check_number(_OP, "block_size", block_size, least=1, integer=True)
        if block_size > MAX_BLOCK:
            raise ValueError(f"{_OP}: block_size must be from 1 to {MAX_BLOCK}, got {block_size}")
        block_size = int(block_size)
    batch = tokens if cu_seqlens is None else count_sequences(_OP, cu_seqlens)
    check_slot_list(_OP, "slots", slots, batch, state.shape[0])
    has_state = has_state_bytes(_OP, has_state, batch)
    if mask is not None:
        check_array(_OP, "mask", mask, ("bool", "uint8"), (tokens,), "[tokens]", contiguous=False)
        mask = mask.view("uint8")
    check_array(_OP, "out", out, x_type, v.shape, "[tokens, heads, value_dim]")
    check_writeable(_OP, "out", out)
    if out.size == 0:
        return None
    kinds = (x_type, dtype_name(state), min(alignment(a) for a in (q, k, v, out, state)), arch_of(xp))
    if cu_seqlens is None:
        plan, columns = _plan_lightning_attention(batch, heads, key_dim, value_dim, *kinds)
        tile = block_size = 1
    else:
        plan, columns, tile, block_size = _plan_lightning_attention_prefill(
            batch, heads, key_dim, value_dim, block_size, *kinds)
    slot, state_head, state_key, _ = strides(state)
    return Template(plan, make_args(
        plan, q=head_view(q), k=head_view(k), v=head_view(v), out=head_view(out), state=state, slopes=slopes,
        cu_seqlens=cu_seqlens, slots=slots, has_state=has_state, mask=mask, stride_slot=slot,
        stride_state_head=state_head, stride_key=state_key, stride_slope=strides(slopes)[0],
        stride_mask=0 if mask is None else strides(mask)[0], batch=batch, tokens=tokens, heads=heads, key_dim=key_dim,
        value_dim=value_dim, num_slots=state.shape[0], slices=-(-value_dim // columns), columns=columns, tile=tile,
        block_size=block_size, scale=scale, reserved=0))


def lightning_slopes(num_heads, layer, num_layers, *, convention="minimax", xp=np):
    """Slopes for `lightning_attention`, in one of the conventions that models were trained with.

    With H heads, l the layer and L layers:

    "minimax": ``2 ** (-8 * (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)``

    "easydel": ALiBi's slopes times ``1 - l / (L - 1) + 1e-5``. For H a power of two these are those of "minimax" before
    the layer's factor; else those of the power of two below, then every second one of the power of two above.

    "fla": ``8 / H * (1 - l / L) * h``; head 0 never fades. Goes with ``scale = key_dim ** -0.5``.

    Parameters
    ----------
    num_heads : int
    layer : int
        From 0 on.
    num_layers : int
        Of the whole model, those without this attention included. With one layer "easydel" has the factor 1 + 1e-5.
    convention : "minimax", "easydel" or "fla"
        MiniMax's and Hugging Face's, EasyDeL's, or flash-linear-attention's and ejkernel's.
    xp : module
        numpy or cupy.

    Returns
    -------
    ndarray [num_heads], float32

    Raises
    ------
    TypeError
        A number that is no integer.
    ValueError
        A number out of range, or an unknown convention.

    Examples
    --------
    >>> import cupyattn
    >>> cupyattn.lightning_slopes(4, 0, 9, convention="fla")
    array([0., 2., 4., 6.], dtype=float32)
    """
    op = "lightning_slopes"
    check_number(op, "num_heads", num_heads, least=1, integer=True)
    check_number(op, "num_layers", num_layers, least=1, integer=True)
    check_number(op, "layer", layer, least=0, integer=True)
    if layer >= num_layers:
        raise ValueError(f"{op}: layer must be below num_layers = {num_layers}, got {layer}")
    if convention not in CONVENTIONS:
        raise ValueError(f"{op}: convention must be one of {CONVENTIONS}, got {convention!r}")
    if convention == "fla":
        slopes = 8 / num_heads * (1 - layer / num_layers) * np.arange(num_heads)
    elif convention == "minimax":
        slopes = _powers(num_heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)
    else:
        below = 1 << (int(num_heads).bit_length() - 1)
        slopes = np.concatenate([_powers(below), _powers(2 * below)[::2][:num_heads - below]])
        slopes = slopes * (1 - layer / max(1, num_layers - 1) + 1e-5)
    return xp.asarray(slopes.astype(np.float32))


def _powers(num_heads):
    """ALiBi's slopes for a power of two, MiniMax's for any number."""
    return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)
