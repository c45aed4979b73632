# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's PagedAttn: attention of a prompt's chunk, of decodes, or of both, over a PagedAttentionCacheView."""

from typing import NamedTuple

import numpy as np

from .attention_impl import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry
from .attn.args import check_options, check_per_head, check_sides
from .caches.base import is_array
from .caches.paged_attention import PagedAttentionCacheView, PagedAttentionMetadata
from .caches.paged_step import step_of
from .kv.quantized import kv_side
from .ops.attention import attention
from .ops.schedule import schedule as make_schedule
from .reference.attention import attention as reference
from .runtime.arrays import alignment, array_namespace, dtype_name
from .runtime.capturing import refuse_to_keep
from .runtime.checks import FLOATS, check_dtype, check_flag, check_number, check_shape

__all__ = ["AttentionImpl", "AttentionMetadata", "AttentionOutput", "AttentionRegistry", "PagedAttn"]
_KINDS = {"numpy": "NumPy", "cupy": "CuPy"}
_OTHERS = {"numpy": "forward_gpu and forward_cuda take CuPy arrays, forward_tpu any",
           "cupy": "forward_cpu and forward_native take NumPy arrays, forward_tpu any"}
_PAGES = ("key_pages", "value_pages")
_HEADS = {"q": "num_heads", "k": "num_kv_heads", "v": "num_kv_heads"}


@AttentionRegistry.register
class PagedAttn(AttentionImpl):
    """Attention over pages, of the tokens of one step: a chunk of a prompt, a new token of each sequence, or both.

    The chunk's row r is the prompt's token ``prefill_position[r]`` and sees those up to it; the decodes' row b is token
    ``decodes_position[b]`` and sees its sequence up to it. Padding (rows from prefill_length on, negative positions)
    gives zeros and reads nothing, and slots without a token may hold anything. A step of both has the rows of the
    chunk first and is one call of `attention`.

    Tables, lengths and work lists are made once for all layers of a step, which share `cache_metadata`; a layer that
    comes again begins another step (see `PagedAttentionMetadata`).

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
        From the method of that name. Default: one for all layers of the step that may share it. Needed while a CUDA
        graph is captured; not for `forward_native`.
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
            A step of nothing, shapes that do not fit, options out of range, no `schedule` while a CUDA graph is
            captured; nothing is stored then. On NumPy arrays also positions of a chunk that do not count up,
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
        _namespace(name, cache_metadata, q=q)
        options = _options(name, q.shape[-2:], q, _sides(name, cache_view), window_size, invariant)
        step = _step(name, cache_view, cache_metadata, ("schedule", options))
        return _make_schedule(step, options, out) if out is not None else _schedule(step, options)

    def _forward(self, method, kind, attend, q, k, v, cache_view, cache_metadata, write_kv=None, window_size=0,
                 softcap=0.0, sinks=None, invariant=False, schedule=None, return_lse=False, **ignored):
        """`method`: `attend` on arrays of `kind`, any with None."""
        name = f"PagedAttn.{method}"
        _check_kinds(name, cache_view, cache_metadata)
        if write_kv is None:
            write_kv = cache_metadata.is_mixed_mode()
        check_flag(name, "write_kv", write_kv)
        new = {"k": k, "v": v} if write_kv else {}
        xp = _namespace(name, cache_metadata, q=q, **new, **({} if sinks is None else {"sinks": sinks}))
        if kind not in (None, xp.__name__):
            raise TypeError(f"{name}: arrays must be {_KINDS[kind]}, got {_KINDS[xp.__name__]}; {_OTHERS[kind]}")
        if xp is np:
            refuse_to_keep(f"call {name} with NumPy arrays, of which the host makes lengths and tables anew")
        step = _step(name, cache_view, cache_metadata, "attend")
        for label, array in {"q": q, **new}.items():
            check_shape(name, label, array, (step.tokens, None, None), f"[tokens, {_HEADS[label]}, head_dim]")
        check_dtype(name, "q", q, FLOATS)   # nothing is stored for arguments that attention refuses
        sides = _sides(name, cache_view)
        check_sides(name, *q.shape[1:], *sides, _PAGES)
        check_options(name, True, self.metadata.softmax_scale, window_size, softcap, q.shape[2])
        check_per_head(name, q.shape[1], sinks=sinks)
        check_flag(name, "return_lse", return_lse)
        options = _options(name, q.shape[1:], q, sides, window_size, invariant)
        if schedule is None and step.is_capturing:
            raise ValueError(f"{name}: schedule must be given while a CUDA graph is captured, got None")
        if write_kv:
            cache_view._write(name, k, v, step)
        if schedule is None and attend is attention and _suits_schedules(q, sides):
            schedule = _schedule(step, options)
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


# ---- what the layers of a step share ---------------------------------------------------------------------

class _Options(NamedTuple):
    """What a Schedule is made for, lengths apart: arguments of `cupyattn.schedule`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    kv_format: str
    window_size: int
    invariant: bool


def _options(name, heads_and_dim, q, sides, window_size, invariant):
    check_number(name, "window_size", window_size, least=0, integer=True)
    check_flag(name, "invariant", invariant)
    k, v = sides
    return _Options(heads_and_dim[0], k.shape[2], heads_and_dim[1], v.shape[3], dtype_name(q), k.format, window_size,
                    invariant)


def _sides(name, view):
    return [kv_side(name, *side) for side in zip(_PAGES, (view.k_cache, view.v_cache), strict=True)]


def _step(name, view, metadata, call):
    """PagedStep for attention; that of NumPy arrays is checked."""
    if metadata.is_prefill_mode() and metadata.is_decode_mode():
        raise ValueError(f"{name}: cache_metadata must have a prefill or decodes, got neither")
    step = step_of(name, metadata, view, call)
    step.check_pages(name)
    return step


def _suits_schedules(q, sides):
    """Whether a Schedule, which is made for aligned arrays in one format, is for these."""
    k, v = sides
    return k.tag == v.tag and min(alignment(q), k.alignment, v.alignment) == 16


def _schedule(step, options):
    """The Schedule of all layers with these options."""
    found = step.schedules.get(options)
    if found is None:
        found = step.schedules[options] = _make_schedule(step, options)
    return found


def _make_schedule(step, options, out=None):
    return make_schedule(
        step.cache_seqlens, cu_seqlens_q=step.cu_seqlens_q, max_q_len=step.max_q_len, num_tokens=step.tokens,
        block_table=step.block_table, page_size=step.sizes[1], one_list=options.invariant, out=out,
        **options._asdict())


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
