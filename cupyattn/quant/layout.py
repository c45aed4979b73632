# SPDX-License-Identifier: Apache-2.0
"""The one layout every weight is packed into, whatever checkpoint it came from.

Columns that are coded alike are a *segment* [N, K'], cut into tiles of 16 rows and 64 columns, row of tiles by row of
tiles. Lane L = 4r + c of a warp owns rows r and r + 8 of a tile and, in each of its four steps t of 16 columns, the
four columns 16t + 4c + i, i = 0..3: for mma.m16n8k16 the left operand's registers are a0 = (row r; i 0, 1),
a1 = (row r + 8; i 0, 1), a2 = (row r; i 2, 3), a3 = (row r + 8; i 2, 3), the even i in the low half.

Codes of a tile, [plane][lane][bytes of a lane]:

    2 to 6 bits   planes of 2 | 2, 1 | 4 | 4, 1 | 4, 2 bits, low bits first. A plane of p bits is p words of 32 bits a
                  lane; pair 4t + a (a for a0..a3) is in word (4t + a) // (16 / p), at bit p * ((4t + a) % (16 / p)) of
                  either half: even i in the low half, odd i in the high one
    8 bits        two chunks of 16 bytes a lane, row r and row r + 8; word t holds the columns i = 0, 2, 1, 3
    16 bits       four chunks of 16 bytes a lane: row r steps 0-1, row r steps 2-3, then row r + 8; i = 0, 1, 2, 3
    32 bits       eight chunks, a step each, row r, then row r + 8; i = 0, 2, 1, 3

Scales, [row of tiles][span of tiles][r][scale, then zero or minimum][row r, row r + 8][group of the tile]: a tile has
1, 2 or 4 groups; with one group `tiles_per_scale` tiles share a record. Scales of scales (supers),
[row of tiles][span of tiles][r][row r, row r + 8][scale, minimum if any], are shared by `tiles_per_super` tiles.
Rows and columns past the weight's have code 0 and scale, zero and minimum 0.

Groups that are no multiple of 16 columns are filled up to one; `order`, the column of x each column of the segments
multiplies, is -1 there.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np

from ..runtime.arrays import dtype_of
from .coded import FLOAT8, TABLES, CodedWeight, Segment

LAYOUT_VERSION = 1   # of the files QMatrix.save writes; raise it with every change of the layout
TILE_ROWS, TILE_COLUMNS = 16, 64
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,), 16: (16,), 32: (32,)}
DENSE = {"float16": 16, "bfloat16": 16, "float32": 32}
_CUDA = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "int8": "int8_t",
         "float8_e4m3fn": "E4M3", "float8_e8m0fnu": "E8M0"}
_EVERY_BYTE = 0x0101010101010101
_CHUNK_BYTES = 1 << 19              # of codes packed at a time, so that the steps of the packer meet in the cache
# (t, c) of the words of a row of 64 columns, in the order (c, t) of the lanes; and back, as it is its own inverse
_LANES = np.arange(16).reshape(4, 4).T.reshape(-1)


@dataclass(frozen=True)
class Form:
    """How a segment is coded: what its kernels are compiled for, and the spans of its scales.

    Attributes
    ----------
    bits : int
        Of a code.
    kind : str
        ``"int"``, a key of `coded.TABLES` or `coded.FLOAT8`, or the dtype of an uncompressed weight (no scales then).
    centre : int
        Integers stand for ``code - centre``.
    scale : str, optional
        dtype of scales, zeros and minima.
    mode : str
        ``"PLAIN"``: v * s, ``"ZERO"``: (v - z) * s, ``"MINIMUM"``: v * s + m.
    groups : int
        Groups of a tile, 1, 2 or 4.
    super_scale : str, optional
        dtype of the scales of scales and minima.
    tiles_per_scale, tiles_per_super : int
        Tiles of a row that share a record.
    group : int
        Columns of the checkpoint that share a scale; kernels have no use for it.
    """

    bits: int
    kind: str
    centre: int = 0
    scale: str | None = None
    mode: str = "PLAIN"
    groups: int = 1
    super_scale: str | None = None
    tiles_per_scale: int = 1
    tiles_per_super: int = 1
    group: int = 0

    @functools.cached_property
    def _hash(self):
        return hash((self.bits, self.kind, self.centre, self.scale, self.mode, self.groups, self.tiles_per_scale,
                     self.tiles_per_super))

    def __hash__(self):   # plans are looked up by forms in every call
        return self._hash

    @functools.cached_property
    def trait(self):
        """The type in ``dequant.cuh``."""
        if self.kind in DENSE:
            return f"Weights<Dense<{_CUDA[self.kind]}>,NoScales>"
        codes = (f"Ints<{self.bits},{self.centre}>" if self.kind == "int" else
                 f"{'Table' if self.kind in TABLES else 'Float8'}<{self.kind.upper()}>")
        rest = f"{self.mode},{self.groups}"
        if self.super_scale is None:
            return f"Weights<{codes},Scales<{_CUDA[self.scale]},{rest}>>"
        return f"Weights<{codes},SuperScales<{_CUDA[self.scale]},{_CUDA[self.super_scale]},{rest}>>"

    @property
    def tile_bytes(self):
        """Bytes of a tile's codes."""
        return TILE_ROWS * TILE_COLUMNS * self.bits // 8

    @property
    def parameters(self):
        """Numbers of a group: scale, and zero or minimum."""
        return 0 if self.scale is None else 1 if self.mode == "PLAIN" else 2

    @property
    def supers(self):
        """Numbers above a record of a row: super scale, and super minimum."""
        return 0 if self.super_scale is None else 2 if self.mode == "MINIMUM" else 1

    @property
    def scale_bytes(self):
        """Bytes of a row's record of scales."""
        return 0 if self.scale is None else item_bytes(self.scale) * self.parameters * self.groups

    @property
    def super_bytes(self):
        """Bytes of a row's record of super scales."""
        return 0 if self.super_scale is None else item_bytes(self.super_scale) * self.supers

    @property
    def bits_per_weight(self):
        """Scales included, padding not."""
        bits = float(self.bits)
        bits += 8 * self.scale_bytes / (TILE_COLUMNS * self.tiles_per_scale)
        bits += 8 * self.super_bytes / (TILE_COLUMNS * self.tiles_per_super)
        return bits


def _traits():
    """Of every form that a reader of checkpoints makes, and then some."""
    integers = [(bits, centre) for bits in (2, 3, 4, 5, 6, 8) for centre in (0, 2 ** (bits - 1))]
    kinds = [*((bits, "int", centre) for bits, centre in integers), *((4, name, 0) for name in TABLES),
             *((8, name, 0) for name in FLOAT8)]
    for bits, kind, centre in kinds:
        modes = ("PLAIN",) if kind != "int" else ("PLAIN", "ZERO") if centre else ("MINIMUM", "ZERO")
        for mode, groups, scale in itertools.product(modes, (1, 2, 4), ("float16", "bfloat16", "float32")):
            yield Form(bits, kind, centre, scale, mode, groups)
        if kind != "e2m1":
            yield from (Form(bits, kind, centre, "int8", modes[0], groups, "float16") for groups in (2, 4))
    yield from (Form(4, "e2m1", 0, "float8_e8m0fnu", "PLAIN", groups) for groups in (1, 2))
    yield from (Form(4, "e2m1", 0, "float8_e4m3fn", "PLAIN", 4, above) for above in (None, "float32"))
    yield from (Form(bits, name) for name, bits in DENSE.items())


TRAITS = tuple(dict.fromkeys(form.trait for form in _traits()))


@dataclass(frozen=True, eq=False)
class PackedSegment:
    """Columns of a packed weight that are coded alike.

    Attributes
    ----------
    codes : ndarray [row tiles, column tiles, tile bytes], uint8
    scales, supers : ndarray [row tiles, spans, bytes], uint8; None where the form has none
    form : Form
    columns : int
        Columns of x it reads; of x in the weight's `order` if it has one, a multiple of 64 then.
    """

    codes: np.ndarray
    scales: np.ndarray | None
    supers: np.ndarray | None
    form: Form
    columns: int

    @functools.cached_property
    def view(self):
        """Fields of the kernels' ``WeightView``, made once."""
        row_tiles, column_tiles = self.codes.shape[-3:-1]   # of an expert, where there is an axis of experts in front
        return {"codes": self.codes, "scales": self.scales, "supers": self.supers, "row_tiles": row_tiles,
                "column_tiles": column_tiles, "tiles_per_scale": self.form.tiles_per_scale,
                "tiles_per_super": self.form.tiles_per_super}

    @functools.cached_property
    def geometry(self):
        """(Form, row tiles, column tiles, columns): all that plans depend on."""
        return self.form, *self.codes.shape[-3:-1], self.columns

    @property
    def arrays(self):
        """(codes, scales, supers)"""
        return self.codes, self.scales, self.supers

    def with_arrays(self, change):
        """This segment with `change(array)` for each of its arrays."""
        return self.of_arrays(*(None if array is None else change(array) for array in self.arrays))

    def of_arrays(self, codes, scales, supers):
        """This segment with other arrays."""
        return PackedSegment(codes, scales, supers, self.form, self.columns)


def item_bytes(name):
    """Bytes of an element of the dtype; without ml_dtypes, which takes long to import."""
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(name, 1)


def tiles(shape):
    """(row tiles, column tiles) of a matrix [N, K]."""
    return -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_COLUMNS)


# ---- codes -----------------------------------------------------------------------------------------------------


def _padded(array, rows, columns):
    """`array` [N, K] with zeros appended up to `rows` and `columns`; itself when it has them."""
    if array.shape == (rows, columns):
        return np.ascontiguousarray(array)
    out = np.zeros((rows, columns), array.dtype)
    out[:array.shape[0], :array.shape[1]] = array
    return out


def _swapped(words):
    """32-bit words with their bytes in the order 0, 2, 1, 3, in place; its own inverse."""
    moved = words >> np.uint32(8)
    moved ^= words
    moved &= np.uint32(0xFF00)
    words ^= moved
    moved <<= np.uint32(8)
    words ^= moved
    return words


def _lane_words(words):
    """Words of row-major columns [..., (t, c)] in the order of lanes [..., (c, t)]."""
    return words.reshape(-1, 16).take(_LANES, axis=-1).reshape(words.shape)


def _put_plane(out, values, bits):
    """`values` [Nt, 2, 8, 64 Kt] below 2^bits, 1, 2 or 4, into `out` [Nt, Kt, 128 * bits] bytes."""
    both = values[:, 1].view("u8") << np.uint64(bits)                  # [tile row, r, column]
    both |= values[:, 0].view("u8")
    if bits == 4:
        words = _lane_words(both.view("u4"))
    else:
        pairs = both.view("u4")                                        # i = 0, 1 below i = 2, 3
        pairs |= pairs >> np.uint32(16 - 2 * bits)
        words = _lane_words(pairs.astype("u2"))                        # [.., c, t]: even i below odd i
        if bits == 1:
            steps = words.view("u4")
            steps |= steps >> np.uint32(12)
            words = steps.astype("u2")
    row = f"V{16 * bits}"                                              # of a tile; NumPy copies whole records fast
    words = _swapped(words.view("u4")).view(row).reshape(*values.shape[::2], -1)
    out.view(row)[...] = words.swapaxes(1, 2)


def _get_plane(packed, bits):
    """The inverse of `_put_plane`: uint8 [Nt, 2, 8, 64 Kt]."""
    row_tiles, column_tiles = packed.shape[:2]
    words = np.ascontiguousarray(packed).view("u4").reshape(row_tiles, column_tiles, 8, 4 * bits).transpose(0, 2, 1, 3)
    words = _swapped(words.copy())
    if bits == 4:
        both = _lane_words(words.reshape(row_tiles, 8, -1)).view("u1")
    else:
        if bits == 1:
            steps = words.view("u2").astype("u4")
            words = (steps | steps << np.uint32(12)) & np.uint32(0x0F0F0F0F)
        pairs = _lane_words(words.view("u2").reshape(row_tiles, 8, -1)).astype("u4")
        both = (pairs | pairs << np.uint32(16 - 2 * bits)).view("u1")
    mask = np.uint8(2**bits - 1)
    return np.stack([both & mask, both >> np.uint8(bits) & mask], axis=1)


def _put_bytes(out, codes):
    """`codes` [Nt, 2, 8, 64 Kt], 8 bits, into `out` [Nt, Kt, 1024]."""
    words = _swapped(_lane_words(codes.view("u4"))).view("u8").reshape(*codes.shape[:3], -1, 8)
    out.view("u8").reshape(*out.shape[:2], 2, 8, 8)[...] = words.transpose(0, 3, 1, 2, 4)


def _get_bytes(packed):
    row_tiles, column_tiles = packed.shape[:2]
    words = np.ascontiguousarray(packed).view("u8").reshape(row_tiles, column_tiles, 2, 8, 8).transpose(0, 2, 3, 1, 4)
    return _lane_words(_swapped(words.copy().view("u4"))).view("u1").reshape(row_tiles, 2, 8, -1)


def _put_dense(out, values):
    """`values` [Nt, 2, 8, 64 Kt], 16 or 32 bits, into `out` [Nt, Kt, bytes]."""
    steps = values.view("u8").reshape(*values.shape[:3], -1, 4, 4, values.itemsize // 2)    # [.., Kt, t, c, 8 bytes]
    if values.itemsize == 4:
        steps = steps.view("u4").take((0, 2, 1, 3), axis=-1).view("u8")
        out = out.view("u8").reshape(*out.shape[:2], 2, 4, 8, 4, 2)    # [.., half, t, r, c, 8 bytes]
        out[...] = steps.transpose(0, 3, 1, 4, 2, 5, 6)
    else:
        steps = steps.reshape(*steps.shape[:4], 2, 2, 4)
        out = out.view("u8").reshape(*out.shape[:2], 2, 2, 8, 4, 2)    # [.., half, t // 2, r, c, t % 2]
        out[...] = steps.transpose(0, 3, 1, 4, 2, 6, 5)


def _get_dense(packed, kind):
    row_tiles, column_tiles = packed.shape[:2]
    held = np.ascontiguousarray(packed).view("u8")
    if DENSE[kind] == 32:
        steps = held.reshape(row_tiles, column_tiles, 2, 4, 8, 4, 2).transpose(0, 2, 4, 1, 3, 5, 6).copy()
        steps = steps.view("u4").take((0, 2, 1, 3), axis=-1)
    else:
        steps = held.reshape(row_tiles, column_tiles, 2, 2, 8, 4, 2).transpose(0, 2, 4, 1, 3, 6, 5)
    return np.ascontiguousarray(steps).view(dtype_of(kind)).reshape(row_tiles, 2, 8, -1)


def _pack_codes(codes, form):
    """[Nt, Kt, tile bytes] of `codes` [N, columns]."""
    row_tiles, column_tiles = tiles(codes.shape)
    packed = np.empty((row_tiles, column_tiles, form.tile_bytes), np.uint8)
    step = max(1, _CHUNK_BYTES // max(1, 1024 * column_tiles * codes.itemsize))
    scratch = np.empty((min(step, row_tiles), 2, 8, 8 * column_tiles), "u8")   # a plane of a chunk
    for start in range(0, row_tiles, step):
        part = packed[start:start + step]
        some = _padded(codes[16 * start:16 * (start + step)], 16 * len(part), 64 * column_tiles)
        some = some.reshape(len(part), 2, 8, -1)
        if form.kind in DENSE:
            _put_dense(part, some)
        elif form.bits == 8:
            _put_bytes(part, some)
        elif len(PLANES[form.bits]) == 1:
            _put_plane(part, some, form.bits)
        else:
            (bits, above), numbers = PLANES[form.bits], some.view("u8")
            plane = np.bitwise_and(numbers, np.uint64((2**bits - 1) * _EVERY_BYTE), out=scratch[:len(part)])
            _put_plane(part[..., :128 * bits], plane.view("u1"), bits)
            np.right_shift(numbers, np.uint64(bits), out=plane)
            plane &= np.uint64((2**above - 1) * _EVERY_BYTE)
            _put_plane(part[..., 128 * bits:], plane.view("u1"), above)
    return packed


def unpack_codes(packed, form):
    """The codes [16 Nt, 64 Kt] of a packed segment; the weights themselves where they are uncompressed."""
    if form.kind in DENSE:
        codes = _get_dense(packed, form.kind)
    elif form.bits == 8:
        codes = _get_bytes(packed)
    else:
        codes, at, shift = 0, 0, 0
        for bits in PLANES[form.bits]:
            codes = codes | _get_plane(packed[..., at:at + 128 * bits], bits) << np.uint8(shift)
            at, shift = at + 128 * bits, shift + bits
    return codes.reshape(16 * packed.shape[0], -1)


# ---- scales ----------------------------------------------------------------------------------------------------


def _put_rows(arrays, row_tiles, groups, inner):
    """Arrays [N, spans * groups] as bytes [Nt, spans, 8 r, ...]: (array, half, group), or (half, array) if `inner`."""
    spans = arrays[0].shape[1] // groups
    parts = [_padded(a.view(f"u{a.itemsize}"), 16 * row_tiles, spans * groups).reshape(row_tiles, 2, 8, spans, groups)
             for a in arrays]
    axes = (0, 3, 2, 1, 5, 4) if inner else (0, 3, 2, 5, 1, 4)
    held = np.ascontiguousarray(np.stack(parts, axis=-1).transpose(axes))
    return held.view(np.uint8).reshape(row_tiles, spans, -1)


def _get_rows(packed, name, count, groups, inner):
    """The inverse of `_put_rows`: [count, 16 Nt, spans * groups]."""
    row_tiles, spans = packed.shape[:2]
    held = np.ascontiguousarray(packed).view(dtype_of(name))
    if inner:
        held = held.reshape(row_tiles, spans, 8, 2, count, groups).transpose(4, 0, 3, 2, 1, 5)
    else:
        held = held.reshape(row_tiles, spans, 8, count, 2, groups).transpose(3, 0, 4, 2, 1, 5)
    return np.ascontiguousarray(held).reshape(count, 16 * row_tiles, spans * groups)


def _wide(group, columns):
    """Columns that `group` of a segment's `columns` take: a multiple of 16, but for the only group."""
    return group if group >= columns else -(-group // 16) * 16


def filled_group(segment):
    """Packed columns of a group of a Segment: a multiple of 16, but for the only group, which has all."""
    columns = segment.codes.shape[1]
    return _wide(min(segment.group, columns), columns)


def form_of(segment, scale_dtype=None):
    """Form of a Segment, and its columns once the groups are filled; supers as `with_whole_supers` leaves them.

    `scale_dtype` names the numbers in `scale`, ``segment.scale.dtype.name`` by default.
    """
    last, group = segment.codes.shape[1] - 1, filled_group(segment)
    columns = last // segment.group * group + last % segment.group + 1
    column_tiles = -(-columns // TILE_COLUMNS)
    groups = 1 if group >= columns or group % 64 == 0 else 2 if group % 32 == 0 else 4
    mode = "ZERO" if segment.zero is not None else "MINIMUM" if segment.minimum is not None else "PLAIN"
    tiles_per_scale = 1 if groups > 1 else min(column_tiles, -(-group // 64))
    super_scale, tiles_per_super = None, 1
    if segment.super_scale is not None:
        super_scale, tiles_per_super = segment.super_scale.dtype.name, column_tiles
        if segment.super_group <= last:
            tiles_per_super = segment.super_group // segment.group * group // 64
    return Form(segment.bits, segment.kind, segment.centre, scale_dtype or segment.scale.dtype.name, mode, groups,
                super_scale, tiles_per_scale, tiles_per_super, min(segment.group, last + 1)), columns


def with_whole_supers(segment):
    """This segment; with float32 scales and no supers where the layout has no place for them.

    It has none for those of columns that are no multiple of a tile's, or of scales but not of minima.
    """
    if segment.super_scale is None:
        return segment
    columns, ratio = segment.codes.shape[1], -(-segment.super_group // segment.group)
    whole = segment.super_group >= columns or ratio * filled_group(segment) % 64 == 0
    if whole and (segment.minimum is None) == (segment.super_minimum is None):
        return segment

    def above(array, super_array):
        return array.astype("float32") * super_array.astype("float32").repeat(ratio, axis=1)[:, :array.shape[1]]

    minimum = segment.minimum
    if minimum is not None and segment.super_minimum is not None:
        minimum = above(minimum, segment.super_minimum)
    return replace(segment, scale=above(segment.scale, segment.super_scale), minimum=minimum,
                   zero=None if segment.zero is None else segment.zero.astype("float32"), super_scale=None,
                   super_minimum=None, super_group=0)


def _filled_at(segment):
    """Where the columns of a segment are once its groups are filled."""
    columns = np.arange(segment.codes.shape[1])
    return columns // segment.group * filled_group(segment) + columns % segment.group


def _filled(codes, group, wide):
    """`codes` [N, columns] with columns of zeros after every `group` of them, up to `wide`."""
    rows, columns = codes.shape
    whole = columns // group
    filled = np.zeros((rows, whole + 1, wide), np.uint8)
    filled[:, :whole, :group] = codes[:, :whole * group].reshape(rows, whole, group)
    filled[:, whole, :columns % group] = codes[:, whole * group:]
    return filled.reshape(rows, -1)


def pack_segment(segment):
    """A Segment as a PackedSegment. Its columns are the segment's with the groups filled to multiples of 16."""
    segment = with_whole_supers(segment)
    form, columns = form_of(segment)
    codes, group = segment.codes, filled_group(segment)
    if columns != codes.shape[1]:
        codes = _filled(codes, segment.group, group)[:, :columns]
    row_tiles, column_tiles = tiles(codes.shape)

    spans = -(-column_tiles // form.tiles_per_scale)
    source = np.arange(spans * form.groups) * (64 // form.groups * form.tiles_per_scale) // group   # group of each
    known = source < segment.scale.shape[1]

    def spread(array):
        wide = np.zeros((array.shape[0], len(source)), segment.scale.dtype)
        wide[:, known] = array.astype(segment.scale.dtype, copy=False)[:, source[known]]
        return wide

    parameters = [a for a in (segment.scale, segment.zero, segment.minimum) if a is not None]
    scales = _put_rows([spread(a) for a in parameters], row_tiles, form.groups, False)
    supers = None
    if segment.super_scale is not None:
        above = [a for a in (segment.super_scale, segment.super_minimum) if a is not None]
        supers = _put_rows([a.astype(segment.super_scale.dtype, copy=False) for a in above], row_tiles, 1, True)
    return PackedSegment(_pack_codes(codes, form), scales, supers, form, columns)


# ---- weights ---------------------------------------------------------------------------------------------------


def pack(weight, pack_segment=pack_segment):
    """A CodedWeight in this layout.

    Parameters
    ----------
    weight : CodedWeight
    pack_segment : callable
        Makes a PackedSegment of each Segment: `pack_segment`, or on the device `cupyattn.repack`.

    Returns
    -------
    segments : tuple of PackedSegment
    order : ndarray [columns of all segments, each a multiple of 64], int32, or None
        Column of x that each column multiplies, -1 for 0. None where the one segment takes x as it is.
    """
    packed = [pack_segment(segment) for segment in weight.segments]
    if len(packed) == 1 and weight.order is None and packed[0].columns == weight.segments[0].codes.shape[1]:
        return tuple(packed), None
    order = np.arange(weight.shape[1], dtype=np.int32) if weight.order is None else weight.order
    first, parts = 0, []
    for before, after in zip(weight.segments, packed, strict=True):
        part = np.full(-(-after.columns // 64) * 64, -1, np.int32)
        part[_filled_at(before)] = order[first:first + before.codes.shape[1]]
        parts.append(part)
        first += before.codes.shape[1]
    packed = (replace(segment, columns=len(part)) for segment, part in zip(packed, parts, strict=True))
    return tuple(packed), np.concatenate(parts)


def stacked(xp, parts):
    """One segment with the rows of all `parts`: segments of one form, all but the last of full row tiles."""
    def joined(arrays):
        if arrays[0] is None or len(arrays) == 1:
            return arrays[0]
        whole, at = xp.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype), 0
        for array in arrays:
            whole[at:at + len(array)] = array
            at += len(array)
        return whole

    return replace(parts[0], codes=joined([part.codes for part in parts]),
                   scales=joined([part.scales for part in parts]), supers=joined([part.supers for part in parts]))


def pack_by_rows(rows, parts):
    """One segment of `rows` rows from those of 16, 32, ... rows each, as in `stacked`; of an iterator one is held."""
    whole, at = None, 0
    for part in parts:
        if whole is None:
            whole = part.with_arrays(lambda array: np.empty((-(-rows // TILE_ROWS), *array.shape[1:]), np.uint8))
        for to, array in zip(whole.arrays, part.arrays, strict=True):
            if to is not None:
                to[at:at + len(array)] = array
        at += len(part.codes)
    return whole


def pack_dense(weight):
    """The one segment of an uncompressed weight [N, K], float16, bfloat16 or float32."""
    form = Form(DENSE[weight.dtype.name], weight.dtype.name)
    return PackedSegment(_pack_codes(weight, form), None, None, form, weight.shape[1])


def unpack(segments, order, format, shape):
    """The CodedWeight behind what `pack` returned. Not for uncompressed weights."""
    parts, columns, first = [], [], 0
    for packed in segments:
        part = None if order is None else order[first:first + packed.columns]
        kept = _kept(packed, part)
        parts.append(_unpack_segment(packed, shape[0], kept))
        columns.append(None if order is None else part[kept])
        first += packed.columns
    return CodedWeight(format, shape, tuple(parts), None if order is None else np.concatenate(columns))


def _kept(packed, order):
    """Columns of the segment that `_filled_at` and the tiles have not added."""
    if order is None:
        return np.arange(packed.columns)
    at = np.arange(np.flatnonzero(order >= 0)[-1] + 1)
    return at[at % _wide(packed.form.group, len(at)) < packed.form.group]


def _unpack_segment(packed, rows, kept):
    form = packed.form
    codes = unpack_codes(packed.codes, form)[:rows, kept]
    columns, group = codes.shape[1], form.group
    wide = _wide(group, kept[-1] + 1)
    parameters = _get_rows(packed.scales, form.scale, form.parameters, form.groups, False)[:, :rows]
    behind = np.arange(-(-columns // group)) * wide * form.groups // (64 * form.tiles_per_scale)
    scale, *second = parameters[:, :, behind]
    above, super_group = [None, None], 0
    if form.supers:
        above = [*_get_rows(packed.supers, form.super_scale, form.supers, 1, True)[:, :rows], None]
        super_group = -(-64 * form.tiles_per_super // wide) * group
    return Segment(codes, form.bits, form.kind, group, scale, form.centre,
                   second[0] if form.mode == "ZERO" else None, second[0] if form.mode == "MINIMUM" else None,
                   above[0], above[1], super_group)
