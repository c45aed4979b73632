# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints: w[n, k] = weight[n, k] * scale of its tensor, of its row or of its block.

    weight              float8_e4m3fn or float8_e5m2 [N, K]
    weight_scale        [], [1] or [1, 1]; [N] or [N, 1]; [ceil(N / rows), ceil(K / columns)] of a block
    weight_scale_inv    another name of weight_scale, a multiplier all the same (DeepSeek)
"""

import numpy as np

from .coded import FLOAT8, CodedWeight, Segment
from .tensors import SCALES, check_shape, take

_KINDS = {dtype: kind for kind, dtype in FLOAT8.items()}


def read(tensors, *, block=(128, 128)):
    """An FP8 weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``weight`` and ``weight_scale`` or ``weight_scale_inv``: float16, bfloat16, float32 or float8_e8m0fnu.
    block : (int, int)
        Rows and columns that share a scale, where scales are of blocks; the last ones may be smaller.

    Returns
    -------
    CodedWeight
        Scales float32 [N, groups].

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    """
    weight = take(tensors, "weight", tuple(_KINDS), (None, None))
    rows, columns = check_shape(weight.shape)
    name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
    found = np.shape(tensors.get(name, ()))
    scale = take(tensors, name, (*SCALES, "float8_e8m0fnu"), found).astype(np.float32)
    block_rows, block_columns = (int(size) for size in block)
    blocks = (-(-rows // block_rows), -(-columns // block_columns))
    if scale.size == 1:
        scale, group = np.full((rows, 1), scale.item(), np.float32), columns
    elif scale.shape in ((rows,), (rows, 1)):
        scale, group = scale.reshape(rows, 1), columns
    elif scale.shape == blocks:
        scale, group = np.repeat(scale, block_rows, axis=0)[:rows], block_columns
    else:
        raise ValueError(f"QMatrix: {name} must have shape [], [1], [{rows}], [{rows}, 1] or, for blocks of "
                         f"{block_rows} x {block_columns}, {list(blocks)}, got {list(found)}")
    segment = Segment(weight.view(np.uint8), 8, _KINDS[weight.dtype.name], group, scale)
    return CodedWeight("fp8", (rows, columns), (segment,))
