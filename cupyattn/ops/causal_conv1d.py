# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution with a rolling window per sequence. Kernel: ``cuda_src/causal_conv1d.cu``."""

import functools

from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, strides
from ..runtime.checks import (
    FLOATS,
    check_array,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_shape,
    check_writeable,
)
from ..state_slots import check_pool, check_sequences, check_slots, has_state_bytes

ACTIVATIONS = (None, "silu", "swish")
REGISTER_WIDTH = 4   # taps that are held in registers; wider windows are read from memory


def _spec(x, weight, state, vec, width, layout, step=False):
    """`layout` of the state: "channels" are vectors of `vec`, "rows" are one access, "any" is read one by one.

    `step`: one token per sequence, and taps of a channel in one access.
    """
    return Specialisation("causal_conv1d", "causal_conv1d", "CausalConv1dArgs",
                          {"T": x, "W": weight, "S": state, "VEC": vec, "WIDTH": width, "STEP": int(step),
                           "CHANNEL_VECTORS": int(layout == "channels"), "ROW": 4 if layout == "rows" else 0})


CORE = [_spec(*case) for case in (
    ("float32", "float32", "float32", 1, 4, "rows", True), ("bfloat16", "bfloat16", "bfloat16", 8, 4, "channels"),
    ("bfloat16", "float32", "float32", 8, 4, "channels", True), ("float16", "float32", "float32", 1, 4, "rows"),
    ("bfloat16", "bfloat16", "bfloat16", 1, 4, "rows", True), ("float32", "float32", "float32", 4, 0, "any"),
    ("float16", "float16", "float32", 1, 0, "any"), ("float32", "float32", "float16", 4, 4, "channels", True),
    ("bfloat16", "bfloat16", "float32", 8, 0, "channels"), ("float32", "float32", "float32", 1, 4, "any"),
    ("float32", "float32", "float32", 4, 4, "any", True), ("float16", "float16", "float16", 8, 4, "channels", True),
)]


def more_specs():
    """Every legal one."""
    for x in FLOATS:
        for weight in dict.fromkeys((x, "float32")):
            for state in FLOATS:
                vec = 4 if x == "float32" else 8
                for width, step in ((0, False), (REGISTER_WIDTH, False), (REGISTER_WIDTH, True)):
                    yield from (_spec(x, weight, state, vec, width, layout, step) for layout in ("any", "channels"))
                    yield _spec(x, weight, state, 1, width, "any", step)
                yield from (_spec(x, weight, state, 1, REGISTER_WIDTH, "rows", step) for step in (False, True))


@functools.lru_cache(maxsize=4096)
def _plan_causal_conv1d(batch, tokens, packed, channels, width, whole, x, weight, state, wide, layout, arch):
    """(Plan, tokens of a piece) from sizes, dtype names, and arch.

    `whole`: REGISTER_WIDTH taps, one access for a channel, and a state that holds the window; `wide`: x and out have
    VEC channels at multiples of 16 bytes; `layout` as in `_spec`, of what the state allows.
    """
    vec = 4 if x == "float32" else 8
    if layout == "rows" and (packed or width > REGISTER_WIDTH):
        layout = "any"
    if layout == "rows" or not wide or channels % vec:
        vec, layout = 1, "any" if layout == "channels" else layout
    in_registers = width <= REGISTER_WIDTH
    step = not packed and tokens == 1 and whole
    count = 1 if layout != "rows" or not step else 2 if state == "float32" else 4   # rows of a thread, COUNT
    piece = max(width, 32 if arch == "cpu" else 64)
    if layout == "rows":
        piece = max(piece, tokens)
    pieces = tokens // piece + batch + 1 if packed else batch * -(-tokens // piece)
    if arch == "cpu":
        threads, blocks = 1, max(1, min(channels // vec, channels * min(tokens, piece) // 32768))
    else:
        threads = min(128, -(-channels // (32 * vec * count)) * 32)
        blocks = min(65535, -(-channels // (threads * vec * count)))
    spec = _spec(x, weight, state, vec, REGISTER_WIDTH if in_registers else 0, layout, step)
    note = (f"{'one channel' if vec * count == 1 else f'{vec * count} channels'} per thread; "
            f"{'window in registers' if in_registers else 'window from memory'}, state by {layout}")
    return Plan(spec, arch, (pieces, blocks), (threads,), note=note), piece


def _state_layout(state, vec):
    """What kind of accesses a state [slots, channels, state_len] allows."""
    if state is None:
        return "any"
    _, channel, time = strides(state)
    size = state.itemsize
    if channel == 1 and alignment(state.transpose(0, 2, 1)) % min(16, vec * size) == 0 and vec * size <= 32:
        return "channels"
    if state.shape[2] == 4 and time == 1 and alignment(state) % (4 * size) == 0:
        return "rows"
    return "any"


def _check_weights(op, weight, bias, channels, x_type):
    check_shape(op, "weight", weight, (channels, None), "[channels, width]")
    weight_type = check_dtype(op, "weight", weight, tuple(dict.fromkeys(("float32", x_type))))
    check_element_strides(op, "weight", weight)
    if weight.shape[1] < 1:
        raise ValueError(f"{op}: weight must have at least one tap, got {list(weight.shape)}")
    if bias is not None:
        check_array(op, "bias", bias, weight_type, (channels,), "[channels]")
    return weight_type


def _check_activation(op, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return int(activation is not None)


def _check_state(op, name, state, channels, width):
    found = check_pool(op, name, state, FLOATS, (None, channels, None), "[slots, channels, state_len]",
                       contiguous=False)
    if state.shape[2] < width - 1:
        raise ValueError(f"{op}: {name} must keep at least width - 1 = {width - 1} inputs, got {list(state.shape)}")
    return found


def _launch(xp, x, out, weight, bias, state, *, packed, x_type, weight_type, state_type, **fields):
    """One launch; `x` and `out` are views [batch, tokens, channels], of packed rows with a batch of 1."""
    _, tokens, channels = x.shape
    width, batch = weight.shape[1], fields["batch"]
    vec = 4 if x_type == "float32" else 8
    views = {}
    wide = True
    for name, array in (("x", x), ("out", out)):
        seq, token, channel = strides(array)
        views[name] = {"data": array, "stride_seq": 0 if packed else seq, "stride_token": token,
                       "stride_channel": channel}
        wide = wide and channel == 1 and alignment(array) == 16
    layout = "any" if fields["positions"] is not None and state.shape[2] == 4 and strides(state)[1] != 1 \
        else _state_layout(state, vec)
    state_len = 0 if state is None else state.shape[2]
    whole = width == REGISTER_WIDTH <= state_len + 1 and strides(weight)[1] == 1 and \
        alignment(weight) % min(16, width * weight.itemsize) == 0
    plan, piece = _plan_causal_conv1d(batch, tokens, packed, channels, width, whole, x_type, weight_type, state_type,
                                      wide, layout, arch_of(xp))
    slot, channel, time = (0, 0, 0) if state is None else strides(state)
    launch(plan, make_args(
        plan, **views, weight=weight, bias=bias, state=state, stride_weight_channel=strides(weight)[0],
        stride_weight_tap=strides(weight)[1], stride_slot=slot, stride_channel=channel, stride_time=time,
        is_packed=int(packed), tokens=tokens, channels=channels, width=width,
        state_len=state_len, num_slots=0 if state is None else state.shape[0], piece=piece, reserved=0, **fields))


def causal_conv1d(x, weight, bias=None, *, conv_states=None, cu_seqlens=None, slots=None, has_state=None,
                  activation=None, out=None):
    """Causal depthwise convolution of packed sequences, whose last inputs are kept for the tokens to come.

    out[t,c] = act(bias[c] + sum_j weight[c,j] * u[t - (width - 1) + j, c])

    u is the sequence's row of `x`; before its first row stands what its slot of `conv_states` holds, or zeros.
    Afterwards the slot holds the last state_len inputs, the newest last.

    Parameters
    ----------
    x : ndarray [tokens, channels], float16, bfloat16 or float32
        Rows of all sequences, one after another. Any strides; contiguous channels are fastest.
    weight : ndarray [channels, width], float32 or x.dtype
        Any width of at least 1; ``weight[:, -1]`` multiplies the current token.
    bias : ndarray [channels], dtype of weight, optional
    conv_states : ndarray [slots, channels, state_len], float16, bfloat16 or float32, optional
        A pool of windows, state_len ≥ width - 1, any strides; updated in place. Default: every sequence begins with
        zeros and nothing is kept.
    cu_seqlens : ndarray [batch + 1], int32, optional
        First row of each sequence, from 0 on, and the end of the last. A sequence without tokens leaves its slot as it
        is. Rows past the end give zeros. Default: one sequence of all rows.
    slots : ndarray [batch], int32, optional
        Slot of each sequence; a negative one skips the sequence: its rows give zeros. Default: sequence b has slot b.
    has_state : ndarray [batch], bool or uint8, optional
        False where a sequence begins with `x`: its slot is then not read, whatever it holds. Default: all True.
    activation : None, "silu" or "swish"
        silu and swish are both y * sigmoid(y).
    out : ndarray [tokens, channels], dtype of x, optional
        Overlaps no input.

    Returns
    -------
    out : ndarray [tokens, channels], dtype of x

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, a state_len below width - 1, an unknown activation. For NumPy arrays also offsets that
        decrease or leave `x`, a slot past the pool and one named twice; for CuPy arrays only with
        ``CUPYATTN_CHECK=1``, else a sequence with a slot past the pool is skipped.

    Notes
    -----
    Computed in float32 with one rounding on store; a row's bits do not depend on the other sequences. Up to a width of
    4 the window is held in registers; wider ones are read from memory for every output. On CuPy arrays asynchronous on
    the current stream. Kernel: ``cuda_src/causal_conv1d.cu``. The convolution of Mamba (arXiv:2312.00752, section 3.4).

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> x, weight = np.float32([[1], [2], [3]]), np.float32([[10, 1]])
    >>> cupyattn.causal_conv1d(x, weight)[:, 0]
    array([ 1., 12., 23.], dtype=float32)
    """
    op = "causal_conv1d"
    xp = array_namespace(op, x=x, weight=weight, bias=bias, conv_states=conv_states, cu_seqlens=cu_seqlens,
                         slots=slots, has_state=has_state, out=out)
    x_type = check_array(op, "x", x, FLOATS, (None, None), "[tokens, channels]", contiguous=False)
    tokens, channels = x.shape
    weight_type = _check_weights(op, weight, bias, channels, x_type)
    silu = _check_activation(op, activation)
    batch = check_sequences(op, xp, cu_seqlens, tokens)
    state_type = x_type
    if conv_states is None:
        for name, given in (("slots", slots), ("has_state", has_state)):
            if given is not None:
                raise ValueError(f"{op}: {name} must come with conv_states, got it without")
    else:
        state_type = _check_state(op, "conv_states", conv_states, channels, weight.shape[1])
        check_slots(op, xp, "slots", slots, batch, conv_states.shape[0])
        has_state = has_state_bytes(op, has_state, batch)
    if out is None:
        out = xp.empty(x.shape, x.dtype)
    check_array(op, "out", out, x_type, x.shape, "[tokens, channels]", contiguous=False)
    check_writeable(op, "out", out)
    if x.size:
        _launch(xp, x[None], out[None], weight, bias, conv_states, packed=True, x_type=x_type, weight_type=weight_type,
                state_type=state_type, cu_seqlens=cu_seqlens, slots=slots, positions=None, has_state=has_state,
                batch=batch, silu=silu)
    return out


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None, out=None):
    """The next tokens of a causal depthwise convolution: one step of decoding, or a few.

    out[b,c,t] = act(bias[c] + sum_j weight[c,j] * u[b,c,t - (width - 1) + j])

    u[b] is the row of `x`, before it the inputs that the row's slot of `conv_state` holds. Afterwards the slot holds
    the last state_len inputs, the newest last; with `cache_seqlens` it is a ring instead, and x[..., t] goes to place
    ``(cache_seqlens[b] + t) % state_len``.

    Parameters
    ----------
    x : ndarray [batch, channels] or [batch, channels, tokens], float16, bfloat16 or float32
        Any strides.
    conv_state : ndarray [slots, channels, state_len], float16, bfloat16 or float32
        A pool of windows, state_len ≥ width - 1, any strides; updated in place.
    weight : ndarray [channels, width], float32 or x.dtype
        Any width of at least 1; ``weight[:, -1]`` multiplies the current token.
    bias : ndarray [channels], dtype of weight, optional
    activation : None, "silu" or "swish"
    cache_seqlens : ndarray [batch], int32, optional
        Tokens that came before; the windows are then rings.
    conv_state_indices : ndarray [batch], int32, optional
        Slot of each row; a negative one skips the row: its out is zeros. Default: row b has slot b.
    out : ndarray, shape and dtype of x, optional
        Overlaps no input.

    Returns
    -------
    out : ndarray, shape and dtype of x

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, a state_len below width - 1, an unknown activation. For NumPy arrays also a slot past
        the pool and one named twice; for CuPy arrays only with ``CUPYATTN_CHECK=1``, else a row with a slot past the
        pool is skipped.

    Notes
    -----
    Computed in float32 with one rounding on store. Bound by memory bandwidth: an element of the state is read at most
    once and written once, in accesses of 16 bytes where channels are contiguous or four inputs of a channel are, 8 for
    four 16-bit inputs. On CuPy arrays asynchronous on the current stream. Kernel: ``cuda_src/causal_conv1d.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> state, weight = np.float32([[[2]]]), np.float32([[10, 1]])
    >>> cupyattn.causal_conv1d_update(np.float32([[3]]), state, weight), state
    (array([[23.]], dtype=float32), array([[[3.]]], dtype=float32))
    """
    op = "causal_conv1d_update"
    xp = array_namespace(op, x=x, conv_state=conv_state, weight=weight, bias=bias, cache_seqlens=cache_seqlens,
                         conv_state_indices=conv_state_indices, out=out)
    axes = "[batch, channels]" if x.ndim == 2 else "[batch, channels, tokens]"
    x_type = check_array(op, "x", x, FLOATS, (None,) * (2 if x.ndim == 2 else 3), axes, contiguous=False)
    batch, channels = x.shape[:2]
    weight_type = _check_weights(op, weight, bias, channels, x_type)
    silu = _check_activation(op, activation)
    state_type = _check_state(op, "conv_state", conv_state, channels, weight.shape[1])
    check_slots(op, xp, "conv_state_indices", conv_state_indices, batch, conv_state.shape[0])
    if cache_seqlens is not None:
        check_array(op, "cache_seqlens", cache_seqlens, "int32", (batch,), "[batch]")
        check_last_axis(op, "cache_seqlens", cache_seqlens)
    if out is None:
        out = xp.empty(x.shape, x.dtype)
    check_array(op, "out", out, x_type, x.shape, axes, contiguous=False)
    check_writeable(op, "out", out)
    if x.size:
        by_token = [a[:, None] if a.ndim == 2 else a.transpose(0, 2, 1) for a in (x, out)]
        _launch(xp, *by_token, weight, bias, conv_state, packed=False, x_type=x_type, weight_type=weight_type,
                state_type=state_type, cu_seqlens=None, slots=conv_state_indices, positions=cache_seqlens,
                has_state=None, batch=batch, silu=silu)
    return out
