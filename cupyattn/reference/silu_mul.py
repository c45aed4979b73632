# SPDX-License-Identifier: Apache-2.0
import numpy as np


def silu_mul(gate, up, /):
    """gate * sigmoid(gate) * up in float64."""
    gate = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up.astype(np.float64)
