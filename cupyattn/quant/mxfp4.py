# SPDX-License-Identifier: Apache-2.0
"""MXFP4: w[n, k] = E2M1 of a nibble * 2**(scale[n, k // 32] - 127); a scale of 255 is NaN.

    gpt-oss              blocks uint8 [..., N, K / 32, 16]    scales uint8 [..., N, K / 32]
    compressed-tensors   weight_packed uint8 [N, K / 2]    weight_scale uint8 [N, K / 32]

The low nibble is the one of even k.
"""

import ml_dtypes
import numpy as np

from .coded import CodedWeight, Segment
from .nibbles import unpack_nibbles
from .tensors import check_shape, take

GROUP = 32


def read(tensors):
    """An MXFP4 weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``blocks`` and ``scales``, or ``weight_packed`` and ``weight_scale`` (uint8 or float8_e8m0fnu). Leading axes
        of `blocks`, experts for one, are joined to the rows.

    Returns
    -------
    CodedWeight
        Scales float8_e8m0fnu [N, K / 32].

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    """
    if "blocks" in tensors:
        found = np.shape(tensors["blocks"])
        blocks = take(tensors, "blocks", ("uint8",), (*found[:-1], 16))
        if blocks.ndim < 3:
            raise ValueError(f"QMatrix: blocks must have shape [..., N, K / 32, 16], got {list(found)}")
        scale = take(tensors, "scales", ("uint8", "float8_e8m0fnu"), found[:-1])
        groups = found[-2]
        packed = blocks.reshape(-1, 16 * groups)
    else:
        packed = take(tensors, "weight_packed", ("uint8",), (None, None))
        if packed.shape[1] % (GROUP // 2):
            raise ValueError(f"QMatrix: weight_packed must have in_features a multiple of {GROUP}, "
                             f"got {2 * packed.shape[1]}")
        groups = 2 * packed.shape[1] // GROUP
        scale = take(tensors, "weight_scale", ("uint8", "float8_e8m0fnu"), (len(packed), groups))
    shape = check_shape((len(packed), GROUP * groups))
    scale = scale.reshape(-1, groups).view(ml_dtypes.float8_e8m0fnu)
    return CodedWeight("mxfp4", shape, (Segment(unpack_nibbles(packed), 4, "e2m1", GROUP, scale),))
