# SPDX-License-Identifier: Apache-2.0
"""Coded weights into the layout the kernels read. Kernel: ``cuda_src/repack.cu``."""

import functools

from ..quant import layout
from ..quant.coded import FLOAT8, TABLES, Segment
from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, strides
from ..runtime.checks import check_dtype, check_element_strides, check_number, check_shape, check_writeable

FLOAT8_SCALES = ("float8_e4m3fn", "float8_e8m0fnu")
SCALES = ("float16", "bfloat16", "float32", "int8", *FLOAT8_SCALES)
_BITS = {"int": (2, 3, 4, 5, 6, 8), **dict.fromkeys(TABLES, (4,)), **dict.fromkeys(FLOAT8, (8,))}
_PARAMETERS = ("scale", "zero", "minimum", "super_scale", "super_minimum")


def _spec(bits, vec):
    return Specialisation("repack", "repack", "RepackArgs", {"BITS": bits, "VEC": vec})


CORE = [_spec(*case) for case in ((2, 4), (3, 4), (4, 4), (5, 4), (6, 4), (8, 4), (16, 4), (32, 4), (3, 1), (4, 1),
                                  (8, 1), (16, 1))]


def more_specs():
    """Every legal one."""
    return [_spec(bits, vec) for bits in layout.PLANES for vec in (1, 4)]


@functools.lru_cache(maxsize=1024)
def _plan_repack(row_tiles, column_tiles, bits, vec, arch):
    """Plan from the tiles, the bits of a value, how many can be loaded together, and arch."""
    warps = 1 if arch == "cpu" else 4
    columns = 1 if arch == "cpu" else min(-(-column_tiles // warps), 64)
    return Plan(_spec(bits, vec), arch, (row_tiles, columns), (32 * warps,), note=f"{vec} values per load")


def repack(segment, /, *, scale_dtype=None, out=None):
    """Weights of one coding in the layout of the kernels: ``cupyattn.quant.layout.pack_segment`` as a kernel.

    Parameters
    ----------
    segment : Segment, or ndarray [N, K], float16, bfloat16 or float32
        Of ``cupyattn.quant.coded``, its arrays NumPy or CuPy, of any strides; or weights to be kept as they are.
    scale_dtype : str, optional
        What the numbers in ``scale``, ``zero`` and ``minimum`` are where the array library has no such dtype:
        ``"float8_e4m3fn"`` or ``"float8_e8m0fnu"``, the arrays being uint8. Default their dtype's name.
    out : PackedSegment, optional
        Where to write: what an earlier call for a weight of the same form and shape returned.

    Returns
    -------
    out : PackedSegment
        Of ``cupyattn.quant.layout``, arrays of the same kind (NumPy or CuPy). Its `columns` are those of the segment,
        groups filled up to multiples of 16.

    Raises
    ------
    TypeError
        Neither a Segment nor an array, NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Arrays of a segment that do not fit each other, or an `out` of another form or shape.
    NotImplementedError
        FP8 scales under scales of scales that change within a tile of 64 columns, or a bit width no kernel reads.

    Notes
    -----
    A weight of several segments, or with an order of its columns, is packed by
    ``cupyattn.quant.layout.pack(weight, cupyattn.repack)``. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/repack.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.quant.coded import Segment
    >>> codes = np.arange(16 * 64, dtype=np.uint8).reshape(16, 64) % 16
    >>> packed = cupyattn.repack(Segment(codes, 4, "int", 32, np.ones((16, 2), np.float16), centre=8))
    >>> packed.codes.shape, packed.form.trait
    ((1, 1, 512), 'Weights<Ints<4,8>,Scales<__half,PLAIN,2>>')
    """
    if not isinstance(segment, Segment):
        dtype = check_dtype("repack", "segment", segment, tuple(layout.DENSE))
        form, columns = layout.Form(layout.DENSE[dtype], dtype), _columns("segment", segment)
        return _pack(segment, {}, form, columns, columns, out)
    _check_arrays(segment, scale_dtype)
    whole = layout.with_whole_supers(segment)
    if whole is not segment and scale_dtype is not None:
        raise NotImplementedError("repack: segment must have one super_scale per whole tiles of 64 columns where "
                                  f"scale is {scale_dtype}, got super_group {segment.super_group}")
    form, columns = layout.form_of(whole, scale_dtype)
    parameters = {"scale": whole.scale, "second": whole.zero if whole.minimum is None else whole.minimum,
                  "super_scale": whole.super_scale, "super_minimum": whole.super_minimum}
    return _pack(segment.codes, parameters, form, columns, layout.filled_group(segment), out)


def _pack(values, parameters, form, columns, filled_group, out):
    """Launch: `values` [N, columns before filling]; `parameters` by their names in RepackArgs."""
    xp = array_namespace("repack", segment=values, **parameters)
    rows, before = values.shape
    row_tiles, column_tiles = layout.tiles((rows, columns))
    shapes = {"codes": (row_tiles, column_tiles, form.tile_bytes), "scales": None, "supers": None}
    if form.scale is not None:
        shapes["scales"] = (row_tiles, -(-column_tiles // form.tiles_per_scale),
                            layout.TILE_ROWS * form.scale_bytes)
    if form.supers:
        shapes["supers"] = (row_tiles, -(-column_tiles // form.tiles_per_super),
                            layout.TILE_ROWS * form.super_bytes)
    if out is None:
        made = {name: None if shape is None else xp.empty(shape, "uint8") for name, shape in shapes.items()}
        out = layout.PackedSegment(**made, form=form, columns=columns)
    else:
        _check_out(out, form, shapes, values)
    views = {name: _matrix_view(parameters.get(name)) for name in ("scale", "second", "super_scale", "super_minimum")}
    plan = _plan_repack(row_tiles, column_tiles, form.bits, _values_per_load(values, form.group, filled_group),
                        arch_of(xp))
    launch(plan, make_args(
        plan, values=_matrix_view(values), **views, codes=out.codes, scales=out.scales, supers=out.supers, rows=rows,
        columns=before, group=form.group or before, filled_group=filled_group, column_tiles=column_tiles,
        tiles_per_scale=form.tiles_per_scale, tiles_per_super=form.tiles_per_super,
        scale_bytes_log2=_log2_bytes(form.scale), super_bytes_log2=_log2_bytes(form.super_scale),
        groups_log2=form.groups.bit_length() - 1))
    return out


def _log2_bytes(name):
    return 0 if name is None else layout.item_bytes(name).bit_length() - 1


def _matrix_view(array):
    """MatrixView of `array` [rows, columns]; None gives a null view."""
    if array is None:
        return None
    row, column = strides(array)
    return {"data": array, "stride_row": row, "stride_column": column}


def _values_per_load(values, group, filled_group):
    """4 where four columns of a tile are always beside each other, aligned, or all missing."""
    whole = values.shape[1] % 4 == 0 and (group % 4 == 0 or group == filled_group)
    beside = values.strides[1] == values.itemsize and alignment(values) >= min(16, 4 * values.itemsize)
    return 4 if whole and beside else 1


def _columns(name, array):
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"repack: {name} must be [N, columns], both at least 1, got {list(array.shape)}")
    check_element_strides("repack", name, array)
    return array.shape[1]


def _check_arrays(segment, scale_dtype):
    """Arrays of a Segment fit each other, and a kernel reads such codes."""
    array_namespace("repack", **{f"segment.{name}": getattr(segment, name) for name in ("codes", *_PARAMETERS)})
    check_dtype("repack", "segment.codes", segment.codes, "uint8")
    columns = _columns("segment.codes", segment.codes)
    if segment.kind not in _BITS:
        raise NotImplementedError(f"repack: segment must be of kind {', '.join(_BITS)}, got {segment.kind!r}")
    if segment.bits not in _BITS[segment.kind]:
        bits = ", ".join(map(str, _BITS[segment.kind]))
        raise NotImplementedError(f"repack: segment must be of {bits} bits for kind {segment.kind!r}, got "
                                  f"{segment.bits} bits")
    if segment.zero is not None and segment.minimum is not None:
        raise ValueError("repack: segment must have zero or minimum, got both")
    allowed = SCALES if scale_dtype is None else ("uint8",)
    if scale_dtype is not None and scale_dtype not in FLOAT8_SCALES:
        raise TypeError(f"repack: scale_dtype must be {' or '.join(FLOAT8_SCALES)}, got {scale_dtype!r}")
    for name in _PARAMETERS:
        array = getattr(segment, name)
        if array is None and name != "scale":
            continue
        above = name.startswith("super_")
        group = segment.super_group if above else segment.group
        check_number("repack", f"segment.{'super_' * above}group", group, least=1, integer=True)
        found = check_dtype("repack", f"segment.{name}", array, ("float16", "float32") if above else allowed)
        first = segment.super_scale if above else segment.scale
        if first is None or first.dtype != array.dtype:
            raise TypeError(f"repack: segment.{name} must be of the dtype of {'super_' * above}scale, got {found}")
        check_shape("repack", f"segment.{name}", array, (segment.codes.shape[0], -(-columns // group)), "[N, groups]")
        check_element_strides("repack", f"segment.{name}", array)
    if segment.super_scale is not None and segment.super_group < columns and segment.super_group % segment.group:
        raise ValueError(f"repack: segment.super_group must be a multiple of group {segment.group}, got "
                         f"{segment.super_group}")


def _check_out(out, form, shapes, values):
    if not isinstance(out, layout.PackedSegment) or out.form != form:
        found = getattr(out, "form", type(out).__name__)
        raise ValueError(f"repack: out must be a PackedSegment of {form}, got {found}")
    for name, shape in shapes.items():
        array = getattr(out, name)
        if shape is None:
            continue
        array_namespace("repack", segment=values, **{f"out.{name}": array})
        check_dtype("repack", f"out.{name}", array, "uint8")
        check_shape("repack", f"out.{name}", array, shape, "[row tiles, spans, bytes]")
        check_writeable("repack", f"out.{name}", array)
        if not array.flags.c_contiguous or alignment(array) < 16:
            raise ValueError(f"repack: out.{name} must be contiguous and start at a multiple of 16 bytes, got strides "
                             f"{array.strides}")
