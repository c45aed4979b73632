# SPDX-License-Identifier: Apache-2.0
"""What QMatrix and QExperts have in common: arrays in the kernels' layout, and where they are."""

import functools
import sys
import types

import numpy as np

from . import packed_file


class Packed:
    """Packed segments of a weight; see `QMatrix` and `QExperts` for what the attributes mean."""

    def __init__(self, format, shape, segments, order=None):
        self.format = format
        self.shape = tuple(int(n) for n in shape)
        self.segments = tuple(segments)
        self.order = order

    def to(self, xp):
        """This weight with its arrays on `xp` (numpy or cupy); itself when it is there."""
        here = self.xp
        if check_module(xp) is here:
            return self
        move = here.asnumpy if xp is np else xp.asarray
        return type(self)(self.format, self.shape, [segment.with_arrays(move) for segment in self.segments],
                          None if self.order is None else move(self.order))

    def save(self, path):
        """Write the packed weight to a .safetensors file that `load` maps into memory.

        Parameters
        ----------
        path : str or Path
        """
        here = self.to(np)
        packed_file.save(path, type(self).__name__, self.format, self.shape, here.segments, here.order)

    @classmethod
    def load(cls, path, *, xp=None):
        """The weight that `save` wrote.

        Parameters
        ----------
        path : str or Path
        xp : module, optional
            numpy, the default: arrays are read-only and mapped, read as they are used; or cupy.

        Raises
        ------
        ValueError
            Not such a file, a damaged one, or one of another version of the layout.
        """
        return cls(*packed_file.load(path, cls.__name__)).to(np if xp is None else xp)

    @property
    def xp(self):
        """numpy or cupy, where the arrays are."""
        return np if isinstance(self.segments[0].codes, np.ndarray) else sys.modules["cupy"]

    @property
    def nbytes(self):
        """Bytes of all arrays, padding included."""
        arrays = [self.order, *(array for segment in self.segments for array in segment.arrays)]
        return sum(array.nbytes for array in arrays if array is not None)

    @functools.cached_property
    def geometry(self):
        """Those of the segments: all that plans depend on."""
        return tuple(segment.geometry for segment in self.segments)

    @functools.cached_property
    def kinds(self):
        """Kinds of the segments' codes."""
        return tuple({segment.form.kind: None for segment in self.segments})

    @property
    def forms(self):
        """(form, columns) of each segment."""
        return [(segment.form, segment.columns) for segment in self.segments]


def check_alike(matrices, kind, *, rows):
    """`matrices` as a list; they must be of class `kind`, of one format, shape (without `rows`: its columns) and order.

    Raises
    ------
    TypeError
        Not a sequence of them, or NumPy and CuPy mixed.
    ValueError
        None, or they differ.
    """
    if isinstance(matrices, kind) or not hasattr(matrices, "__iter__"):
        raise TypeError(f"QMatrix: matrices must be a sequence of QMatrix, got {type(matrices).__name__}")
    matrices = list(matrices)
    wrong = next((m for m in matrices if not isinstance(m, kind)), None)
    if wrong is not None:
        raise TypeError(f"QMatrix: matrices must hold QMatrix only, got {type(wrong).__name__}")
    if not matrices:
        raise ValueError("QMatrix: matrices must hold at least one QMatrix, got none")
    first = matrices[0]
    for m in matrices[1:]:
        if m.xp is not first.xp:
            raise TypeError("QMatrix: matrices must be of one kind, got NumPy and CuPy arrays")
        if (m.format, m.shape[1], m.forms) != (first.format, first.shape[1], first.forms) or (
                rows and m.shape != first.shape):
            raise ValueError(f"QMatrix: matrices must agree in format and {'shape' if rows else 'in_features'}, "
                             f"got {first!r} and {m!r}")
        if m.order is not first.order and (m.order is None or first.order is None or not np.array_equal(
                on_host(m.order), on_host(first.order))):
            raise ValueError(f"QMatrix: matrices must agree in the order of their columns, got {first!r} and {m!r} "
                             "of different orders")
    return matrices


def check_module(xp):
    """`xp`, which must be numpy or cupy."""
    if not isinstance(xp, types.ModuleType) or xp.__name__ not in ("numpy", "cupy"):
        raise TypeError(f"QMatrix: xp must be the module numpy or cupy, got {xp!r}")
    return xp


def cupy_of(array):
    """cupy if `array` is one of its arrays, else None."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else None


def on_host(array):
    """`array`, anything NumPy takes or CuPy's, as NumPy's."""
    return np.asarray(array) if cupy_of(array) is None else array.get()
