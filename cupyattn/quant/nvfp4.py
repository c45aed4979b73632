# SPDX-License-Identifier: Apache-2.0
"""NVFP4: w[n, k] = E2M1 of a nibble * scale[n, k // 16] * one number of the tensor.

    compressed-tensors   weight_packed uint8 [N, K / 2]    weight_scale e4m3 [N, K / 16]    weight_global_scale float32
    ModelOpt             weight uint8 [N, K / 2]           weight_scale e4m3 [N, K / 16]    weight_scale_2 float32

weight_global_scale is a divisor, weight_scale_2 a multiplier. The low nibble is the one of even k.
"""

import numpy as np

from .coded import CodedWeight, Segment
from .nibbles import unpack_nibbles
from .tensors import check_shape, take

GROUP = 16


def read(tensors):
    """An NVFP4 weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``weight_packed``, ``weight_scale`` and ``weight_global_scale``, or ``weight``, ``weight_scale`` and
        ``weight_scale_2``; the last of each holds one number.

    Returns
    -------
    CodedWeight
        Scales float8_e4m3fn [N, K / 16], super_scale float32 [N, 1].

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape, dtype or sign; named in the message.
    """
    ours, name = ("weight", "weight_scale_2") if "weight_scale_2" in tensors else (
        "weight_packed", "weight_global_scale")
    packed = take(tensors, ours, ("uint8",), (None, None))
    rows, columns = check_shape((len(packed), 2 * packed.shape[1]))
    if columns % GROUP:
        raise ValueError(f"QMatrix: {ours} must have in_features a multiple of {GROUP}, got {columns}")
    scale = take(tensors, "weight_scale", ("float8_e4m3fn",), (rows, columns // GROUP))
    found = np.shape(tensors.get(name, ()))
    number = take(tensors, name, ("float32",), found)
    if number.size != 1 or not number.item() > 0:
        raise ValueError(f"QMatrix: {name} must be one number above 0, got {number.tolist()}")
    number = np.float32(number.item())
    above = np.full((rows, 1), number if name == "weight_scale_2" else 1 / number, np.float32)
    segment = Segment(unpack_nibbles(packed), 4, "e2m1", GROUP, scale, super_scale=above, super_group=columns)
    return CodedWeight("nvfp4", (rows, columns), (segment,))
