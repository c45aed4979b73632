# SPDX-License-Identifier: Apache-2.0
"""Parts of a packed weight for tensor parallel: rows of its tiles as they are, columns packed anew."""

from dataclasses import replace

import numpy as np

from ..runtime.checks import check_number
from . import layout
from .coded import CodedWeight
from .groups import group_columns

SEGMENT_ARRAYS = ("codes", "scale", "zero", "minimum", "super_scale", "super_minimum")


def shard_range(features, rank, size):
    """The features of a rank: whole sixteens, as evenly as they go; (first, one after the last)."""
    check_number("QMatrix", "rank", rank, integer=True)
    check_number("QMatrix", "size", size, integer=True)
    tiles = -(-features // layout.TILE_ROWS)
    if not 1 <= size <= tiles:
        raise ValueError(f"QMatrix: size must be from 1 to {tiles}, the sixteens of {features} features, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"QMatrix: rank must be from 0 to {size - 1}, got {rank}")
    start, stop = (layout.TILE_ROWS * (tiles * n // size) for n in (rank, rank + 1))
    return start, min(stop, features)


def check_range(features, start, stop, of):
    """[start, stop) are some of the features."""
    if not 0 <= start < stop <= features:
        raise ValueError(f"QMatrix: start and stop must hold some of the {features} {of}, got {start} to {stop}")


def slice_rows(segments, start, stop):
    """Rows of packed segments, views of them; `start` is a multiple of 16."""
    tiles = slice(start // layout.TILE_ROWS, -(-stop // layout.TILE_ROWS))
    return [segment.with_arrays(lambda array: array[tiles]) for segment in segments]


def slice_coded_rows(weight, start, stop):
    """Rows of a CodedWeight, wherever they begin."""
    parts = [replace(segment, **{name: array[start:stop] for name in SEGMENT_ARRAYS
                                 if (array := getattr(segment, name)) is not None}) for segment in weight.segments]
    return CodedWeight(weight.format, (stop - start, weight.shape[1]), tuple(parts), weight.order)


def slice_columns(weight, start, stop):
    """The part of a CodedWeight that multiplies ``x[..., start:stop]``, its order within that slice of x.

    Groups that the slice leaves of different sizes are split, or filled with columns of no x.
    """
    order = np.arange(weight.shape[1], dtype=np.int32) if weight.order is None else weight.order
    segments, orders, first = [], [], 0
    for segment in weight.segments:
        columns = segment.codes.shape[1]
        x = order[first:first + columns]
        first += columns
        at = np.flatnonzero((x >= start) & (x < stop))
        if len(at):
            part, at = _take(segment, at[np.argsort(x[at])])
            segments.append(part)
            orders.append(np.where(at < 0, -1, x[at] - start).astype(np.int32))
    order = np.concatenate(orders)
    in_place = len(order) == stop - start and (order == np.arange(len(order))).all()
    return CodedWeight(weight.format, (weight.shape[0], stop - start), tuple(segments), None if in_place else order)


def _take(segment, at):
    """(segment of the columns `at` only, where its columns were, -1 for those filled in)."""
    old, group_of = np.unique(at // segment.group, return_inverse=True)
    group, index, order = group_columns(len(at), len(old), None, group_of)
    at = at if order is None else np.where(order < 0, -1, at[order])
    codes = np.take(segment.codes, at, axis=1, mode="wrap")
    codes[:, at < 0] = 0
    index = old[index]
    changed = {name: None if array is None else array[:, index]
               for name, array in (("scale", segment.scale), ("zero", segment.zero), ("minimum", segment.minimum))}
    if segment.super_scale is not None:
        above = index * segment.group // segment.super_group
        starts = np.flatnonzero(np.diff(above, prepend=-1))
        span = int(starts[1]) if len(starts) > 1 else len(above)
        if not np.array_equal(above, np.repeat(above[::span], span)[:len(above)]):
            span = 1
        changed |= {"super_group": span * group, "super_scale": segment.super_scale[:, above[::span]],
                    "super_minimum": None if segment.super_minimum is None else segment.super_minimum[:, above[::span]]}
    return replace(segment, codes=codes, group=group, **changed), at

