# SPDX-License-Identifier: Apache-2.0
"""Kernel argument structs, read from ``include/params.h``: one declaration for C, CUDA and NumPy."""

import ctypes
import functools
import itertools
import operator
import re
import struct as packing
from typing import NamedTuple

import numpy as np

from . import source

_STRUCT = re.compile(r"(?<!>\n)^struct\s+(\w+)\s*\{(.*?)^\};", re.MULTILINE | re.DOTALL)   # no template
_FIELD = re.compile(r"^\s*(const\s+)?(\w+)\s*(\*?)\s+(\w+);\s*//\s*(.+)$")
_SCALARS = {"int32_t": ("i4", "i"), "uint32_t": ("u4", "I"), "int64_t": ("i8", "q"), "uint64_t": ("u8", "Q"),
            "float": ("f4", "f")}
_POINTEES = {"void": None, "float": "float32", "int32_t": "int32", "int64_t": "int64", "uint8_t": "uint8",
             "int8_t": "int8", "uint16_t": "uint16", "uint32_t": "uint32"}


class Leaf(NamedTuple):
    """One scalar or pointer of a struct, nested structs flattened."""

    top: str            # field of the outer struct
    sub: tuple          # names below it, () for a plain field
    is_pointer: bool
    read_only: bool     # a pointer the kernel never writes through
    pointee: str | None # NumPy dtype name the pointer fixes, None for void
    comment: str

    @property
    def path(self):
        return ".".join((self.top, *self.sub))


class Struct(NamedTuple):
    """Layout of one C struct: NumPy dtype, flattened leaves and how to pack them."""

    name: str
    dtype: np.dtype
    leaves: tuple
    fields: tuple       # names of the outer fields
    packer: packing.Struct
    parts: tuple        # how `_flatten` reads its fields
    pointers: tuple     # (place among the leaves, Leaf, dtype the pointer fixes or None)

    def offset(self, leaf):
        """Byte of the struct at which a Leaf begins."""
        dtype, at = self.dtype, 0
        for name in (leaf.top, *leaf.sub):
            dtype, begin = dtype.fields[name][:2]
            at += begin
        return at


def _parse(text, known):
    for name, body in _STRUCT.findall(text):
        members, leaves, nested = [], [], {}
        for line in body.strip("\n").splitlines():
            if not line.strip() or line.strip().startswith("//"):
                continue
            match = _FIELD.match(line)
            if match is None:
                raise ValueError(f"params.h: {name}: cannot read {line.strip()!r}; "
                                 "want `type name;  // dtype [shape] meaning`")
            const, kind, star, field, comment = match.groups()
            if star:
                if kind not in _POINTEES:
                    raise ValueError(f"params.h: {name}.{field}: pointer to {kind} is not in the grammar")
                members.append((field, np.dtype("u8")))
                leaves.append(Leaf(field, (), True, bool(const), _POINTEES[kind], comment.strip()))
            elif kind in _SCALARS:
                members.append((field, np.dtype(_SCALARS[kind][0])))
                leaves.append(Leaf(field, (), False, False, None, comment.strip()))
            elif kind in known:
                members.append((field, known[kind].dtype))
                nested[field] = known[kind]
                for leaf in known[kind].leaves:
                    leaves.append(leaf._replace(top=field, sub=(leaf.top, *leaf.sub),
                                                read_only=leaf.read_only or bool(const)))
            else:
                raise ValueError(f"params.h: {name}.{field}: unknown type {kind}")
        dtype = np.dtype(members, align=True)
        fields = tuple(f for f, _ in members)
        pointers = tuple((i, leaf, leaf.pointee and np.dtype(leaf.pointee)) for i, leaf in enumerate(leaves)
                         if leaf.is_pointer)
        known[name] = Struct(name, dtype, tuple(leaves), fields, _packer(dtype), _parts(fields, nested), pointers)
    return known


def _parts(fields, nested):
    """(function of a dict that gives some of its values, Struct of the one if it is nested) in the fields' order."""
    parts = []
    for names in (list(run) for _, run in itertools.groupby(fields, lambda f: f if f in nested else "")):
        if names[0] in nested:
            parts.append((operator.itemgetter(names[0]), nested[names[0]]))
        else:   # several at once; a getter of one name alone would give no tuple
            parts.append((operator.itemgetter(*names) if len(names) > 1 else lambda v, name=names[0]: (v[name],), None))
    return tuple(parts)


def _packer(dtype):
    """Packer with the dtype's exact offsets; padding is written as zero bytes."""
    codes = {"i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f4": "f"}
    text, at = "<", 0

    def visit(dtype, base):
        nonlocal text, at
        for name in dtype.names:
            member, offset = dtype.fields[name][:2]
            if member.names:
                visit(member, base + offset)
                continue
            text += "x" * (base + offset - at) + codes[member.str[1:]]
            at = base + offset + member.itemsize

    visit(dtype, 0)
    return packing.Struct(text + "x" * (dtype.itemsize - at))


@functools.lru_cache(maxsize=64)
def load(file=None):
    """Structs of params.h and, when `file` is given, of that `.cu` file too, by name."""
    known = _parse((source.root() / "include" / "params.h").read_text(), {})
    if file is not None:
        _parse(source.path(file).read_text(), known)
    return known


def layout(name, file=None):
    """The Struct called `name`, from params.h or else from the `.cu` file that uses it."""
    known = load(None)
    if name not in known and file is not None:
        known = load(file)
    if name not in known:
        raise KeyError(f"no struct {name} in params.h; there are {', '.join(known)}")
    return known[name]


class Args:
    """A filled argument struct, with the arrays whose addresses it holds.

    Attributes
    ----------
    struct : Struct
    data : bytes
        The struct as the kernel receives it.
    arrays : list of (Leaf, array)
        Every array behind a pointer: kept alive, and registered with the checker.
    """

    __slots__ = ("struct", "data", "arrays")

    def __init__(self, struct, data, arrays):
        self.struct = struct
        self.data = data
        self.arrays = arrays

    def record(self):
        """The struct as a 0-d NumPy array of bytes, the form CuPy passes by value.

        CuPy asks for its ``__array_interface__``, which describes the fields of a structured dtype one by one: 100 µs
        and more of a launch.
        """
        return np.ndarray((), f"V{len(self.data)}", self.data)


# NumPy keeps the data pointer right behind the object header; reading it there takes a quarter of the time that
# __array_interface__ does, which a small launch notices.
_read_pointer = ctypes.c_size_t.from_address
_POINTER = object.__basicsize__
_probe = np.empty(1)
if _read_pointer(id(_probe) + _POINTER).value != _probe.__array_interface__["data"][0]:
    raise ImportError(f"cupyattn: NumPy {np.__version__} keeps its data pointer elsewhere than NumPy 1 and 2 do")


def address(array):
    """Address of an array's first element."""
    if isinstance(array, np.ndarray):
        return _read_pointer(id(array) + _POINTER).value
    return array.data.ptr


def extent(array):
    """(first byte, one past the last byte) of an array of any strides."""
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    start = address(array) + sum(min(0, r) for r in reach)
    return start, address(array) + sum(max(0, r) for r in reach) + array.itemsize


def fill(struct, values):
    """Args of `struct` from a dict of field values.

    A pointer takes an array or None, a nested struct a dict of its fields or None (all zero).
    """
    flat, arrays = [], []
    try:
        _flatten(struct, values, flat)
    except KeyError:
        raise _wrong_fields(struct, values) from None
    if len(values) != len(struct.fields):
        raise _wrong_fields(struct, values)
    for place, leaf, pointee in struct.pointers:
        value = flat[place]
        if value is None:
            flat[place] = 0
            continue
        if pointee is not None and value.dtype != pointee:
            raise TypeError(f"{struct.name}.{leaf.path}: must be {pointee}, got {value.dtype.name}")
        flat[place] = _read_pointer(id(value) + _POINTER).value if isinstance(value, np.ndarray) else value.data.ptr
        arrays.append((leaf, value))
    try:
        data = struct.packer.pack(*flat)
    except packing.error as error:
        raise _explain(struct, flat, error) from None
    return Args(struct, data, arrays)


def _flatten(struct, values, flat):
    """Append the values of all leaves; this is a good part of a small call."""
    for get, nested in struct.parts:
        found = get(values)
        if nested is None:
            flat += found
        elif found is None:
            flat += [None if leaf.is_pointer else 0 for leaf in nested.leaves]
        else:
            _flatten(nested, found, flat)


def _wrong_fields(struct, values):
    """TypeError about `values`, in which a field of the struct or of one inside it is missing, or one is unknown."""
    missing, unknown = [f for f in struct.fields if f not in values], [f for f in values if f not in struct.fields]
    if not missing and not unknown:
        inner = ((nested, get(values)) for get, nested in struct.parts if nested is not None)
        return next(_wrong_fields(nested, found) for nested, found in inner
                    if found is not None and not found.keys() >= set(nested.fields))
    return TypeError(f"{struct.name}: missing fields {missing}, unknown fields {unknown}; "
                     f"the fields are {', '.join(struct.fields)}")


def _explain(struct, flat, error):
    codes = [c for c in struct.packer.format if c not in "<x"]
    for leaf, code, value in zip(struct.leaves, codes, flat, strict=True):
        try:
            packing.pack("<" + code, value)
        except packing.error:
            return ValueError(f"{struct.name}.{leaf.path}: {value!r} does not fit the field ({leaf.comment})")
    return ValueError(f"{struct.name}: {error}")
