# SPDX-License-Identifier: Apache-2.0
"""Tensors of .safetensors files by name, mapped into memory: nothing is read before somebody looks at it.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name to dtype, shape and place) and the
data. Large models are several files, with ``model.safetensors.index.json`` saying which tensor is where.
(The package safetensors gives no FP8 to NumPy.)
"""

import difflib
import functools
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..runtime.arrays import dtype_of

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000   # of the format
_ALIGNMENT = 64             # of the data in files written here


class Safetensors(Mapping):
    """Arrays by name, of a file or of a folder of them.

    Parameters
    ----------
    path : str or Path
        A .safetensors file; or a folder: the files its ``model.safetensors.index.json`` names, else its
        ``model.safetensors``, else all its .safetensors files; or such an index.

    Attributes
    ----------
    path : Path
    folder : Path
        Where config.json is to be looked for.

    Raises
    ------
    ValueError
        Not such a file, or a truncated or contradictory one. Files an index names are opened when a tensor of
        theirs is asked for.
    OSError
        A file cannot be read.
    KeyError
        From ``[name]``: no such tensor; names close ones.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        self._files = {}
        if path.is_dir():
            path = next((file for file in (path / INDEX, path / "model.safetensors") if file.exists()), path)
        if path.suffix == ".json":
            self._places = {name: self.folder / file for name, file in _weight_map(path).items()}
            return
        self._places = {}
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            names = self._file(file).records
            if twice := names.keys() & self._places.keys():
                raise ValueError(f"{self.path} holds {min(twice)} twice, in {self._places[min(twice)].name} and "
                                 f"{file.name}, and no {INDEX}")
            self._places |= dict.fromkeys(names, file)
        if not self._files:
            raise ValueError(f"{self.path} holds no .safetensors file")

    def __getitem__(self, name):
        if name not in self._places:
            raise KeyError(f"{self.path} holds no tensor {name}{_close(name, self._places)}")
        return self._file(self._places[name]).array(name)

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)

    def _file(self, path):
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]

    @property
    def metadata(self):
        """Texts by name that the opened files carry."""
        return {name: text for file in self._files.values() for name, text in file.metadata.items()}

    def layer(self, prefix):
        """The tensors of one layer, `prefix` and the dot after it removed.

        Parameters
        ----------
        prefix : str
            ``"model.layers.0.self_attn.q_proj"``, say. What follows it is ``.name``, or ``_blocks`` and ``_scales``
            as gpt-oss has it.

        Returns
        -------
        dict of str to ndarray
            Read-only, over the mapped file.

        Raises
        ------
        ValueError
            No tensor begins so; names close prefixes.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"QMatrix: prefix must be a str, got {prefix!r}")
        if prefix not in self.layers:
            raise ValueError(f"QMatrix: prefix must be that of a layer in {self.path}, got {prefix!r}"
                             f"{_close(prefix, self.layers)}")
        return {name[len(prefix) + 1:]: self[name] for name in self.layers[prefix]}

    @functools.cached_property
    def layers(self):
        """Names of the tensors of each layer, by its prefix."""
        layers = {}
        for name in self._places:
            layers.setdefault(_layer_of(name), []).append(name)
        return layers


class _File:
    """One mapped file: `records` of its tensors, and its `metadata`."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if size < 8:
                raise ValueError(f"{path} is truncated: it has {size} bytes, its header's length takes 8")
            if length > _MAX_HEADER or file.read(1) != b"{":
                raise ValueError(f"{path} is not a safetensors file: no JSON header of at most {_MAX_HEADER} bytes "
                                 "is at its beginning")
            if 8 + length > size:
                raise ValueError(f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _json(self._map[8:8 + length], path)
        self.metadata = header.pop("__metadata__", None) or {}
        self.records = {name: self._record(name, record, 8 + length) for name, record in header.items()}

    def _record(self, name, record, start):
        """(dtype's name in the file, shape, first byte, bytes)."""
        try:
            dtype, shape, (begin, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
            wrong = not (isinstance(dtype, str) and 0 <= begin <= end and min(shape, default=0) >= 0
                         and all(isinstance(n, int) for n in (begin, end, *shape)))
        except (TypeError, KeyError, ValueError):
            wrong = True
        if wrong:
            raise ValueError(f"{self.path}: header of tensor {name} must have dtype, shape and data_offsets, got "
                             f"{str(record)[:120]}")
        if dtype in DTYPES and (size := math.prod(shape) * dtype_of(DTYPES[dtype]).itemsize) != end - begin:
            raise ValueError(f"{self.path}: tensor {name}, {dtype} {list(shape)}, must have {size} bytes, "
                             f"got {end - begin}")
        if start + end > len(self._map):
            raise ValueError(f"{self.path} is truncated: tensor {name} ends at byte {start + end}, "
                             f"the file at {len(self._map)}")
        return dtype, shape, start + begin

    def array(self, name):
        """Read-only view of the file; a copy where the file has it at an odd address."""
        if name not in self.records:
            raise ValueError(f"{self.path} lacks tensor {name}, which {INDEX} says it has")
        dtype, shape, begin = self.records[name]
        if dtype not in DTYPES:
            raise NotImplementedError(f"{self.path}: tensor {name} must be one of {', '.join(DTYPES)}, got {dtype}")
        array = np.frombuffer(self._map, dtype_of(DTYPES[dtype]), math.prod(shape), begin).reshape(shape)
        return array if array.flags.aligned else array.copy()


def write(path, tensors, metadata=None):
    """Write a .safetensors file, its data at a multiple of 64 bytes.

    Parameters
    ----------
    path : str or Path
    tensors : dict of str to ndarray
        Written in this order, side by side.
    metadata : dict of str to str, optional
    """
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _json(text, path):
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its JSON cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: its JSON must be an object, got {str(found)[:40]}")
    return found


def _weight_map(path):
    places = _json(path.read_bytes(), path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path} must have a weight_map of tensors to files, got {str(places)[:40]}")
    return places


def _layer_of(name):
    """What comes before the names the readers know: a.b of a.b.weight, of a.b.weight.absmax and of a.b_blocks."""
    for suffix in ("_blocks", "_scales"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    layer, found, _ = name.partition(".weight.")
    return layer if found else name.rpartition(".")[0]


def _close(name, names):
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; close are {', '.join(close)}" if close else ""
