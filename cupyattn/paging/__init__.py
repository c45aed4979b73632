# SPDX-License-Identifier: Apache-2.0
"""Pages: who holds which, which tokens are in them, which sequences may share them, and the table kernels read."""
