# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.page_move` in plain NumPy."""


def page_move(pools, sources, destinations, /, *, tokens=None):
    """pool[destinations[i], :tokens[i]] = pool[sources[i], :tokens[i]] for every pool, in place; `pools` are arrays."""
    for pool in pools if isinstance(pools, list | tuple) else [pools]:
        for i, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
            if source >= 0 and destination >= 0:
                count = pool.shape[1] if tokens is None else tokens[i]
                pool[destination, :count] = pool[source, :count]
