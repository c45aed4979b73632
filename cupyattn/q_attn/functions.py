# SPDX-License-Identifier: Apache-2.0
"""ExLlamaV2's functions over QAttn: same names, order of arguments and effects; objects in place of handles."""

from collections.abc import Mapping

from .layer import QAttn
from .lora import LoRA, names_of

ROPE_STYLE_NONE, ROPE_STYLE_GPTJ, ROPE_STYLE_NEOX = 0, 1, 2


def make_q_attn(layernorm, layernorm_bias, layernorm_is_rms, norm_epsilon, q_q_proj, q_k_proj, q_v_proj, q_o_proj,
                temp_state, temp_dq, max_rows, hidden_size, num_heads, num_kv_heads, head_dim, max_seq_len,
                has_residual, rope_style, sincos_size=None, q_norm=None, k_norm=None, post_layernorm=None,
                post_layernorm_bias=None, residual_fp32=False, use_graphs=False, *, headnorm_is_rms=True, q_bias=None,
                k_bias=None, v_bias=None, o_bias=None, dtype="float16", xp=None):
    """A `QAttn`, by ExLlamaV2's arguments in their order.

    Parameters
    ----------
    layernorm, layernorm_bias : ndarray or None
        See `QAttn`, also for all others; None stands for an absent tensor.
    layernorm_is_rms : bool
    norm_epsilon : float
    q_q_proj, q_k_proj, q_v_proj, q_o_proj : QMatrix or ndarray
    temp_state, temp_dq : ndarray or None
    max_rows, hidden_size, num_heads, num_kv_heads, head_dim, max_seq_len : int
    has_residual : bool
    rope_style : int or str
    sincos_size : int, optional
    q_norm, k_norm, post_layernorm, post_layernorm_bias : ndarray, optional
    residual_fp32, use_graphs : bool
    headnorm_is_rms : bool
    q_bias, k_bias, v_bias, o_bias : ndarray, optional
    dtype : str
    xp : numpy or cupy, optional

    Returns
    -------
    QAttn
        ExLlamaV2 returns a number.
    """
    return QAttn(**locals())


def free_q_attn(q_attn):
    """Let go of a layer's weights.

    Parameters
    ----------
    q_attn : QAttn

    Raises
    ------
    ValueError
        From later calls of the layer.
    """
    _checked("free_q_attn", q_attn).close()


def q_attn_forward_1(q_attn, x, batch_size, q_len, past_len, past_lens, q_temp, k_temp, v_temp, sin, cos, loras=(),
                     loras_temp=None):
    """Queries, keys and values of new tokens: `QAttn.forward_1`.

    Parameters
    ----------
    q_attn : QAttn
    x : ndarray
        See `QAttn.forward_1`, also for the others.
    batch_size, q_len, past_len : int
    past_lens : ndarray or None
    q_temp, k_temp, v_temp : ndarray
        Filled.
    sin, cos : ndarray or None
    loras : sequence
        Keys of `q_attn_set_loras`; those this layer does not have are skipped.
    loras_temp : ndarray, optional

    Raises
    ------
    TypeError, ValueError
        As `QAttn.forward_1`.
    """
    _checked("q_attn_forward_1", q_attn)
    q_attn.forward_1(x, batch_size, q_len, past_len, past_lens, q_temp, k_temp, v_temp, sin, cos,
                     _known(q_attn, loras), loras_temp)


def q_attn_forward_2(q_attn, x, attn_output, batch_size, q_len, loras=(), loras_temp=None):
    """Output projection and residual: `QAttn.forward_2`.

    Parameters
    ----------
    q_attn : QAttn
    x : ndarray
        Changed in place.
    attn_output : ndarray
        See `QAttn.forward_2`, also for the others.
    batch_size, q_len : int
    loras : sequence
        Keys of `q_attn_set_loras`; those this layer does not have are skipped.
    loras_temp : ndarray, optional

    Raises
    ------
    TypeError, ValueError
        As `QAttn.forward_2`.
    """
    _checked("q_attn_forward_2", q_attn)
    q_attn.forward_2(x, attn_output, batch_size, q_len, _known(q_attn, loras), loras_temp)


def q_attn_set_loras(q_attn, q_proj_lora_a, q_proj_lora_b, k_proj_lora_a, k_proj_lora_b, v_proj_lora_a, v_proj_lora_b,
                     o_proj_lora_a, o_proj_lora_b):
    """The adapters that calls can name, in place of those of an earlier call: `QAttn.set_loras`.

    Parameters
    ----------
    q_attn : QAttn
    q_proj_lora_a : dict of key to ndarray [in_features, rank]
        By adapter.
    q_proj_lora_b : dict of key to ndarray [rank, out_features]
        Scale included.
    k_proj_lora_a, k_proj_lora_b, v_proj_lora_a, v_proj_lora_b, o_proj_lora_a, o_proj_lora_b : dict
        Likewise.

    Returns
    -------
    int
        The largest rank of all projections and adapters, 0 for none.

    Raises
    ------
    TypeError, ValueError
        A matrix that does not fit its projection, or one of a pair without the other.
    """
    op = "q_attn_set_loras"
    _checked(op, q_attn)
    given = {"q": (q_proj_lora_a, q_proj_lora_b), "k": (k_proj_lora_a, k_proj_lora_b),
             "v": (v_proj_lora_a, v_proj_lora_b), "o": (o_proj_lora_a, o_proj_lora_b)}
    adapters = {}
    for p, halves in given.items():
        for half, matrices in zip("ab", halves, strict=True):
            if not isinstance(matrices, Mapping):
                raise TypeError(f"{op}: {p}_proj_lora_{half} must be a dict of key to array, got "
                                f"{type(matrices).__name__}")
            for key, matrix in matrices.items():
                if getattr(matrix, "ndim", None) != 2:
                    raise TypeError(f"{op}: {p}_proj_lora_{half}[{key!r}] must be an array of two axes, got "
                                    f"{type(matrix).__name__}")
        a, b = halves
        for key in (*a, *b):
            if key not in a or key not in b:
                half, other = ("a", "b") if key in a else ("b", "a")
                raise ValueError(f"{op}: {p}_proj_lora_{other} must have {key!r} like {p}_proj_lora_{half}, got none")
            adapters.setdefault(key, {})[p] = LoRA(a[key].T, b[key].T)
    return q_attn.set_loras(adapters)


def _checked(op, q_attn):
    """`q_attn`, which is a QAttn."""
    if not isinstance(q_attn, QAttn):
        raise TypeError(f"{op}: q_attn must be a QAttn, from make_q_attn, got {type(q_attn).__name__}")
    return q_attn


def _known(q_attn, loras):
    names, _ = names_of(loras, None)
    return [key for key in names if key in q_attn.loras.names]
