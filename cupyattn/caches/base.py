# SPDX-License-Identifier: Apache-2.0
"""What EasyDeL's cache classes have in common: exchanging fields, saving, copying, comparing."""

import base64
import dataclasses
import json
import typing

import numpy as np

from ..devices import to_host
from ..kv.quantized import FORMATS, QuantizedKV
from ..runtime.arrays import dtype_of
from ..runtime.checks import FLOATS, check_number

NOT_STATE = ("metadata", "layer_index")   # fields of a view that describe it; the others are what it holds


class Record:
    """A dataclass that can be exchanged, saved, copied and compared, arrays included.

    Two of them are equal when they are of one class and all fields are; arrays when dtype, shape and every byte are,
    wherever they lie; a tuple and a list when their items are.
    """

    def replace(self, **fields):
        """A new object with some fields exchanged; this one without any. TypeError for an unknown field."""
        return dataclasses.replace(self, **fields) if fields else self

    def to_dict(self):
        """Fields by name, in order, ready for JSON.

        An array becomes ``{"dtype", "shape", "base64"}``, a QuantizedKV ``{"format", "codes", "scale", "zero"}``, a
        dtype ``{"dtype"}``, what has a `to_dict` of its own that dict, a tuple a list. So no bit is lost, and metadata
        is a flat dict of numbers.

        Raises
        ------
        TypeError
            A field holds what cannot be written down, e.g. a partition axis of JAX.
        """
        return {name: _encoded(value, f"{type(self).__name__}.to_dict: {name}") for name, value in self._items()}

    @classmethod
    def from_dict(cls, data, *, xp=np):
        """The object `to_dict` was called on, views and metadata inside included.

        Parameters
        ----------
        data : dict
            Fields that are missing get their defaults (TypeError where they have none), unknown ones are ignored.
        xp : numpy or cupy
            Where the arrays are to be.
        """
        hints = typing.get_type_hints(cls)
        return cls(**{field.name: _decoded(data[field.name], hints[field.name], xp)
                      for field in dataclasses.fields(cls) if field.name in data})

    def to_json(self, **options):
        """`to_dict` as JSON; `options` are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    @classmethod
    def from_json(cls, text, *, xp=np):
        """The object `to_json` was called on; see `from_dict`."""
        return cls.from_dict(json.loads(text), xp=xp)

    def copy(self):
        """A snapshot: the same with arrays of its own."""
        return _mapped(self, _copied)

    def to(self, xp):
        """The same with its arrays on `xp` (numpy or cupy); itself when they are there."""
        there = [isinstance(array, np.ndarray) == (xp is np) for array in _arrays(self)]
        return self if all(there) else _mapped(self, lambda held: moved(held, xp))

    @property
    def nbytes(self):
        """Bytes of all arrays."""
        return sum(array.nbytes for array in _arrays(self))

    def _items(self):
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return _same([value for _, value in self._items()], [value for _, value in other._items()])

    __hash__ = None

    def __repr__(self):
        lines = (f"  {name} : {_shown(value)}\n" for name, value in self._items() if not name.startswith("_"))
        return f"{type(self).__name__}(\n{''.join(lines)})"


class View(Record):
    """What one layer keeps."""

    def concatenate_to_cache(self, *args, **kwargs):
        """Not what this kind of cache does."""
        raise NotImplementedError(f"{type(self).__name__}.concatenate_to_cache: this cache does not keep keys and "
                                  f"values one after another; it has {', '.join(_updates(self))}")


class Cache(Record):
    """The views of all layers; ``cache[i]`` is the view of layer i, or None before it has one."""

    @classmethod
    def init_empty(cls, num_hidden_layers):
        """A cache of `num_hidden_layers` layers that have no view yet."""
        return cls(views=[None] * num_hidden_layers)

    def to_pure(self):
        """What the views hold as plain lists, and the metadata of the last layer.

        Returns
        -------
        pure : list
            For each layer the fields of its view but metadata and layer_index, in order; None for no view. The arrays
            are the views' own.
        metadata : the views' metadata, or None
        """
        pure = [None if view is None else [value for name, value in view._items() if name not in NOT_STATE]
                for view in self.views]
        return pure, next((view.metadata for view in reversed(self.views) if view is not None), None)

    @classmethod
    def from_pure(cls, pure, metadata=None):
        """The cache `to_pure` was called on; layer i gets layer_index i."""
        view = _record_class(typing.get_type_hints(cls)["views"])
        names = [field.name for field in dataclasses.fields(view) if field.name not in NOT_STATE]
        return cls(views=[None if held is None else view(**dict(zip(names, held, strict=True)), metadata=metadata,
                                                         layer_index=layer) for layer, held in enumerate(pure)])

    def clear(self):
        """Let go of all views, and so of their memory; the layers stay, without one. Returns self."""
        self.views = [None] * len(self.views)
        return self

    def view_of(self, layer_idx):
        """The view of a layer; ValueError when it has none."""
        view = self.views[layer_idx]
        if view is None:
            raise ValueError(f"{type(self).__name__}: Cache view for layer {layer_idx} is None")
        return view

    def __getitem__(self, layer):
        return self.views[layer]

    def __setitem__(self, layer, view):
        self.views[layer] = view

    def __len__(self):
        return len(self.views)


# ---- checks the classes share ----------------------------------------------------------------------------

def check_given(owner, **arguments):
    """None of `arguments` was left out: they follow optional ones, so Python does not see to it."""
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{owner}: {name} must be given")


def check_positive(owner, quote="", **sizes):
    """Each is an integer above 0; `quote` goes around its name."""
    for name, size in sizes.items():
        check_number(owner, name, size, integer=True)
        if size <= 0:
            raise ValueError(f"{owner}: {quote}{name}{quote} must be positive, got {size}")


def check_quantizer(owner, quantizer):
    """It is None or the name of a KV format."""
    if quantizer is not None and not (isinstance(quantizer, str) and quantizer in FORMATS):
        raise TypeError(f"{owner}: quantizer must be None or a format of QuantizedKV, {', '.join(FORMATS)}, got "
                        f"{quantizer!r}")


def float_dtype(owner, name, dtype):
    """NumPy's dtype of what ops take; TypeError for any other."""
    try:
        found = dtype_of(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise TypeError(f"{owner}: {name} must be {', '.join(FLOATS)}, got "
                        f"{repr(dtype) if found is None else found.name}")
    return found


def zeros_pool(owner, shape, dtype, quantizer, xp, scale=None):
    """Keys or values [pages, page_size, heads, head_dim] of one layer of any cache: zeros of `dtype`, or a QuantizedKV
    for activations of it, fp8 without a `scale` with one for each token and head."""
    dtype = float_dtype(owner, "dtype", dtype)
    if quantizer is None:
        return xp.zeros(shape, dtype)
    granularity = "token" if scale is None and quantizer.startswith("fp8") else None
    return QuantizedKV.empty(*shape, format=quantizer, dtype=dtype.name, granularity=granularity, scale=scale, xp=xp)


def moved(held, xp):
    """An array or QuantizedKV on `xp` (numpy or cupy)."""
    if isinstance(held, QuantizedKV):
        return held.to(xp)
    return to_host(held) if xp is np else xp.asarray(held)


def is_array(value):
    """Whether it is a NumPy or CuPy array."""
    return isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__")


def one_array(held):
    """One array of what may be a QuantizedKV."""
    return held.codes if isinstance(held, QuantizedKV) else held


def advanced(counts, number):
    """`counts` + `number` as a new array, since several views may hold the old one."""
    counts = counts.copy()
    counts += number
    return counts


# ---- walking through fields ------------------------------------------------------------------------------

def _arrays(value):
    """All arrays below `value`."""
    if isinstance(value, Record):
        value = [held for _, held in value._items()]
    elif isinstance(value, QuantizedKV):
        value = list(value.arrays.values())
    if isinstance(value, list | tuple):
        return [array for held in value for array in _arrays(held)]
    return [value] if is_array(value) else []


def _mapped(value, change):
    """`value` with `change` done to every array and QuantizedKV below it, all else made anew."""
    if isinstance(value, Record):
        return type(value)(**{name: _mapped(held, change) for name, held in value._items()})
    if isinstance(value, list | tuple):
        return type(value)(_mapped(held, change) for held in value)
    return change(value) if is_array(value) or isinstance(value, QuantizedKV) else value


def _copied(array):
    if isinstance(array, QuantizedKV):
        parts = (None if part is None else part.copy() for part in (array.codes, array.scale, array.zero))
        return QuantizedKV(*parts, format=array.format)
    return array.copy()


def _same(a, b):
    """Equality that is one bool for arrays, too."""
    if isinstance(a, QuantizedKV) and isinstance(b, QuantizedKV):
        return a.format == b.format and _same(a.arrays, b.arrays)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if is_array(a) and is_array(b):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and to_host(a).tobytes() == to_host(b).tobytes()
    return not (is_array(a) or is_array(b)) and bool(a == b)


def _shown(value):
    """One line, at most 200 characters."""
    text = f"{value.dtype.name}{list(value.shape)}" if is_array(value) else repr(value)
    return text if len(text) <= 200 and "\n" not in text else f"{type(value).__name__}(...)"


def _updates(view):
    return [name for name in dir(view) if name.startswith(("append_", "update_", "write_"))]


# ---- writing down and reading back -----------------------------------------------------------------------

def _encoded(value, where):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_encoded(held, where) for held in value]
    if isinstance(value, QuantizedKV):
        return {"format": value.format, **{name: _encoded(array, where) for name, array in value.arrays.items()}}
    if is_array(value):
        host = to_host(value)
        host = host if host.dtype.isnative else host.astype(host.dtype.newbyteorder("="))
        text = base64.b64encode(host.tobytes()).decode()
        return {"dtype": host.dtype.name, "shape": list(host.shape), "base64": text}
    if isinstance(value, np.dtype) or isinstance(value, type) and issubclass(value, np.generic):
        return {"dtype": np.dtype(value).name}
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"{where} must be a number, text, dtype, array, a list of these or have a to_dict, got "
                    f"{type(value).__name__}; replace it by None first")


def _decoded(value, hint, xp):
    """`hint` is the type of the field: which class a dict stands for, and whether a list was a tuple."""
    if isinstance(value, list | tuple):
        items = [_decoded(held, hint, xp) for held in value]
        return tuple(items) if tuple in (hint, typing.get_origin(hint)) else items
    if not isinstance(value, dict):
        return value
    if "base64" in value:
        flat = np.frombuffer(base64.b64decode(value["base64"]), dtype_of(value["dtype"]))
        return xp.asarray(flat.reshape(value["shape"]).copy())
    if value.keys() == {"dtype"}:
        return dtype_of(value["dtype"])
    if "codes" in value:
        parts = (_decoded(value.get(name), None, xp) for name in ("codes", "scale", "zero"))
        return QuantizedKV(*parts, format=value["format"])
    record = _record_class(hint)
    return value if record is None else record.from_dict(value, xp=xp)


def _record_class(hint):
    """The Record class in a type hint such as ``list[MambaCacheView | None]``, or None."""
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint
    return next((found for part in typing.get_args(hint) if (found := _record_class(part))), None)
