# SPDX-License-Identifier: Apache-2.0
"""Ranks that exchange arrays: in one process, over MPI with NumPy arrays, or over NCCL with CuPy arrays.

A process drives one rank or several. Every method takes a list with one array per rank of this process, so that the
same program runs all ranks in a loop, or one of them. All ranks call the same methods in the same order; what a
captured step exchanges is exchanged with every replay, so all ranks replay.
"""

import math
import sys

import numpy as np

from ..devices import device_key
from ..runtime.arrays import dtype_name
from ..runtime.checks import check_apart, check_dtype, check_number, check_shape, check_writeable
from ..runtime.launch import run_library
from .rank_lists import check_list, check_place

_SUMMED = ("float16", "bfloat16", "float32", "float64")


class Communicator:
    """Ranks that exchange arrays; the base of `InProcessCommunicator`, `MPICommunicator` and `NCCLCommunicator`.

    Another one supplies `_all_reduce`, `_gather` and `_broadcast`, which get flat arrays that have been checked.

    Attributes
    ----------
    size : int
        Ranks in all.
    ranks : tuple of int
        Those of this process, in the order of the lists that the methods take and return.
    devices : tuple
        Where the arrays of those ranks live: ``"cpu"`` for NumPy, or the number of the GPU for CuPy.
    """

    def __init__(self, size, ranks, devices):
        self.size, self.ranks, self.devices = size, tuple(ranks), tuple(devices)
        if not self.ranks or len(set(self.ranks)) != len(self.ranks) or not set(self.ranks) <= set(range(size)):
            raise ValueError(f"{self._op}: ranks must be different ones of the {size}, at least one, got "
                             f"{list(self.ranks)}")
        if len(self.devices) != len(self.ranks):
            raise ValueError(f"{self._op}: devices must hold one for each of the ranks {list(self.ranks)}, got "
                             f"{list(self.devices)}")

    def all_reduce(self, arrays):
        """Add up the arrays of all ranks, in place.

        Parameters
        ----------
        arrays : list of ndarray, float16, bfloat16, float32 or float64
            Of one shape, C-contiguous. Each becomes the sum, the same bits on every rank.

        Returns
        -------
        list of ndarray
            `arrays`.
        """
        self._check(arrays)
        for array in arrays:
            check_dtype(self._op, "arrays", array, _SUMMED)
            check_writeable(self._op, "arrays", array)
        check_apart(self._op, _named("arrays", arrays))
        if arrays[0].size:
            self._do("all_reduce", lambda: self._all_reduce([array.reshape(-1) for array in arrays]))
        return arrays

    def all_gather(self, arrays, axis=0, *, sizes=None, out=None):
        """Join the arrays of all ranks along an axis, on every rank.

        Parameters
        ----------
        arrays : list of ndarray
            C-contiguous; of one shape but for `axis`.
        axis : int
        sizes : sequence of int, optional
            Length of every rank's array along `axis`. Default: all the same.
        out : list of ndarray, optional
            Where to write, C-contiguous. Default: new arrays.

        Returns
        -------
        list of ndarray
            One for each rank of this process.
        """
        return self._join(arrays, axis, sizes, out, None)

    def gather(self, arrays, axis=0, root=0, *, sizes=None, out=None):
        """Join the arrays of all ranks along an axis, on one rank.

        Parameters
        ----------
        arrays, axis, sizes
            See `all_gather`.
        root : int
            The rank that gets the result.
        out : ndarray, optional
            Where that rank writes, C-contiguous. Default: a new array.

        Returns
        -------
        ndarray or None
            None in a process without that rank.
        """
        self._check_root(root)
        outs = self._join(arrays, axis, sizes, None if out is None else
                          [out if rank == root else None for rank in self.ranks], root)
        return outs[self.ranks.index(root)] if root in self.ranks else None

    def broadcast(self, arrays, root=0):
        """Copy the array of one rank to all, in place.

        Parameters
        ----------
        arrays : list of ndarray
            Of one shape and dtype, C-contiguous. Those of the other ranks are written.
        root : int

        Returns
        -------
        list of ndarray
            `arrays`.
        """
        self._check(arrays)
        self._check_root(root)
        for array, rank in zip(arrays, self.ranks, strict=True):
            if rank != root:
                check_writeable(self._op, "arrays", array)
        check_apart(self._op, _named("arrays", arrays))
        if arrays[0].size:
            self._do("broadcast", lambda: self._broadcast([array.reshape(-1) for array in arrays], root))
        return arrays

    # ---- checks and shapes -----------------------------------------------------------------------------

    @property
    def _op(self):
        return type(self).__name__

    def _check(self, arrays, free_axis=None):
        """One array for each rank of this process, C-contiguous, alike, and where the rank has its arrays."""
        check_list(self._op, "arrays", arrays, self.ranks)
        shape = list(arrays[0].shape) if hasattr(arrays[0], "shape") else None
        for array, device in zip(arrays, self.devices, strict=True):
            check_place(self._op, "arrays", array, device)
            check_dtype(self._op, "arrays", array, dtype_name(arrays[0]))
            expected = list(shape)
            if free_axis is not None and array.ndim == len(shape):
                expected[free_axis] = array.shape[free_axis]
            check_shape(self._op, "arrays", array, tuple(expected), "alike on every rank")
            if not array.flags.c_contiguous:
                raise ValueError(f"{self._op}: arrays must be C-contiguous, got strides {array.strides} for shape "
                                 f"{list(array.shape)}")

    def _check_root(self, root):
        check_number(self._op, "root", root, least=0, integer=True)
        if root >= self.size:
            raise ValueError(f"{self._op}: root must be below size {self.size}, got {root}")

    def _join(self, arrays, axis, sizes, out, root):
        """See `all_gather` and `gather`; None in place of the result of a rank that gets none."""
        ndim = getattr(arrays[0], "ndim", None) if isinstance(arrays, list | tuple) and arrays else None
        check_number(self._op, "axis", axis, integer=True)
        if ndim is not None and not -ndim <= axis < ndim:
            raise ValueError(f"{self._op}: axis must be one of the {ndim} of the arrays, got {axis}")
        self._check(arrays, axis)
        axis %= ndim
        before, after = arrays[0].shape[:axis], arrays[0].shape[axis + 1:]
        sizes = self._sizes(sizes, [array.shape[axis] for array in arrays])
        starts = [sum(sizes[:n]) for n in range(self.size + 1)]
        shape, row = (*before, starts[-1], *after), math.prod((*before, *after))
        outs = self._outs(arrays, out, shape, root)
        if starts[-1] * row == 0:
            return outs
        in_order = math.prod(before) == 1   # what one rank sends is one run of the result
        flat = [o if o is None else o.reshape(-1) if in_order else self._empty(i, (starts[-1] * row,), o)
                for i, o in enumerate(outs)]

        def exchange():
            self._gather([array.reshape(-1) for array in arrays], flat, [n * row for n in sizes], root)
            if not in_order:
                for o, parts in zip(outs, flat, strict=True):
                    for start, stop in zip(starts, starts[1:], strict=False) if o is not None else ():
                        place = (slice(None),) * axis + (slice(start, stop),)
                        o[place] = parts[start * row:stop * row].reshape(*before, stop - start, *after)

        self._do("all_gather" if root is None else "gather", exchange)
        return outs

    def _sizes(self, sizes, mine):
        """Length of every rank's array, `mine` of those here; by default all the same."""
        if sizes is None:
            return [mine[0]] * self.size
        sizes = list(sizes)
        for size in sizes:
            check_number(self._op, "sizes", size, least=0, integer=True)
        if len(sizes) != self.size or [sizes[rank] for rank in self.ranks] != mine:
            raise ValueError(f"{self._op}: sizes must hold {mine} for the ranks {list(self.ranks)} of {self.size}, got "
                             f"{sizes}")
        return [int(size) for size in sizes]

    def _outs(self, arrays, given, shape, root):
        """Where the ranks' results go, None for a rank that gets none."""
        outs = [None] * len(arrays)
        if given is not None:
            check_list(self._op, "out", given, self.ranks)
            outs = [out if root in (None, rank) else None for out, rank in zip(given, self.ranks, strict=True)]
        for i, out in enumerate(outs):
            if out is None:
                continue
            check_place(self._op, "out", out, self.devices[i])
            check_dtype(self._op, "out", out, dtype_name(arrays[0]))
            check_shape(self._op, "out", out, shape, "all ranks' arrays side by side")
            check_writeable(self._op, "out", out)
            if not out.flags.c_contiguous:
                raise ValueError(f"{self._op}: out must be C-contiguous, got strides {out.strides} for shape "
                                 f"{list(out.shape)}")
        check_apart(self._op, _named("out", [out for out in outs if out is not None]), _named("arrays", arrays))
        return [self._empty(i, shape, arrays[i]) if out is None and root in (None, rank) else out
                for i, (out, rank) in enumerate(zip(outs, self.ranks, strict=True))]

    def _do(self, name, exchange):
        """Now, or whenever what is captured now is replayed."""
        run_library(name, "cpu" if self.devices[0] == "cpu" else "gpu", exchange)

    def _empty(self, i, shape, like):
        """A new array of rank `ranks[i]`."""
        if self.devices[i] == "cpu":
            return np.empty(shape, like.dtype)
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(self.devices[i]):
            return cupy.empty(shape, like.dtype)

    def __repr__(self):
        return f"{self._op}(size={self.size}, ranks={list(self.ranks)}, devices={list(self.devices)})"


def _named(name, arrays):
    return [(f"{name}[{n}]", array) for n, array in enumerate(arrays)]


def _sum_in_order(parts):
    """Sum of flat arrays in the order of the ranks, in float32, or float64 if they are."""
    total = parts[0].astype(np.float64 if parts[0].dtype == np.float64 else np.float32)
    for part in parts[1:]:
        total += part
    return total


class InProcessCommunicator(Communicator):
    """All ranks in this process, over arrays of one device.

    Parameters
    ----------
    size : int
        Ranks.
    device : None, "cpu" or int
        None and ``"cpu"`` for NumPy arrays, an int for CuPy on that GPU. Several GPUs need `NCCLCommunicator`.

    Notes
    -----
    Sums are float32 (float64 of float64), in the order of the ranks, and rounded once.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> ranks = cupyattn.InProcessCommunicator(2)
    >>> ranks.all_gather([np.array([[1], [2]]), np.array([[3], [4]])], axis=1)[0]
    array([[1, 3],
           [2, 4]])
    """

    def __init__(self, size, *, device=None):
        check_number("InProcessCommunicator", "size", size, least=1, integer=True)
        super().__init__(size, range(size), (device_key("InProcessCommunicator", device),) * size)

    def _all_reduce(self, arrays):
        total = _sum_in_order(arrays)
        for array in arrays:
            array[...] = total

    def _gather(self, arrays, outs, counts, root):
        for out in outs:
            start = 0
            for array, count in zip(arrays, counts, strict=True) if out is not None else ():
                out[start:start + count] = array
                start += count

    def _broadcast(self, arrays, root):
        for rank, array in enumerate(arrays):
            if rank != root:
                array[...] = arrays[root]


class MPICommunicator(Communicator):
    """One rank per MPI process, over NumPy arrays: ``mpiexec -n 2 python program.py``.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        Default ``MPI.COMM_WORLD``.

    Raises
    ------
    RuntimeError
        mpi4py or the MPI library is missing; ``pip install 'cupyattn[mpi]'`` has both.

    Notes
    -----
    Sums are those of `InProcessCommunicator`, bit for bit: every rank gets all arrays and adds them in the order of
    the ranks, as MPI knows no 16-bit floats and promises no order.
    """

    def __init__(self, comm=None):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:   # RuntimeError: the library itself cannot be loaded
            raise RuntimeError("MPICommunicator: mpi4py and an MPI library must be installed; "
                               f"pip install 'cupyattn[mpi]' ({error})") from error
        self._mpi, self._comm = MPI, MPI.COMM_WORLD if comm is None else comm
        super().__init__(self._comm.Get_size(), [self._comm.Get_rank()], ["cpu"])

    def _all_reduce(self, arrays):
        (array,) = arrays
        parts = np.empty((self.size, array.size), array.dtype)
        self._comm.Allgather(self._bytes(array), self._bytes(parts))
        array[...] = _sum_in_order(parts)

    def _gather(self, arrays, outs, counts, root):
        (array,), (out,) = arrays, outs
        lengths = [count * array.itemsize for count in counts]
        received = None if out is None else [out.view(np.uint8), lengths, self._mpi.BYTE]
        if root is None:
            self._comm.Allgatherv(self._bytes(array), received)
        else:
            self._comm.Gatherv(self._bytes(array), received, root)

    def _broadcast(self, arrays, root):
        self._comm.Bcast(self._bytes(arrays[0]), root)

    def _bytes(self, array):
        return [array.view(np.uint8), self._mpi.BYTE]
