# SPDX-License-Identifier: Apache-2.0
"""What EasyDeL's attention operators have in common: metadata, output, dispatch by backend, and their registry."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from .caches.base import Record

log = logging.getLogger("cupyattn")
# fields of AttentionMetadata that may be left out: default, and the attribute of base_config that comes before it
_DEFAULTS = {
    "runtime_dtype": ("float32", "attn_dtype"), "sequence_axis_name": ("sp", None), "mesh": (None, "mesh"),
    "platform": (None, "platform"), "backend": (None, "backend"), "partition_axis": (None, "partition_axis"),
    "scan_ring_attention": (True, "scan_ring_attention"), "softmax_scale": (None, "softmax_scale"),
    "dropout_prob": (0.0, None), "blocksize_q": (512, "blocksize_q"), "blocksize_k": (1024, "blocksize_k"),
    "blocksize_b": (1, "blocksize_b")}


@dataclass(eq=False, repr=False)
class AttentionMetadata(Record):
    """How an attention operator is to compute. What is left out, or ``...``, comes from `base_config` if that has it.

    `softmax_scale` and `backend` mean something here; the others are kept as given, for scores and sums are float32
    and results have the dtype of the queries whatever they say.

    Parameters
    ----------
    runtime_dtype : dtype
        Default float32.
    runtime_softmax_dtype : dtype, optional
    sequence_axis_name : str
    mesh, platform, partition_axis : optional
    backend : "cpu", "gpu" or "tpu", optional
        Which ``forward_*`` a call goes to; also an enumeration's member of that value. None (default): whatever the
        arrays are, as "tpu".
    base_config : optional
        An object with attributes.
    scan_ring_attention : bool
    softmax_scale : float, optional
        Default ``head_dim ** -0.5``.
    dropout_prob : float
    blocksize_q, blocksize_k, blocksize_b : int

    Examples
    --------
    >>> import cupyattn
    >>> metadata = cupyattn.AttentionMetadata("float16", softmax_scale=0.125)
    >>> metadata.softmax_scale, metadata.blocksize_q, metadata.backend
    (0.125, 512, None)
    """

    runtime_dtype: Any = ...
    runtime_softmax_dtype: Any = None
    sequence_axis_name: Any = ...
    mesh: Any = ...
    platform: Any = ...
    backend: Any = ...
    partition_axis: Any = ...
    base_config: Any = None
    scan_ring_attention: Any = ...
    softmax_scale: Any = ...
    dropout_prob: Any = ...
    blocksize_q: Any = ...
    blocksize_k: Any = ...
    blocksize_b: Any = ...

    def __post_init__(self):
        for name, (default, configured) in _DEFAULTS.items():
            if getattr(self, name) is ...:
                found = default if configured is None else getattr(self.base_config, configured, default)
                setattr(self, name, found)

    @classmethod
    def from_config(cls, config, softmax_scale, dropout_prob=0.0):
        """Metadata of a model's configuration; ``scan_ring_attention`` is its ``scan_attention_layers``.

        Parameters
        ----------
        config : object
            What it has no attribute for gets its default.
        softmax_scale, dropout_prob : float

        Returns
        -------
        AttentionMetadata
        """
        return cls(base_config=config, softmax_scale=softmax_scale, dropout_prob=dropout_prob,
                   runtime_softmax_dtype=getattr(config, "attn_softmax_dtype", None),
                   sequence_axis_name=getattr(config, "sequence_axis_name", ...),
                   scan_ring_attention=getattr(config, "scan_attention_layers", ...))


@dataclass(eq=False, repr=False)
class AttentionOutput(Record):
    """What an attention operator gives.

    Parameters
    ----------
    attention_weights : ndarray, optional
        None here: probabilities are never written down.
    attention_outputs : ndarray, optional
        Of the shape and dtype of the queries.
    lse : ndarray, optional
        Natural log-sum-exp of the scores, float32, without the last axis of the outputs; only with
        ``return_lse=True``. -inf for a row of zeros.
    """

    attention_weights: Any = None
    attention_outputs: Any = None
    lse: Any = None


class AttentionImpl(ABC):
    """An attention operator with a way of computing for each backend. Calling it takes that of ``metadata.backend``.

    Parameters
    ----------
    metadata : AttentionMetadata
    """

    def __init__(self, metadata):
        self.metadata = metadata

    @classmethod
    @abstractmethod
    def get_impl_name(cls):
        """Name in the registry, or a tuple of names."""

    @abstractmethod
    def get_impl_metadata(self):
        """The metadata it was made with."""

    def _missing(self, method):
        there = [name for name in dir(type(self)) if name.startswith("forward_")
                 and getattr(type(self), name) is not getattr(AttentionImpl, name)]
        return NotImplementedError(f"{type(self).__name__}.{method}: there is no such version, there is "
                                   f"{', '.join(there) or 'none'}")

    def forward_native(self, *args, **kwargs):
        """The meaning in plain array arithmetic."""
        raise self._missing("forward_native")

    def forward_cpu(self, *args, **kwargs):
        """For arrays in host memory."""
        raise self._missing("forward_cpu")

    def forward_gpu(self, *args, **kwargs):
        """For arrays on a GPU."""
        raise self._missing("forward_gpu")

    def forward_cuda(self, *args, **kwargs):
        """For arrays on an NVIDIA GPU."""
        raise self._missing("forward_cuda")

    def forward_rocm(self, *args, **kwargs):
        """For arrays on an AMD GPU."""
        raise self._missing("forward_rocm")

    def forward_tpu(self, *args, **kwargs):
        """For arrays of any kind, under EasyDeL's name."""
        raise self._missing("forward_tpu")

    def __call__(self, *args, **kwargs):
        """`forward_cpu`, `forward_gpu` or `forward_tpu`, by ``metadata.backend``.

        Raises
        ------
        RuntimeError
            The backend is none of these.
        """
        backend = self.metadata.backend
        name = str(getattr(backend, "value", "tpu" if backend is None else backend)).lower()
        if name not in ("cpu", "gpu", "tpu"):
            raise RuntimeError(f"{type(self).__name__}: metadata.backend must be cpu, gpu, tpu or None, got "
                               f"{backend!r}")
        return getattr(self, f"forward_{name}")(*args, **kwargs)


class AttentionRegistry:
    """Attention operators by name, as a model's configuration chooses one."""

    _registry = {}

    @classmethod
    def register(cls, impl_cls):
        """Class decorator: under the name or names of `get_impl_name`; the latest of a name counts."""
        names = impl_cls.get_impl_name()
        for name in (names,) if isinstance(names, str) else names:
            if cls._registry.get(name, impl_cls) is not impl_cls:
                log.warning("AttentionRegistry: %s is now %s, was %s", name, impl_cls.__name__,
                            cls._registry[name].__name__)
            cls._registry[name] = impl_cls
        return impl_cls

    @classmethod
    def get(cls, impl_name):
        """The class of that name; ValueError with the names there are for another."""
        if impl_name not in cls._registry:
            raise ValueError(f"AttentionRegistry: name must be one of {', '.join(cls._registry)}, got {impl_name!r}")
        return cls._registry[impl_name]

    @classmethod
    def create(cls, impl_name, metadata):
        """The operator of that name for `metadata`."""
        return cls.get(impl_name)(metadata)

    @classmethod
    def list_implementations(cls):
        """All names."""
        return list(cls._registry)
