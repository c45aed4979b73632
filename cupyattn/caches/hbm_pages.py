# SPDX-License-Identifier: Apache-2.0
"""Pages of EasyDeL's paged attention cache: how many the memory has room for, and who owns which."""

from dataclasses import dataclass

import numpy as np

from ..paging.pages import PageManager
from ..runtime.arrays import dtype_of
from ..runtime.checks import check_number
from .base import Record, check_given, check_positive

MEMORY = "/proc/meminfo"   # where the host says what is available


@dataclass(eq=False, repr=False)
class PagedAttentionCacheMetaData(Record):
    """Sizes of a paged attention cache.

    Parameters
    ----------
    batch_size, num_hidden_layers : int
    num_pages_per_layer : int
        Page 0 among them, which holds no tokens.
    num_pages_per_sequence : int
        Entries of a sequence's page table.
    max_sequences : int
        Tokens a sequence may have, whatever the name says.
    page_size : int
        Tokens of a page.
    num_kv_heads, kv_head_dim_size : int
    hbm_utilization : float
        Share of the memory the pages may take.
    """

    batch_size: int
    num_hidden_layers: int
    num_pages_per_layer: int
    num_pages_per_sequence: int
    max_sequences: int
    page_size: int
    num_kv_heads: int
    kv_head_dim_size: int
    hbm_utilization: float

    @classmethod
    def create(cls, mesh=None, batch_size=None, num_hidden_layers=None, max_sequences=None, page_size=None,
               num_kv_heads=None, kv_head_dim_size=None, hbm_utilization=None, dtype="bfloat16", *, memory_bytes=None,
               xp=np):
        """The metadata, with as many pages as the memory has room for.

        pages = (int(limit * hbm_utilization) - used) * devices // num_hidden_layers // (bytes of a page, K and V)

        Parameters
        ----------
        mesh : int or object with ``devices.size``, optional
            Devices that share the pages. Default 1.
        batch_size, num_hidden_layers, max_sequences, page_size, num_kv_heads, kv_head_dim_size : int
        hbm_utilization : float
            Between 0 and 1, both excluded.
        dtype : dtype
            Of the pages.
        memory_bytes : int, optional
            The limit, of which nothing counts as used. Default: with CuPy the device's memory and what is used of it,
            CuPy's idle blocks apart; with NumPy what the host has available, which Linux says.
        xp : numpy or cupy

        Raises
        ------
        ValueError
            A size is not positive, hbm_utilization is not between 0 and 1, or there is no room for two pages (page 0
            holds no tokens).
        NotImplementedError
            Without `memory_bytes` for NumPy on a system that is not Linux.
        """
        name = "PagedAttentionCacheMetaData.create"
        sizes = {"batch_size": batch_size, "num_hidden_layers": num_hidden_layers, "max_sequences": max_sequences,
                 "page_size": page_size, "num_kv_heads": num_kv_heads, "kv_head_dim_size": kv_head_dim_size}
        check_given(name, **sizes, hbm_utilization=hbm_utilization)
        check_positive(name, quote="`", **sizes)
        check_number(name, "hbm_utilization", hbm_utilization)
        if not 0.0 < hbm_utilization < 1.0:
            raise ValueError(f"{name}: `hbm_utilization` must be between 0 and 1, both excluded, got {hbm_utilization}")
        if memory_bytes is not None:
            check_number(name, "memory_bytes", memory_bytes, least=0)
        limit, used = _memory(name, xp) if memory_bytes is None else (memory_bytes, 0)
        devices = _devices(name, mesh)
        usable = (int(limit * hbm_utilization) - used) * devices
        page_bytes = 2 * page_size * num_kv_heads * kv_head_dim_size * dtype_of(dtype).itemsize
        pages = usable // num_hidden_layers // page_bytes
        if pages < 2:
            raise ValueError(f"{name}: memory must have room for 2 pages of {page_bytes} bytes in each of "
                             f"{num_hidden_layers} layers, got {usable} bytes: {hbm_utilization} of {limit} less "
                             f"{used} in use, times {devices} device{'s' * (devices != 1)}")
        return cls(num_pages_per_layer=pages, num_pages_per_sequence=-(-max_sequences // page_size),
                   hbm_utilization=hbm_utilization, **sizes)


class HBMPageManager:
    """Hands out the pages of a paged attention cache, first in, first out. Page 0 is never handed out.

    Parameters
    ----------
    metadata : PagedAttentionCacheMetaData

    Attributes
    ----------
    pages : PageManager
        Which does the work; e.g. to ``share`` pages of a prompt among sequences.

    Examples
    --------
    >>> import cupyattn
    >>> metadata = cupyattn.PagedAttentionCacheMetaData(1, 1, 10, 4, 16, 4, 2, 64, 0.5)
    >>> manager = cupyattn.HBMPageManager(metadata)
    >>> manager.alloc_hbm_pages(3), manager.alloc_hbm_pages(7), manager.alloc_prefill_hbm_pages(9)
    ([1, 2, 3], [], [4, 5, 6])
    >>> manager.free_hbm_pages([2, 0])
    >>> manager.num_free
    4
    """

    def __init__(self, metadata):
        self._metadata = metadata
        num_pages = max(metadata.num_pages_per_layer, 0)
        self.pages = PageManager(num_pages, metadata.page_size, reserved=range(min(num_pages, 1)))

    @property
    def metadata(self):
        """As given."""
        return self._metadata

    @property
    def page_size(self):
        """Tokens of a page."""
        return self._metadata.page_size

    @property
    def current_page_index(self):
        """0, as in EasyDeL."""
        return 0

    @property
    def num_free(self):
        """Pages that can be allocated now."""
        return self.pages.num_free

    def alloc_hbm_pages(self, n):
        """`n` pages as a list; an empty one when `n` is not positive or fewer are free, then nothing has changed."""
        return self.pages.allocate(n)

    def alloc_prefill_hbm_pages(self, prompt_len):
        """The pages a prompt of `prompt_len` tokens needs, as `alloc_hbm_pages`."""
        return self.pages.allocate(-(-prompt_len // self.page_size))

    def free_hbm_pages(self, pages):
        """Give pages back; they are handed out again after those free already. Page 0 is passed over.

        Raises
        ------
        ValueError
            A page is free already, named twice, or no page at all. Nothing is freed then.
        """
        self.pages.free([page for page in pages if page != 0])

    def __repr__(self):
        return f"HBMPageManager({self.pages.capacity} pages of {self.page_size} tokens, {self.num_free} free)"


def _devices(op, mesh):
    """How many devices a mesh has."""
    if mesh is None:
        return 1
    number = mesh.devices.size if hasattr(mesh, "devices") else mesh
    check_number(op, "mesh", number, least=1, integer=True)
    return int(number)


def _memory(op, xp):
    """(bytes of memory, bytes in use) of the current device, or what the host has available and 0."""
    if xp is not np:
        free, total = xp.cuda.runtime.memGetInfo()
        return total, total - free - xp.get_default_memory_pool().free_bytes()
    try:
        with open(MEMORY) as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        raise NotImplementedError(f"{op}: memory_bytes must be given where {MEMORY} cannot be read") from None
    return int(lines["MemAvailable"].split()[0]) * 1024, 0
