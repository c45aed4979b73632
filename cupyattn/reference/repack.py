# SPDX-License-Identifier: Apache-2.0
import numpy as np

from ..quant import layout
from ..quant.coded import Segment


def repack(segment, /, *, scale_dtype=None):
    """PackedSegment of a Segment or of plain weights, bit by bit as the layout is written down; NumPy arrays only."""
    if not isinstance(segment, Segment):
        form = layout.Form(layout.DENSE[segment.dtype.name], segment.dtype.name)
        return layout.PackedSegment(_codes(segment, form), None, None, form, segment.shape[1])
    segment = layout.with_whole_supers(segment)
    form, columns = layout.form_of(segment, scale_dtype)
    group = layout.filled_group(segment)
    rows, codes = len(segment.codes), np.zeros((len(segment.codes), columns), np.uint8)
    for k in range(segment.codes.shape[1]):
        codes[:, k // segment.group * group + k % segment.group] = segment.codes[:, k]
    packed = _codes(codes, form)

    def spans(arrays, tiles, per_tile, of_group, axes):
        """Records of numbers: `axes` orders r, number, half and group of the record."""
        count = -(-packed.shape[1] // tiles)
        held = np.zeros((packed.shape[0], count, 8, len(arrays), 2, per_tile), arrays[0].dtype)
        for number, array in enumerate(arrays):
            for row in range(rows):
                for at in range(count * per_tile):
                    source = at * (64 // per_tile) * tiles // of_group
                    if source < array.shape[1]:
                        here = row // 16, at // per_tile, row % 8, number, row // 8 % 2, at % per_tile
                        held[here] = array[row, source]
        held = np.ascontiguousarray(held.transpose(0, 1, *axes))
        return held.view(np.uint8).reshape(*held.shape[:2], -1)

    given = [a for a in (segment.scale, segment.zero, segment.minimum) if a is not None]
    scales, supers = spans(given, form.tiles_per_scale, form.groups, group, (2, 3, 4, 5)), None
    if form.supers:
        above = [a for a in (segment.super_scale, segment.super_minimum) if a is not None]
        supers = spans(above, form.tiles_per_super, 1, 64 * form.tiles_per_super, (2, 4, 3, 5))
    return layout.PackedSegment(packed, scales, supers, form, columns)


def _codes(values, form):
    """uint8 [row tiles, column tiles, tile bytes] of `values` [N, columns]."""
    row_tiles, column_tiles = layout.tiles(values.shape)
    tiles = np.zeros((16 * row_tiles, 64 * column_tiles), f"u{values.itemsize}")
    tiles[:values.shape[0], :values.shape[1]] = values.view(tiles.dtype)
    tiles = tiles.reshape(row_tiles, 2, 8, column_tiles, 4, 4, 4).transpose(0, 3, 1, 2, 4, 5, 6)
    if form.bits >= 8:                                  # [Nt, Kt, half, r, t, c, i] in pieces of 16 bytes a lane
        if form.bits != 16:
            tiles = tiles[..., [0, 2, 1, 3]]
        steps = max(1, 32 // form.bits)                 # that a piece holds
        pieces = tiles.reshape(*tiles.shape[:4], 4 // steps, steps, 4, 4).transpose(0, 1, 2, 4, 3, 6, 5, 7)
        return np.ascontiguousarray(pieces).view(np.uint8).reshape(row_tiles, column_tiles, form.tile_bytes)
    planes, shift = [], 0
    for bits in layout.PLANES[form.bits]:
        words = np.zeros((row_tiles, column_tiles, 8, 4, bits), np.uint32)
        for half, t, i in np.ndindex(2, 4, 4):
            pair = 4 * t + half + 2 * (i // 2)
            field = tiles[:, :, half, :, t, :, i] >> shift & 2**bits - 1
            words[..., pair // (16 // bits)] |= field.astype(np.uint32) << bits * (pair % (16 // bits)) + 16 * (i % 2)
        planes.append(words.view(np.uint8).reshape(row_tiles, column_tiles, 128 * bits))
        shift += bits
    return np.concatenate(planes, axis=2)
