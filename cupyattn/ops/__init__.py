# SPDX-License-Identifier: Apache-2.0
"""One stateless public function per file; ``ops/X.py`` launches ``cuda_src/X.cu``."""
