# SPDX-License-Identifier: Apache-2.0
"""The meaning of every op in plain NumPy, float64 inside: one file per op, same arguments."""
