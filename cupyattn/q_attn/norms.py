# SPDX-License-Identifier: Apache-2.0
"""The norms before and after the attention of a layer, and the residual."""

from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import rms_norm


def norm(x, gain, bias, is_rms, eps, out):
    """RMS norm or layer norm of the rows of x."""
    if is_rms:
        return rms_norm(x, gain, eps=eps, out=out)
    return layer_norm(x, gain, bias, eps=eps, out=out)


def add_normed(y, x, room, gain, bias, is_rms, eps):
    """x += norm(y) by way of `room`, like x (y itself, if it is); x = norm(y) where `room` is None."""
    norm(y, gain, bias, is_rms, eps, x if room is None else room)
    if room is not None:
        add(room, x, gain, eps)


def add(y, x, gain, eps):
    """x += y, which is overwritten: the sum is what is wanted of this norm, its result is nobody's."""
    rms_norm(y, gain, eps=eps, residual=x, out=y)
