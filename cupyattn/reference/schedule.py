# SPDX-License-Identifier: Apache-2.0
"""The meaning of a `cupyattn.WorkList` in plain loops over units and key tiles."""

import numpy as np

from ..attn.work_list import WorkList

TILE, CHUNK, OVERHEAD = 64, 1024, 2


def visible_keys(b, queries, seqlens, q_lens, *, causal=True, window_size=0, cache_starts=None, finished=None,
                 key_stride=1, key_offset=0, key_offsets=None, key_counts=None):
    """Local keys of sequence `b` that one of `queries` sees, a sorted array.

    Query i stands at token n = seqlen - q_len + i and sees token t when t >= cache_start, t <= n if causal, and
    |n - t| < window_size if that is not 0. Local key l is token l * key_stride + offset, l below key_counts[b].
    """
    seqlen = 0 if finished is not None and finished[b] else int(seqlens[b])
    offset = key_offset if key_offsets is None else int(key_offsets[b])
    tokens = np.arange(offset, max(seqlen, offset), key_stride)
    if key_counts is not None:
        tokens = tokens[:key_counts[b]]
    seen = np.zeros(len(tokens), bool)
    for i in queries:
        n = seqlen - int(q_lens[b]) + i
        sees = tokens >= (0 if cache_starts is None else cache_starts[b])
        if causal:
            sees &= tokens <= n
        if window_size:
            sees &= abs(tokens - n) < window_size
        seen |= sees
    return np.flatnonzero(seen)


def units_of(seqlens, q_lens, num_kv_heads, heads_per_kv, rows, packed_rows, prefixes, visibility):
    """Units as dicts: seq, head, first_row, key tiles, members and, where a shared prefix comes before, `after`."""
    prefix_units, own_units, after, sequences = [], [], {}, []
    for keys, group in prefixes:
        each = int(q_lens[group[0]]) * heads_per_kv
        for start in range(0, len(group), rows // each):
            batch = [int(b) for b in group[start:start + rows // each]]
            for head in range(num_kv_heads):
                unit = {"seq": batch[0], "head": head, "first_row": len(sequences), "tiles": range(keys // TILE),
                        "members": len(batch), "after": None}
                prefix_units.append(unit)
                for place, b in enumerate(batch):
                    after[b, head] = (unit, place * each)
            sequences += batch
    for b, q_len in enumerate(q_lens):
        packed = int(q_len) * heads_per_kv
        if not packed_rows[0] <= packed <= packed_rows[1]:
            continue
        for head in range(num_kv_heads):
            for first_row in range(0, packed, rows):
                last_row = min(first_row + rows, packed) - 1
                queries = range(first_row // heads_per_kv, last_row // heads_per_kv + 1)
                keys = visible_keys(b, queries, seqlens, q_lens, **visibility)
                tiles = range(keys[0] // TILE, keys[-1] // TILE + 1) if len(keys) else range(0)
                before = after.get((b, head))
                if before is not None:
                    tiles = range(len(before[0]["tiles"]), tiles.stop)
                own_units.append({"seq": b, "head": head, "first_row": first_row, "tiles": tiles, "members": 0,
                                  "after": before})
    return prefix_units + own_units, sequences


def cut(units, workers, num_splits, invariant):
    """Items (unit, first tile, tile past the last, worker), in order."""
    items = []
    if invariant or num_splits is not None:
        for unit in units:
            step = CHUNK // TILE if invariant else max(1, -(-len(unit["tiles"]) // num_splits))
            origin = 0 if invariant else unit["tiles"].start
            groups = {}
            for tile in unit["tiles"]:
                groups.setdefault((tile - origin) // step, []).append(tile)
            items += [(unit, group[0], group[-1] + 1) for group in groups.values()] or [(unit, 0, 0)]
        costs = [end - begin + OVERHEAD for _, begin, end in items]
        share = max(1, -(-sum(costs) // workers))
        return [(*item, sum(costs[:i]) // share) for i, item in enumerate(items)]
    share = max(1, -(-sum(len(unit["tiles"]) + OVERHEAD for unit in units) // workers))
    cost = 0
    for unit in units:
        groups = {}
        for i, tile in enumerate(unit["tiles"]):
            groups.setdefault((cost + OVERHEAD + i) // share, []).append(tile)
        items += [(unit, group[0], group[-1] + 1, w) for w, group in groups.items()] or [(unit, 0, 0, cost // share)]
        cost += len(unit["tiles"]) + OVERHEAD
    return items


def slots_of(cuts, workers, never_again):
    """Slots of the items of every partial unit, by its id, none for whole units; and the number of slots.

    Each item has a slot of its own, but where fixed cuts make very many: there a unit whose items are all of one
    worker uses that worker's slots, as its other such units do before and after.
    """
    owners = {}
    for unit, _, _, worker in cuts:
        owners.setdefault(id(unit), []).append(worker)
    partial = {id(unit) for unit, *_ in cuts if len(owners[id(unit)]) > 1 or unit["members"] or unit["after"]}
    total = sum(len(owners[unit]) for unit in partial)
    each = max((len(workers_of) for workers_of in owners.values()), default=0)
    again = not never_again and 2 * workers * each < total
    slots, used = {}, workers * each if again else 0
    for unit, workers_of in owners.items():
        if unit not in partial:
            slots[unit] = []
        elif again and len(set(workers_of)) == 1:
            slots[unit] = [workers_of[0] * each + i for i in range(len(workers_of))]
        else:
            slots[unit] = list(range(used, used + len(workers_of)))
            used += len(workers_of)
    return slots, used


def make_work(cache_seqlens, q_lens, *, num_kv_heads, heads_per_kv, rows, workers, packed_rows=(1, 2**31),
              num_splits=None, invariant=False, prefixes=(), **visibility):
    """`cupyattn.attn.work_list.make_work` by its definition; `visibility`: the options of `visible_keys`."""
    q_lens = np.broadcast_to(q_lens, len(cache_seqlens))
    units, sequences = units_of(cache_seqlens, q_lens, num_kv_heads, heads_per_kv, rows, packed_rows, prefixes,
                                visibility)
    cuts = cut(units, workers, num_splits, invariant)
    own_slots, num_slots = slots_of(cuts, workers, bool(prefixes) or not (invariant or num_splits is not None))
    rows_of_items, left = [], {unit: iter(slots) for unit, slots in own_slots.items()}
    for unit, begin, end, _ in cuts:
        rows_of_items.append([unit["seq"], unit["head"], unit["first_row"], begin * TILE, end * TILE,
                              next(left[id(unit)], -1)])

    table, pieces, number = [], [], {}
    for unit in units:
        mine = own_slots[id(unit)]
        if unit["members"] or not mine:
            continue
        number[unit["seq"], unit["head"], unit["first_row"]] = len(table)
        merged = [slot * rows for slot in mine]
        if unit["after"]:
            prefix, row = unit["after"]
            merged = [slot * rows + row for slot in own_slots[id(prefix)]] + merged
        table.append([len(pieces), len(merged)])
        pieces += merged
    members = [[b, number[b, 0, 0]] for b in sequences]
    for item, (unit, *_) in zip(rows_of_items, cuts, strict=True):
        if unit["members"]:
            item += [members[unit["first_row"]][1] + unit["head"], unit["members"]]
        else:
            item += [number.get((unit["seq"], unit["head"], unit["first_row"]), -1), 0]
    owners = [worker for *_, worker in cuts]
    worker_items = [sum(owner < w for owner in owners) for w in range(workers + 1)]

    def array(values, *shape):
        return np.array(values, np.int32).reshape(-1, *shape)

    return WorkList(rows, workers, array(rows_of_items, 8), array(worker_items), array(table, 2), array(pieces),
                    array(members, 2), np.zeros(len(table), np.int32), num_slots)
