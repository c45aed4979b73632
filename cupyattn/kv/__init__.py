# SPDX-License-Identifier: Apache-2.0
"""Keys and values as caches hold them: their formats, where new tokens go, what is done to them before."""
