# SPDX-License-Identifier: Apache-2.0
"""What stands for an array where only its metadata is looked at."""

import numpy as np


class Known:
    """A CuPy array as checks and plans see it: without contents, and of its address the lowest four bits.

    Stands for the array in the functions of `arrays` and `checks`, in `array_namespace` too, and in `make_args`.

    Attributes
    ----------
    index : int
        Which one of the call's arrays it is.
    ptr : int
        Address modulo 16.
    """

    __slots__ = ("index", "dtype", "shape", "strides", "ptr", "writeable")
    kind = "cupy"

    def __init__(self, index, dtype, shape, strides, ptr=0, writeable=True):
        self.index, self.dtype, self.shape, self.strides = index, dtype, shape, strides
        self.ptr, self.writeable = ptr, writeable

    data = flags = property(lambda self: self)   # of which `ptr`, `writeable` and `c_contiguous` are asked
    ndim = property(lambda self: len(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    size = property(lambda self: int(np.prod(self.shape, dtype=np.int64)))

    @property
    def c_contiguous(self):
        dense = self.itemsize
        for n, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if n != 1 and stride != dense and self.size:
                return False
            dense *= n
        return True

    def __len__(self):
        return self.shape[0]

    def _as(self, dtype, shape, strides):
        """The same memory seen in another way."""
        return type(self)(self.index, dtype, shape, strides, self.ptr, self.writeable)

    def view(self, dtype):
        """With another dtype of the same size."""
        return self._as(np.dtype(dtype), self.shape, self.strides)

    def reshape(self, rows, columns):
        """All axes but the last as one; `as_rows` has found that they have one stride."""
        apart = [stride for n, stride in zip(self.shape[:-1], self.strides[:-1], strict=True) if n != 1]
        return self._as(self.dtype, (rows, columns), (apart[-1] if apart else columns * self.itemsize,
                                                      self.strides[-1]))

    def with_axis(self, at):
        """With an axis of one in front of axis `at`."""
        return self._as(self.dtype, (*self.shape[:at], 1, *self.shape[at:]),
                        (*self.strides[:at], 0, *self.strides[at:]))


class KnownOnHost(Known):
    """A NumPy array likewise."""

    __slots__ = ()
    kind = "numpy"


Known.__name__ = KnownOnHost.__name__ = "ndarray"   # for messages
