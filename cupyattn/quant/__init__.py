# SPDX-License-Identifier: Apache-2.0
"""Weight matrices in the layout the kernels read, and the checkpoint formats they come from."""

from .experts import QExperts
from .qmatrix import QMatrix
from .safetensors_file import Safetensors

__all__ = ["QExperts", "QMatrix", "Safetensors"]
