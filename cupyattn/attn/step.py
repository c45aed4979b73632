# SPDX-License-Identifier: Apache-2.0
"""What a batch's lengths say about its new tokens: read once, shared by all layers of a step."""

from functools import cached_property, lru_cache

import numpy as np

from ..devices import to_host
from ..runtime.checks import check_dtype, check_element_strides, check_shape
from .work_list import key_ranges

OP = "AttentionParams"


class Step:
    """Lengths of a batch on the host, and the per-token arrays kernels take, made when first asked for.

    Parameters are the fields of the same names of AttentionParams, `tokens` the rows of q, and `xp` their module.

    Attributes
    ----------
    first, token_num : int
        First row of q that belongs to the batch, and their number.
    batch_size, max_q_len, max_k_len : int
    q_lens, k_lens, history : int64 ndarray [batch]
        New tokens, context with and without them.
    sequence_host, position_host : int64 ndarray [token_num]
        Sequence of each new token, and where it stands in it.
    """

    FIELDS = ("cu_q_len", "cu_k_len", "finished", "cp_rank", "cp_size", "cp_offsets", "cp_counts", "rope_param",
              "rope_theta", "rope_positions", "prompt_len")

    def __init__(self, xp, tokens, **given):
        self.xp = xp
        self.schedules = {}   # (block pointers, schedule) of all kinds of layers, filled by the calls that attend
        for name in self.FIELDS:
            setattr(self, name, given[name])
        cu_q, cu_k = (self._cumulative(name) for name in ("cu_q_len", "cu_k_len"))
        self.batch_size = len(cu_q) - 1
        if len(cu_k) != len(cu_q):
            raise ValueError(f"{OP}: cu_k_len must have {len(cu_q)} entries like cu_q_len, got {len(cu_k)}")
        self.q_lens, self.k_lens = np.diff(cu_q), np.diff(cu_k)
        self.history = self.k_lens - self.q_lens
        if (self.history < 0).any():
            b = int(np.argmax(self.history < 0))
            raise ValueError(f"{OP}: cu_k_len must count the new tokens, got a context of {self.k_lens[b]} with "
                             f"{self.q_lens[b]} new tokens for sequence {b}")
        if cu_q[0] < 0 or cu_q[-1] > tokens:
            raise ValueError(f"{OP}: cu_q_len must lie within the {tokens} tokens of q, got {cu_q[0]} .. {cu_q[-1]}")
        self.first, self.token_num = int(cu_q[0]), int(cu_q[-1] - cu_q[0])
        self.max_q_len, self.max_k_len = (int(n.max(initial=0)) for n in (self.q_lens, self.k_lens))
        self.sequence_host = np.repeat(np.arange(self.batch_size), self.q_lens)
        starts = cu_q[:-1] - cu_q[0]
        self.position_host = np.arange(self.token_num) - (starts - self.history)[self.sequence_host]
        self._check_sequences()
        self._check_rope(tokens)

    def _cumulative(self, name):
        array = getattr(self, name)
        if array is None:
            raise ValueError(f"{OP}: {name} must be given, got None")
        check_dtype(OP, name, array, "int32")
        check_shape(OP, name, array, (None,), "[batch + 1]")
        host = to_host(array).astype(np.int64)
        if len(host) == 0 or (np.diff(host) < 0).any():
            raise ValueError(f"{OP}: {name} must be [batch + 1] and not decrease, got {host.tolist()}")
        return host

    def _check_sequences(self):
        """Fields with an entry per sequence."""
        for name, dtypes in (("finished", ("bool",)), ("rope_theta", ("float32", "float64")),
                             ("cp_offsets", ("int32",)), ("cp_counts", ("int32",))):
            array = getattr(self, name)
            if array is not None:
                check_dtype(OP, name, array, dtypes)
                check_shape(OP, name, array, (self.batch_size,), "[batch]")
                check_element_strides(OP, name, array)
        if (self.cp_offsets is None) != (self.cp_counts is None):
            raise ValueError(f"{OP}: cp_offsets and cp_counts must be given together, got one of them")
        if self.cp_offsets is not None:
            for name in ("cp_offsets", "cp_counts"):
                low = to_host(getattr(self, name)).min(initial=0)
                if low < 0:
                    raise ValueError(f"{OP}: {name} must not be negative, got {low}")

    def _check_rope(self, tokens):
        if self.rope_param is None:
            for name in ("rope_theta", "rope_positions", "prompt_len"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{OP}: {name} must be None without rope_param, got an array")
            return
        if self.rope_positions is not None:
            shape = self.rope_positions.shape
            three = self.rope_param.mrope_section is not None
            if self.rope_positions.dtype.kind not in "iu":
                raise TypeError(f"{OP}: rope_positions must be integers, got {self.rope_positions.dtype}")
            if shape not in ((tokens,), *([(3, tokens)] if three else [])):
                raise ValueError(f"{OP}: rope_positions must be [tokens={tokens}]"
                                 f"{', or [3, tokens] with mrope_section' * three}, got {list(shape)}")
        if self.prompt_len is not None:
            prompt_len = to_host(self.prompt_len)
            if prompt_len.dtype.kind not in "iu":
                raise TypeError(f"{OP}: prompt_len must be integers, got {prompt_len.dtype}")
            if prompt_len.shape != (self.batch_size,):
                raise ValueError(f"{OP}: prompt_len must be [batch={self.batch_size}], got {list(prompt_len.shape)}")
            if prompt_len.min(initial=0) < 0:
                raise ValueError(f"{OP}: prompt_len must not be negative, got {prompt_len.min()}")

    # ---- arrays for kernels ----------------------------------------------------------------------------

    def _int32(self, array):
        return self.xp.asarray(array.astype(np.int32))

    @cached_property
    def cu_seqlens_q(self):
        """int32 [batch + 1], from 0."""
        return self._int32(np.concatenate([[0], np.cumsum(self.q_lens)]))

    @cached_property
    def cu_seqlens_k(self):
        """int32 [batch + 1], from 0: ragged keys of one linear buffer."""
        return self._int32(np.concatenate([[0], np.cumsum(self.k_lens)]))

    @cached_property
    def cache_seqlens(self):
        """int32 [batch]: context lengths over all ranks."""
        return self._int32(self.k_lens)

    @cached_property
    def sequence(self):
        """int32 [token_num]: sequence of each new token."""
        return self._int32(self.sequence_host)

    @cached_property
    def local_lens(self):
        """int64 [batch]: tokens of each sequence this rank holds."""
        if self.cp_counts is not None:
            return to_host(self.cp_counts).astype(np.int64)
        return self.k_lens // self.cp_size + (self.k_lens % self.cp_size > self.cp_rank)

    @cached_property
    def finished_host(self):
        """bool [batch] or None."""
        return None if self.finished is None else to_host(self.finished)

    @cached_property
    def cp_offsets_host(self):
        """int64 [batch]; only with `cp_offsets`."""
        return to_host(self.cp_offsets).astype(np.int64)

    def visible(self, causal, window_size):
        """int64 [batch] twice: this rank's tokens from where to where some new token of the sequence sees."""
        return key_ranges(
            self.k_lens, self.q_lens, 0, np.maximum(self.q_lens, 1) - 1, causal=causal, window_size=window_size,
            finished=self.finished_host, key_stride=self.cp_size,
            offsets=self.cp_rank if self.cp_offsets is None else self.cp_offsets_host,
            counts=None if self.cp_counts is None else self.local_lens)

    @cached_property
    def unfinished_lens(self):
        """int64 [batch]: `local_lens`, 0 for finished sequences."""
        return self.local_lens if self.finished is None else np.where(self.finished_host, 0, self.local_lens)

    @cached_property
    def unfinished_seqlens(self):
        """int32 [batch]: `unfinished_lens` for kernels."""
        return self._int32(self.unfinished_lens)

    def _unless_finished(self, position):
        if self.finished is not None:
            position = np.where(self.finished_host[self.sequence_host], -1, position)
        return self._int32(position)

    @cached_property
    def positions(self):
        """int32 [token_num]: where each new token stands in its sequence, -1 in a finished one."""
        return self._unless_finished(self.position_host)

    @cached_property
    def slots(self):
        """int32 [token_num]: place of each new token in this rank's contiguous shard, -1 for one that is not in it."""
        slot = self.position_host - self.cp_offsets_host[self.sequence_host]
        here = (slot >= 0) & (slot < self.local_lens[self.sequence_host])
        return self._unless_finished(np.where(here, slot, -1))

    @cached_property
    def rope_tables(self):
        """(cos, sin, rows): float32 tables and int32 [token_num], the row of each token; None without RoPE."""
        rope = self.rope_param
        if rope is None:
            return None
        per_sequence = self.rope_theta is not None or self.prompt_len is not None
        rows = slice(self.first, self.first + self.token_num)
        positions = self.position_host
        if self.rope_positions is not None:
            positions = to_host(self.rope_positions)[..., rows]
        if not per_sequence and positions.ndim == 1:   # one table for all sequences
            if positions.size and positions.min() < 0:
                raise ValueError(f"{OP}: rope_positions must not be negative, got {positions.min()}")
            size = 1 << max(int(positions.max(initial=0)).bit_length(), 10)
            return *_tables(rope, size, self.xp, _device(self.xp)), self._int32(positions)
        host = {"sequence": self.sequence_host} if per_sequence else {}
        if self.rope_theta is not None:
            host["base"] = to_host(self.rope_theta)
        if self.prompt_len is not None:
            host["prompt_len"] = to_host(self.prompt_len)
        cos, sin = rope.tables_for(positions, **host)
        return self.xp.asarray(cos), self.xp.asarray(sin), self._int32(np.arange(self.token_num))

    @cached_property
    def rope_bases(self):
        """float32 [batch], contiguous: base of each sequence where they may differ, else None."""
        if self.rope_theta is not None:
            return self.xp.ascontiguousarray(self.rope_theta, np.float32)
        if self.rope_param is None or self.rope_param.scaling != "dynamic":
            return None
        prompt_len = np.zeros(self.batch_size, np.int64) if self.prompt_len is None else to_host(self.prompt_len)
        return self.xp.asarray(self.rope_param.bases(prompt_len).astype(np.float32))


def _device(xp):
    return None if xp is np else xp.cuda.Device().id


@lru_cache(maxsize=8)
def _tables(rope, size, xp, device):
    """Tables for all positions below `size`, where `xp` keeps arrays."""
    return tuple(xp.asarray(table) for table in rope.tables(size))
