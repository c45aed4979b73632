# SPDX-License-Identifier: Apache-2.0
"""Reader of GGUF headers: metadata and a table of memory-mapped tensors.

A file is ``magic, version, tensor count, metadata count``, the metadata (key, type, value), one record per tensor
(name, dimensions, type, offset), padding to ``general.alignment`` and the tensor data. Nothing but the header is
read; tensor bytes are touched when somebody looks at them.
"""

import math
import mmap
import struct
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # GGML_MAX_DIMS
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list of strings"}


class ModelError(ValueError):
    """A model file, or what was asked of a model, cannot be used; the message is one line for the user."""


def field(metadata, key, kind, default=None):
    """Value of `key` in GGUF metadata, or `default`.

    Parameters
    ----------
    metadata : dict
        ``GGUF.metadata``.
    key : str
        Its full name, e.g. ``"llama.block_count"``.
    kind : type
        bool, int, float (an integer will do), str or list (of strings).
    default : optional
        What a file without the key gets; None makes the key a required one.

    Raises
    ------
    ModelError
        The key is missing or holds a value of another kind.
    """
    value = metadata.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"metadata {key} is missing")
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        found = "an array of numbers" if isinstance(value, np.ndarray) else repr(value)
        raise ModelError(f"metadata {key} must be {_KINDS[kind]}, got {textwrap.shorten(found, 60)}")
    return value


class Tensor(NamedTuple):
    """One weight as it lies in the file."""

    data: np.ndarray  # uint8 [bytes], packed blocks, row after row
    type: str  # GGML type name: "Q4_1", "F32", ...
    shape: tuple  # (out_features, in_features), or (size,): the reverse of GGUF's `ne`


class _Cursor:
    """Reads little-endian values from a buffer, front to back; past the end it raises IndexError."""

    def __init__(self, buffer):
        self.buffer = buffer
        self.at = 0

    def scalar(self, code):
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self.bytes(size))
        return value

    def bytes(self, count):
        end = self.at + count
        if end > len(self.buffer):
            raise IndexError
        piece = self.buffer[self.at : end]
        self.at = end
        return piece

    def string(self):
        return self.bytes(self.scalar("Q")).decode("utf-8", errors="replace")

    def strings(self, count):
        # The vocabulary: some 100,000 strings, so this loop is written out.
        buffer, at, result = self.buffer, self.at, []
        length_of = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = length_of(buffer, at)
                end = at + 8 + length
                result.append(buffer[at + 8 : end].decode("utf-8", errors="replace"))
                at = end
        except (struct.error, OverflowError):
            raise IndexError from None
        if at > len(buffer):
            raise IndexError
        self.at = at
        return result

    def value(self, kind):
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelError(f"metadata value type {kind} is unknown")
        element, count = self.scalar("I"), self.scalar("Q")
        if element == _STRING:
            return self.strings(count)
        if element in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[element]) if element != 7 else np.dtype(bool)
            return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)
        raise ModelError(f"metadata arrays must hold numbers or strings, got value type {element}")


class GGUF:
    """A GGUF file: ``metadata`` and ``tensors``.

    Parameters
    ----------
    path : str or Path
        A GGUF file, version 2 or 3, little-endian.

    Attributes
    ----------
    metadata : dict
        Key to Python value; arrays of numbers are NumPy arrays, arrays of strings lists.
    tensors : dict of str to Tensor
        ``data`` is a read-only view of the mapped file.

    Raises
    ------
    ModelError
        Not a GGUF file, truncated, or a tensor type nobody knows.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF')")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, records, data_start = self._read_header()
        except IndexError:
            raise ModelError(f"{self.path} is truncated: it ends inside its header") from None
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None
        self.tensors = {name: self._tensor(name, data_start, *record) for name, record in records.items()}

    def _read_header(self):
        cursor = _Cursor(self._map)
        cursor.bytes(4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            hint = "; it is a big-endian file" if version & 0xFFFF == 0 else ""
            raise ModelError(f"GGUF version must be 2 or 3, got {version}{hint}")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = {}
        for _ in range(num_values):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        records = {}
        for _ in range(num_tensors):
            name = cursor.string()
            num_dims = cursor.scalar("I")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise ModelError(f"tensor {name} has {num_dims} dimensions, at most {_MAX_DIMS} exist")
            ne = [cursor.scalar("Q") for _ in range(num_dims)]
            records[name] = tuple(reversed(ne)), cursor.scalar("I"), cursor.scalar("Q")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"general.alignment must be a positive integer, got {alignment!r}")
        return metadata, records, -(-cursor.at // alignment) * alignment

    def _tensor(self, name, data_start, shape, type_id, offset):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            ggml_type = GGMLQuantizationType(type_id)
        except ValueError:
            known = ", ".join(t.name for t in GGML_QUANT_SIZES)
            raise ModelError(f"{self.path}: tensor {name} has unknown type {type_id}; known are {known}") from None
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if shape[-1] % block_size:
            raise ModelError(f"{self.path}: tensor {name} of shape {shape} does not divide into {ggml_type.name} "
                             f"blocks of {block_size}")
        begin, size = data_start + offset, math.prod(shape) // block_size * block_bytes
        if begin + size > len(self._map):
            raise ModelError(f"{self.path} is truncated: tensor {name} ends at byte {begin + size}, "
                             f"the file at {len(self._map)}")
        return Tensor(np.frombuffer(self._map, np.uint8, size, begin), ggml_type.name, shape)
