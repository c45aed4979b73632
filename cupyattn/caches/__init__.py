# SPDX-License-Identifier: Apache-2.0
"""Caches: what a model keeps of the tokens it has seen."""

from .hbm_pages import HBMPageManager, PagedAttentionCacheMetaData
from .lightning import LightningCache, LightningCacheMetaData, LightningCacheView, LightningMetadata
from .mamba import MambaCache, MambaCacheMetaData, MambaCacheView, MambaMetadata
from .mamba2 import Mamba2Cache, Mamba2CacheMetaData, Mamba2CacheView, Mamba2Metadata
from .paged import PagedCache
from .paged_attention import PagedAttentionCache, PagedAttentionCacheView, PagedAttentionMetadata
from .transformer import TransformerCache, TransformerCacheMetaData, TransformerCacheView, TransformerMetadata

__all__ = [
    "HBMPageManager",
    "LightningCache", "LightningCacheMetaData", "LightningCacheView", "LightningMetadata",
    "Mamba2Cache", "Mamba2CacheMetaData", "Mamba2CacheView", "Mamba2Metadata",
    "MambaCache", "MambaCacheMetaData", "MambaCacheView", "MambaMetadata",
    "PagedAttentionCache", "PagedAttentionCacheMetaData", "PagedAttentionCacheView", "PagedAttentionMetadata",
    "PagedCache",
    "TransformerCache", "TransformerCacheMetaData", "TransformerCacheView", "TransformerMetadata",
]
