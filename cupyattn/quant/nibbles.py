# SPDX-License-Identifier: Apache-2.0
"""Two 4-bit codes in a byte, neighbours along a row."""

import numpy as np


def unpack_nibbles(packed, *, high_first=False):
    """Codes of bytes [..., n], uint8 [..., 2 * n].

    The low nibble is the code of even place, or with `high_first` the high one.
    """
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., int(high_first)])
    np.right_shift(packed, 4, out=codes[..., int(not high_first)])
    return codes.reshape(*packed.shape[:-1], -1)
