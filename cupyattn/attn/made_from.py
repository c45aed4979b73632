# SPDX-License-Identifier: Apache-2.0
"""What a Schedule was made from, so that a call with other lengths can be refused."""

import numpy as np

from ..devices import on_host

_OPTIONAL = ("cache_starts", "finished", "key_offsets", "key_counts")   # fields of Lengths


class MadeFrom:
    """Which arrays work lists were made from, and what stood in those that were in host memory.

    One object goes with the arrays of a schedule: where these are filled again, so is it.
    """

    def set(self, lengths, on_host, prefixes=()):
        """Lists were made from `lengths`, in host memory or not, and with `prefixes` from `shared_prefixes`."""
        self.q_len, self.given = _queries(lengths), _given(lengths)
        self.contents = _contents(lengths, np.asarray(lengths.q_lens(), np.int64)) if on_host else None
        self.prefixes = prefixes

    def check(self, op, lengths, pages):
        """Raises ValueError where arrays were given then and not now or the other way round; reads none."""
        q_len = _queries(lengths)
        if q_len != self.q_len:
            then, now = (f"q_len {n}" if n is not None else "cu_seqlens_q" for n in (self.q_len, q_len))
            raise ValueError(f"{op}: schedule must be made for {now}, got one for {then}")
        for name in set(self.given) ^ set(_given(lengths)):
            then, now = ("with", "without") if name in self.given else ("without", "with")
            raise ValueError(f"{op}: schedule must be made {now} {name}, got one made {then}")
        if self.prefixes and pages is None:
            raise ValueError(f"{op}: schedule must be made without shared pages for cu_seqlens_k, got one for "
                             f"sequences that share {self.prefixes[0][0]} keys")

    def check_contents(self, op, lengths, q_lens, pages, page_size):
        """Raises ValueError where the arrays hold something else than then, or sequences no longer share pages."""
        if self.contents is None:
            return
        for name, now in _contents(lengths, q_lens).items():
            if now != self.contents[name]:
                dtype = {"finished": bool, "query lengths": np.int64}.get(name, np.int32)
                then = np.frombuffer(self.contents[name], dtype)
                other = int(np.flatnonzero(then != np.frombuffer(now, dtype))[0])
                found = then.tolist() if len(then) <= 16 else f"{then[other]} in sequence {other}"
                raise ValueError(f"{op}: schedule must be made for these {name}, got one for {found}")
        for keys, group in self.prefixes:
            rows = _leading_pages(pages, group, -(-keys // page_size))
            if rows.tobytes() != rows[0].tobytes() * len(group):
                raise ValueError(f"{op}: schedule must be made for this block_table, got one for sequences "
                                 f"{group.tolist()} with the same pages of {keys} keys")


def _leading_pages(table, sequences, count):
    """The first `count` page ids or addresses of blocks of `sequences`: [sequences, count], in host memory."""
    if table.form == "dense":
        return on_host(table.block_table)[sequences, :count]
    entries = on_host(table.block_ptrs if table.form == "pointers" else table.block_table)
    return entries[on_host(table.indptr)[sequences, None] + np.arange(count)]


def _queries(lengths):
    return lengths.q_len if lengths.cu_seqlens_q is None else None


def _given(lengths):
    return tuple(name for name in _OPTIONAL if getattr(lengths, name) is not None)


def _contents(lengths, q_lens):
    """Bytes of what decides who attends what, by name: for small arrays the cheapest copy and comparison."""
    if lengths.row_starts is None:
        found = {"cache_seqlens": on_host(lengths.cache_seqlens).tobytes()}
    else:
        found = {"cache_seqlens": np.diff(on_host(lengths.row_starts)).tobytes()}
    if lengths.cu_seqlens_q is not None:
        found["query lengths"] = q_lens.tobytes()
    for name in _given(lengths):
        found[name] = on_host(getattr(lengths, name)).tobytes()
    return found
