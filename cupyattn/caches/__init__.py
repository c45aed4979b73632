# SPDX-License-Identifier: Apache-2.0
"""Caches: what a model keeps of the tokens it has seen."""

from .mamba import MambaCache, MambaCacheMetaData, MambaCacheView, MambaMetadata
from .mamba2 import Mamba2Cache, Mamba2CacheMetaData, Mamba2CacheView, Mamba2Metadata
from .paged import PagedCache
from .transformer import TransformerCache, TransformerCacheMetaData, TransformerCacheView, TransformerMetadata

__all__ = [
    "Mamba2Cache", "Mamba2CacheMetaData", "Mamba2CacheView", "Mamba2Metadata",
    "MambaCache", "MambaCacheMetaData", "MambaCacheView", "MambaMetadata",
    "PagedCache",
    "TransformerCache", "TransformerCacheMetaData", "TransformerCacheView", "TransformerMetadata",
]
