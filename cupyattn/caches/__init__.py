# SPDX-License-Identifier: Apache-2.0
"""Caches: what a model keeps of the tokens it has seen."""

from .paged import PagedCache

__all__ = ["PagedCache"]
