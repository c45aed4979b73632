# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's PagedAttn: attention of a prompt's chunk, of decodes, or of both, over a PagedAttentionCacheView."""

from typing import Any, NamedTuple

import numpy as np

from .attention_args import check_sides
from .attention_impl import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry
from .caches.base import is_array
from .caches.paged_attention import PagedAttentionCacheView, PagedAttentionMetadata
from .ops.attention import attention
from .ops.schedule import schedule as make_schedule
from .quantized_kv import QuantizedKV, kv_side
from .reference.attention import attention as reference
from .runtime.arrays import array_namespace, dtype_name
from .runtime.capturing import refuse_to_keep
from .runtime.checks import FLOATS, check_array, check_dtype, check_flag, check_shape

__all__ = ["AttentionImpl", "AttentionMetadata", "AttentionOutput", "AttentionRegistry", "PagedAttn"]
_KINDS = {"numpy": "NumPy", "cupy": "CuPy"}
_OTHERS = {"numpy": "forward_gpu and forward_cuda take CuPy arrays, forward_tpu any",
           "cupy": "forward_cpu and forward_native take NumPy arrays, forward_tpu any"}


@AttentionRegistry.register
class PagedAttn(AttentionImpl):
    """Attention over pages, of the tokens of one step: a chunk of a prompt, a new token of each sequence, or both.

    The chunk's row r is the prompt's token ``prefill_position[r]`` and sees those up to it; the decodes' row b is token
    ``decodes_position[b]`` and sees its sequence up to it. Padding (rows from prefill_length on, negative positions)
    gives zeros and reads nothing, and slots without a token may hold anything. A step of both has the rows of the
    chunk first and is one call of `attention`.

    With a prefill or decodes only, the caller has written their keys and values into the view, and `k` and `v` are not
    looked at. With both, they are written here. `write_kv` says otherwise.

    Parameters
    ----------
    metadata : AttentionMetadata

    Notes
    -----
    All ``forward_*`` methods, and calls, take these options; EasyDeL ignores others, and so they are here:

    write_kv : bool, optional
        Write `k` and `v` into the view first. Default: only in a step of both.
    window_size : int
        Visible tokens, the query's own included; 0 (default) for all.
    softcap : float
        0 (default) is off.
    sinks : ndarray [num_heads], float32, optional
        One more logit per head that takes probability and adds no value.
    invariant : bool
        The bits of a row depend neither on the rows around it nor on how its prompt is cut into chunks.
    schedule : Schedule, optional
        From the method of that name, made once per step for all layers. Not for `forward_native`.
    return_lse : bool
        Also give ``lse``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> sizes = cupyattn.PagedAttentionCacheMetaData(1, 1, 4, 2, 8, 4, 1, 8, 0.5)   # pages of 4 tokens, a head of 8
    >>> view = cupyattn.PagedAttentionCacheView.init(None, "float32", sizes)
    >>> k, v = np.zeros((4, 1, 1, 8), np.float32), np.ones((4, 1, 1, 8), np.float32)
    >>> v[1], v[3] = 3, 5
    >>> step = cupyattn.PagedAttentionMetadata(   # a prompt of 3 tokens on page 2, the first of a sequence on page 1
    ...     np.int32(3), np.arange(3, dtype=np.int32), np.int32([2]), np.int32([0]), np.int32([[1, 0]]))
    >>> attend = cupyattn.PagedAttn(cupyattn.AttentionMetadata())
    >>> attend(k, k, v, view, step).attention_outputs[:, 0, 0, 0].round(3)
    array([1.   , 2.   , 1.667, 5.   ], dtype=float32)
    """

    @classmethod
    def get_impl_name(cls):
        """"paged_attention", its name in `AttentionRegistry`."""
        return "paged_attention"

    def get_impl_metadata(self):
        """The metadata it was made with."""
        return self.metadata

    def forward_native(self, q, k, v, cache_view, cache_metadata, **options):
        """The meaning, in NumPy loops with float64 inside. Arguments, result and errors as `forward_tpu`'s."""
        return self._forward("forward_native", "numpy", _by_numpy, q, k, v, cache_view, cache_metadata, **options)

    def forward_cpu(self, q, k, v, cache_view, cache_metadata, **options):
        """By the kernels on NumPy arrays. Arguments, result and errors as `forward_tpu`'s."""
        return self._forward("forward_cpu", "numpy", attention, q, k, v, cache_view, cache_metadata, **options)

    def forward_gpu(self, q, k, v, cache_view, cache_metadata, **options):
        """By the kernels on CuPy arrays. Arguments, result and errors as `forward_tpu`'s."""
        return self._forward("forward_gpu", "cupy", attention, q, k, v, cache_view, cache_metadata, **options)

    def forward_cuda(self, q, k, v, cache_view, cache_metadata, **options):
        """The same as `forward_gpu`."""
        return self._forward("forward_cuda", "cupy", attention, q, k, v, cache_view, cache_metadata, **options)

    def forward_tpu(self, q, k, v, cache_view, cache_metadata, **options):
        """By the kernels, wherever the arrays are.

        Parameters
        ----------
        q : ndarray [tokens, num_heads, head_dim], float16, bfloat16 or float32
            Queries after RoPE. tokens: those of the chunk, padding included, then one for each of the decodes.
        k, v : ndarray [tokens, num_kv_heads, head_dim], optional
            Keys and values of the same tokens, looked at only where they are written.
        cache_view : PagedAttentionCacheView
        cache_metadata : PagedAttentionMetadata
            Positions and page tables int32; a page table has any number of columns.
        **options
            See the class.

        Returns
        -------
        AttentionOutput

        Raises
        ------
        TypeError
            Arrays of different kinds, or of the kind another method is for; an unsupported dtype.
        ValueError
            A step of nothing, shapes that do not fit; on NumPy arrays also positions of a chunk that do not count up,
            and tokens without a page, on page 0, or on a page that does not exist. With CuPy arrays nothing is read on
            the host: such tokens are neither stored nor seen.
        CaptureError
            NumPy arrays while a step is captured.

        Notes
        -----
        Kernels: ``cuda_src/attention.cu``, ``cuda_src/paged_decode.cu``, ``cuda_src/kv_append.cu``.
        """
        return self._forward("forward_tpu", None, attention, q, k, v, cache_view, cache_metadata, **options)

    def forward_rocm(self, q, k, v, cache_view, cache_metadata, **options):
        """There are no kernels for AMD GPUs."""
        raise NotImplementedError("PagedAttn.forward_rocm: there are no kernels for AMD GPUs; there are forward_cuda "
                                  "and forward_gpu for CuPy arrays, forward_cpu and forward_native for NumPy arrays")

    def __call__(self, q, k, v, cache_view, cache_metadata, **options):
        """The ``forward_*`` of ``metadata.backend`` with one more axis, which comes back in the result.

        Parameters
        ----------
        q : ndarray [1, chunk, num_heads, head_dim] for a prefill, [tokens, 1, num_heads, head_dim] otherwise
            Without the axis of 1 it is as `forward_tpu` takes it, and the result is, too.
        k, v : ndarray with num_kv_heads in the same place, optional
        cache_view, cache_metadata, **options
            As `forward_tpu` takes them.

        Returns
        -------
        AttentionOutput
            Of q's shape.

        Raises
        ------
        RuntimeError
            A backend that there is none of.
        """
        _check_kinds("PagedAttn", cache_view, cache_metadata)
        axis = 0 if cache_metadata.is_prefill_mode() else 1
        if q.ndim == 4 and q.shape[axis] != 1:
            axes = ("[1, chunk, num_heads, head_dim] for a prefill", "[tokens, 1, num_heads, head_dim] with decodes")
            raise ValueError(f"PagedAttn: q must be {axes[axis]}, got {list(q.shape)}")
        rows = [array.squeeze(axis) if getattr(array, "ndim", 0) == 4 and array.shape[axis] == 1 else array
                for array in (q, k, v)]
        result = super().__call__(*rows, cache_view, cache_metadata, **options)
        if q.ndim == 4:
            at = (slice(None),) * axis + (None,)
            result.attention_outputs = result.attention_outputs[at]
            result.lse = None if result.lse is None else result.lse[at]
        return result

    def schedule(self, q, cache_view, cache_metadata, *, window_size=0, invariant=False, out=None):
        """Who attends what in this step, made once for all layers.

        Parameters
        ----------
        q : ndarray
            Any layer's queries, with or without the axis of 1; only dtype and shape matter.
        cache_view : PagedAttentionCacheView
            Any layer's.
        cache_metadata : PagedAttentionMetadata
        window_size, invariant
            As in the calls it is for.
        out : Schedule, optional
            One of CuPy arrays, to be filled again: see `cupyattn.schedule`.

        Returns
        -------
        Schedule
        """
        name = "PagedAttn.schedule"
        _check_kinds(name, cache_view, cache_metadata)
        step = _step(name, _namespace(name, cache_metadata, q=q), cache_view, cache_metadata)
        cache = cache_view.k_cache
        _, page_size, num_kv_heads, _ = cache.shape
        return make_schedule(
            step.cache_seqlens, num_heads=q.shape[-2], num_kv_heads=num_kv_heads, head_dim=q.shape[-1],
            cu_seqlens_q=step.cu_seqlens_q, max_q_len=step.max_q_len, num_tokens=step.tokens, dtype=dtype_name(q),
            kv_format=cache.format if isinstance(cache, QuantizedKV) else dtype_name(cache), page_size=page_size,
            block_table=step.block_table, window_size=window_size, invariant=invariant, one_list=invariant, out=out)

    def _forward(self, method, kind, attend, q, k, v, cache_view, cache_metadata, write_kv=None, window_size=0,
                 softcap=0.0, sinks=None, invariant=False, schedule=None, return_lse=False, **ignored):
        """`method`: `attend` on arrays of `kind`, any with None."""
        name = f"PagedAttn.{method}"
        _check_kinds(name, cache_view, cache_metadata)
        if write_kv is None:
            write_kv = cache_metadata.is_mixed_mode()
        check_flag(name, "write_kv", write_kv)
        new = {"k": k, "v": v} if write_kv else {}
        xp = _namespace(name, cache_metadata, q=q, **new)
        if kind not in (None, xp.__name__):
            raise TypeError(f"{name}: arrays must be {_KINDS[kind]}, got {_KINDS[xp.__name__]}; {_OTHERS[kind]}")
        if xp is np:
            refuse_to_keep(f"call {name} with NumPy arrays, of which the host makes lengths and tables anew")
        step = _step(name, xp, cache_view, cache_metadata)
        check_shape(name, "q", q, (step.tokens, None, None), "[tokens, num_heads, head_dim]")
        if write_kv or attend is not attention:   # nothing is stored for queries that attention refuses
            check_dtype(name, "q", q, FLOATS)
            pages = {"key_pages": cache_view.k_cache, "value_pages": cache_view.v_cache}
            check_sides(name, *q.shape[1:], *(kv_side(name, *side) for side in pages.items()), tuple(pages))
        if write_kv:
            _write(name, cache_view, cache_metadata, step, **new)
        found = attend(q, cache_view.k_cache, cache_view.v_cache, cu_seqlens_q=step.cu_seqlens_q,
                       cache_seqlens=step.cache_seqlens, block_table=step.block_table, max_q_len=step.max_q_len,
                       softmax_scale=self.metadata.softmax_scale, window_size=window_size, softcap=softcap,
                       sinks=sinks, invariant=invariant, schedule=schedule, return_lse=return_lse)
        out, lse = found if return_lse else (found, None)
        return AttentionOutput(None, out, lse)


def _by_numpy(q, k_cache, v_cache, *, max_q_len, invariant, schedule, return_lse, **arguments):
    """`attention` by its reference; what says how to compute means nothing."""
    out, lse = reference(q, k_cache, v_cache, **arguments, return_lse=True)
    out = out.astype(q.dtype)
    return (out, lse.astype(np.float32)) if return_lse else out


# ---- a step as ragged sequences --------------------------------------------------------------------------

class _Step(NamedTuple):
    """The rows of a step as sequences for `attention`: the chunk's tokens, its padding (which has no keys), decodes."""

    cu_seqlens_q: Any
    cache_seqlens: Any
    block_table: Any
    max_q_len: int
    chunk: int      # rows of the prompt's chunk
    tokens: int     # all rows


def _step(name, xp, view, metadata):
    """_Step of `metadata`. NumPy arrays are checked; in those of CuPy page 0 becomes no page."""
    if metadata.is_prefill_mode() and metadata.is_decode_mode():
        raise ValueError(f"{name}: cache_metadata must have a prefill or decodes, got neither")
    num_pages, page_size = view.k_cache.shape[:2]
    chunk = decodes = 0
    if not metadata.is_prefill_mode():
        position, table = metadata.decodes_position, metadata.decodes_page_table
        check_array(name, "decodes_position", position, "int32", (None,), "[batch]", contiguous=False)
        decodes = len(position)
        check_array(name, "decodes_page_table", table, "int32", (decodes, None), "[batch, num_pages_per_sequence]")
        lengths = xp.where(position < 0, 0, position + 1)
        if xp is np:
            _check_pages(f"{name}: decodes_page_table", table, lengths, num_pages, page_size)
        else:
            table = xp.where(table == 0, -1, table)
    if metadata.is_decode_mode():
        return _Step(xp.arange(decodes + 1, dtype=np.int32), lengths, table, min(decodes, 1), 0, decodes)
    chunk = metadata.prefill_position.shape[0]
    start, count, pages = _prompt(name, xp, metadata, num_pages, page_size)
    starts = xp.arange(chunk - 2, chunk + decodes + 1, dtype=np.int32)
    starts[:1], starts[1:2] = 0, count
    seqlens = xp.zeros(2 + decodes, np.int32)
    seqlens[:1] = xp.where(count < 1, 0, start + count)
    width = max(len(pages), table.shape[1] if decodes else 0)
    tables = xp.full((2 + decodes, width), 0 if xp is np else -1, np.int32)
    tables[:1, :len(pages)] = pages
    if decodes:
        seqlens[2:] = lengths
        tables[2:, :table.shape[1]] = table
    return _Step(starts, seqlens, tables, max(chunk, min(decodes, 1)), chunk, chunk + decodes)


def _prompt(name, xp, metadata, num_pages, page_size):
    """A prompt's chunk: position of its first row and how many rows are no padding, [1] each, and its pages."""
    length, position, pages = metadata.prefill_length, metadata.prefill_position, metadata.prefill_page_table
    check_array(name, "prefill_position", position, "int32", (None,), "[chunk]", contiguous=False)
    check_array(name, "prefill_page_table", pages, "int32", (None,), "[pages]", contiguous=False)
    if is_array(length):
        check_shape(name, "prefill_length", length, (), "one number")
    else:
        length = xp.full((), length, np.int32)
    chunk = len(position)
    start = position[:1] if chunk else xp.zeros(1, np.int32)
    count = length - start
    count = xp.where(count < chunk, count, chunk)
    count = xp.where(count < 0, 0, count)
    count = xp.where(start < 0, 0, count)
    if xp is not np:
        return start, count, xp.where(pages == 0, -1, pages)
    rows = int(count[0])
    if (position[:rows] != start + np.arange(rows)).any() or ((position >= 0) & (position < length)).sum() != rows:
        raise ValueError(f"{name}: prefill_position must count up by one over the chunk's tokens below prefill_length "
                         f"{int(length)}, got {position.tolist() if chunk <= 20 else f'{chunk} others'}")
    _check_pages(f"{name}: prefill_page_table", pages[None], start + count if rows else count, num_pages, page_size)
    return start, count, pages


def _check_pages(what, table, lengths, num_pages, page_size):
    """Pages of all tokens of every row of `table`, in host memory, exist; page 0 holds none."""
    needed = -(-lengths // page_size)
    if needed.max(initial=0) > table.shape[1]:
        raise ValueError(f"{what} must have a page for every token, got {table.shape[1]} pages of {page_size} for "
                         f"{lengths.max()} tokens")
    wrong = ((table < 1) | (table >= num_pages)) & (np.arange(table.shape[1]) < needed[:, None])
    if wrong.any():
        raise ValueError(f"{what} must hold page ids from 1 to {num_pages - 1} (page 0 is reserved), got "
                         f"{table[wrong][0]} where tokens are")


def _check_kinds(name, view, metadata):
    for label, value, wanted in (("cache_view", view, PagedAttentionCacheView),
                                 ("cache_metadata", metadata, PagedAttentionMetadata)):
        if not isinstance(value, wanted):
            raise TypeError(f"{name}: {label} must be a {wanted.__name__}, got {type(value).__name__}")


def _namespace(name, metadata, **arrays):
    """numpy or cupy, the kind of `arrays` and of what `metadata` has."""
    for label, array in arrays.items():
        if array is None:
            raise TypeError(f"{name}: {label} must be a NumPy or CuPy array, got None")
    if not metadata.is_decode_mode():
        arrays |= {label: getattr(metadata, label) for label in ("prefill_position", "prefill_page_table")}
        if is_array(metadata.prefill_length):
            arrays["prefill_length"] = metadata.prefill_length
    if not metadata.is_prefill_mode():
        arrays |= {label: getattr(metadata, label) for label in ("decodes_position", "decodes_page_table")}
    return array_namespace(name, **arrays)


def _write(name, view, metadata, step, k, v):
    """Keys and values of the chunk and of the decodes go into their pages."""
    for label, array in (("k", k), ("v", v)):
        check_shape(name, label, array, (step.tokens, None, None), "[tokens, num_kv_heads, head_dim]")
    if not metadata.is_decode_mode():
        view.write_prefill_to_cache(k[:step.chunk], v[:step.chunk], metadata)
    if not metadata.is_prefill_mode():
        view.write_decodes_to_cache(k[step.chunk:], v[step.chunk:], metadata)
