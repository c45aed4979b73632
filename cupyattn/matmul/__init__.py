# SPDX-License-Identifier: Apache-2.0
"""What quant_gemm runs: which kernel, how it is cut and launched, BLAS for many tokens, what was measured here."""
