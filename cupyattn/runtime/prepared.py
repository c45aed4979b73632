# SPDX-License-Identifier: Apache-2.0
"""Calls that are checked and planned once for all arrays alike, by what an op may know of them before it launches."""

import struct as packing

import numpy as np

from . import cuda
from .arrays import kind_of
from .known import Known, KnownOnHost
from .launch import launch
from .structs import Args, address

_MOST = 512   # calls of different kinds


class Prepared:
    """A function of what arrays are, called once for all that are alike.

    Parameters
    ----------
    prepare : callable
        ``prepare(*arrays, *options)`` gets a `Known` for each array, and for an object that holds arrays a copy that
        holds Known ones. It may look at nothing else that changes but, for arrays on a GPU, the current device. What it
        raises is not remembered.

    Notes
    -----
    Nothing that is remembered holds an array. Options are told apart by type, too: ``eps=True`` is not ``eps=1``. An
    object that holds arrays names their attributes in ``PARTS``, tells by its ``signature`` all else that matters, and
    makes the like of itself ``with_parts(*parts)``.
    """

    def __init__(self, prepare):
        self._prepare, self._remembered = prepare, {}

    def __call__(self, arrays, *options):
        """(What `prepare` returns for `arrays` and `options`, the arrays one by one, their addresses)."""
        facts, flat, addresses = [], [], []
        try:
            on_device = _look_at(arrays, facts, flat, addresses)
            key = (*facts, on_device and cuda.arch(), *options, *map(type, options))
            found = self._remembered.get(key)
        except (AttributeError, TypeError):   # no array, or an option that is no number: `prepare` says which
            return self._prepare(*_known(arrays, []), *options), flat, addresses
        if found is None:
            found = self._prepare(*_known(arrays, []), *options)
            if len(self._remembered) >= _MOST:
                self._remembered.clear()
            self._remembered[key] = found
        return found, flat, addresses

    def launch(self, arrays, *options):
        """Launch the Template that `prepare` returns for `arrays` and `options`; None is nothing to launch."""
        template, flat, addresses = self(arrays, *options)
        if template is not None:
            template.launch(flat, addresses)


def _look_at(arrays, facts, flat, addresses):
    """Appends what makes `arrays` alike, and all arrays and their addresses; whether some are on a GPU."""
    on_device = False
    for array in arrays:
        if isinstance(array, np.ndarray):
            where = address(array)
            facts.append((type(array), array.dtype, array.shape, array.strides, where & 15, array.flags.writeable))
        elif array is None:
            where = 0
            facts.append(None)
        elif hasattr(array, "PARTS"):
            facts.append((type(array), array.signature))
            on_device |= _look_at([getattr(array, part) for part in array.PARTS], facts, flat, addresses)
            continue
        else:
            where, on_device = array.data.ptr, True
            facts.append((type(array), array.dtype, array.shape, array.strides, where & 15, True))
        flat.append(array)
        addresses.append(where)
    return on_device


def _known(arrays, seen):
    """`arrays` as `prepare` gets them; `seen` counts arrays. What is no array stays what it is."""
    found = []
    for array in arrays:
        if hasattr(array, "PARTS"):
            array = array.with_parts(*_known([getattr(array, part) for part in array.PARTS], seen))
        else:
            if isinstance(array, np.ndarray):
                array = KnownOnHost(len(seen), array.dtype, array.shape, array.strides, address(array) & 15,
                                    array.flags.writeable)
            elif kind_of(array) == "cupy":
                array = Known(len(seen), array.dtype, array.shape, array.strides, array.data.ptr & 15, True)
            seen.append(None)
        found.append(array)
    return found


class Template:
    """A launch whose addresses are still to come.

    Parameters
    ----------
    plan : Plan
    args : Args
        From `make_args` of Known arrays.
    """

    __slots__ = ("plan", "_struct", "_words", "_packer", "_places", "_leaves")

    def __init__(self, plan, args):
        self.plan, self._struct = plan, args.struct
        self._packer = packing.Struct(f"<{len(args.data) // 8}Q")
        self._words = self._packer.unpack(args.data)
        self._places = tuple((args.struct.offset(leaf) // 8, known.index) for leaf, known in args.arrays)
        self._leaves = tuple((leaf, known.index) for leaf, known in args.arrays)

    def args(self, arrays, addresses):
        """Args for the `arrays` of a call and their addresses, as `Prepared` gives them."""
        words = list(self._words)
        for place, index in self._places:
            words[place] = addresses[index]
        return Args(self._struct, self._packer.pack(*words), [(leaf, arrays[index]) for leaf, index in self._leaves])

    def launch(self, arrays, addresses, **buffers):
        launch(self.plan, self.args(arrays, addresses), **buffers)
