# SPDX-License-Identifier: Apache-2.0
"""A packed weight as a .safetensors file: arrays of its segments, what they mean in the metadata."""

import json
from dataclasses import asdict

from .layout import LAYOUT_VERSION, Form, PackedSegment, item_bytes, tiles
from .safetensors_file import Safetensors, write

_ARRAYS = ("codes", "scales", "supers")


def save(path, kind, format, shape, segments, order):
    """Write the NumPy segments of a class named `kind`; see `QMatrix.save`."""
    arrays = {f"{name}.{i}": getattr(segment, name) for name in _ARRAYS for i, segment in enumerate(segments)
              if getattr(segment, name) is not None}
    if order is not None:
        arrays["order"] = order
    about = {"format": format, "shape": shape,
             "segments": [{"form": asdict(segment.form), "columns": segment.columns} for segment in segments]}
    write(path, arrays, {"kind": f"cupyattn {kind}", "version": str(LAYOUT_VERSION), "matrix": json.dumps(about)})


def load(path, kind):
    """(format, shape, segments, order) of a file of the class named `kind`, arrays mapped."""
    file = Safetensors(path)
    about = file.metadata
    if about.get("kind") != f"cupyattn {kind}":
        raise ValueError(f"{kind}: path must be a file of {kind}.save, got {path}")
    if about.get("version") != str(LAYOUT_VERSION):
        raise ValueError(f"{kind}: path must hold layout version {LAYOUT_VERSION}, got {about.get('version')} in "
                         f"{path}; save it again from the checkpoint")
    try:
        matrix = json.loads(about["matrix"])
        shape = tuple(matrix["shape"])
        segments = [PackedSegment(*(file.get(f"{name}.{i}") for name in _ARRAYS), Form(**segment["form"]),
                                  segment["columns"]) for i, segment in enumerate(matrix["segments"])]
        order = file.get("order")
        consistent = (segments and all(_consistent(segment, *shape[:-1]) for segment in segments)
                      and _order_fits(order, segments, shape[-1]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{kind}: path must be a file of {kind}.save, got {path}, damaged: {error}") from None
    if not consistent:
        raise ValueError(f"{kind}: path must be a file of {kind}.save, got {path}, whose arrays "
                         "do not fit each other")
    return matrix["format"], shape, segments, order


def _order_fits(order, segments, in_features):
    if order is None:
        return len(segments) == 1 and segments[0].columns == in_features
    return (order.dtype == "int32" and order.shape == (sum(segment.columns for segment in segments),)
            and -1 <= order.min() and order.max() < in_features)


def _consistent(segment, *experts_rows):
    """Whether kernels may read the arrays of a segment: as large as its form says."""
    form, (*experts, rows) = segment.form, experts_rows
    row_tiles, column_tiles = tiles((rows, segment.columns))

    def fits(array, name, numbers, per_record):
        if name is None:
            return array is None
        return array.shape == (*experts, row_tiles, -(-column_tiles // per_record), 16 * numbers * item_bytes(name))

    return (segment.codes.shape == (*experts, row_tiles, column_tiles, form.tile_bytes)
            and fits(segment.scales, form.scale, form.parameters * form.groups, form.tiles_per_scale)
            and fits(segment.supers, form.super_scale, form.supers, form.tiles_per_super)
            and all(array is None or array.dtype == "uint8"
                    for array in (segment.codes, segment.scales, segment.supers)))
