# SPDX-License-Identifier: Apache-2.0
"""Ranks that exchange CuPy arrays over NCCL."""

import sys

import numpy as np

from ..runtime.arrays import dtype_name
from ..runtime.capturing import refuse_to_keep
from .communicators import Communicator

_TYPES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT32", "float64": "FLOAT64",
               "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "uint32": "UINT32", "int64": "INT64",
               "uint64": "UINT64"}


class NCCLCommunicator(Communicator):
    """Ranks on GPUs of their own, over CuPy arrays; several in this process, or one in each.

    Made by `local` or `over`. Work goes to the current stream of each rank's GPU, and can be captured in a CUDA graph
    where this process has one rank. CuPy needs NCCL for it, ``pip install nvidia-nccl-cu13`` (or ``-cu12``).

    Parameters
    ----------
    comms : list of cupy.cuda.nccl.NcclCommunicator
        Those of this process.

    Notes
    -----
    Sums are NCCL's, in the arrays' dtype. `all_gather` of arrays of different sizes is a group of broadcasts, `gather`
    one of sends.
    """

    def __init__(self, comms):
        self._nccl, self._comms = _nccl(), list(comms)
        if not self._comms:
            raise ValueError("NCCLCommunicator: comms must hold at least one NcclCommunicator, got none")
        super().__init__(self._comms[0].size(), [comm.rank_id() for comm in self._comms],
                         [comm.device_id() for comm in self._comms])

    @classmethod
    def local(cls, devices):
        """One rank for each of some GPUs, all driven by this process.

        Parameters
        ----------
        devices : sequence of int
            Different GPUs.
        """
        return cls(_nccl().NcclCommunicator.initAll([int(device) for device in devices]))

    @classmethod
    def over(cls, communicator):
        """One rank per process, on its current GPU; the processes find each other over another communicator.

        Parameters
        ----------
        communicator : Communicator
            Of one rank per process and NumPy arrays, say an `MPICommunicator`.
        """
        nccl = _nccl()
        if len(communicator.ranks) != 1 or communicator.devices != ("cpu",):
            raise ValueError("NCCLCommunicator: communicator must have one rank per process and NumPy arrays, got "
                             f"{communicator!r}")
        (rank,) = communicator.ranks
        unique = np.zeros(128, np.uint8)   # NCCL_UNIQUE_ID_BYTES
        if rank == 0:
            unique[:] = np.frombuffer(nccl.get_unique_id(), np.uint8)
        communicator.broadcast([unique])
        return cls([nccl.NcclCommunicator(communicator.size, unique.tobytes(), rank)])

    def _do(self, name, exchange):
        if len(self.ranks) > 1:   # a capture is that of a stream of one GPU
            refuse_to_keep("exchange arrays between GPUs of one process; NCCLCommunicator.over has a process for each")
        super()._do(name, exchange)

    def _all_reduce(self, arrays):
        self._each(lambda i, comm, kind, stream: comm.allReduce(
            arrays[i].data.ptr, arrays[i].data.ptr, arrays[i].size, kind, self._nccl.NCCL_SUM, stream), arrays)

    def _gather(self, arrays, outs, counts, root):
        def pointer(i, rank):
            return outs[i].data.ptr + sum(counts[:rank]) * arrays[i].itemsize

        def same(i, comm, kind, stream):
            comm.allGather(arrays[i].data.ptr, outs[i].data.ptr, counts[0], kind, stream)

        def to_all(i, comm, kind, stream):
            for rank, count in enumerate(counts):
                if count:
                    comm.broadcast(arrays[i].data.ptr if rank == self.ranks[i] else pointer(i, rank), pointer(i, rank),
                                   count, kind, rank, stream)

        def to_root(i, comm, kind, stream):
            if counts[self.ranks[i]]:
                comm.send(arrays[i].data.ptr, counts[self.ranks[i]], kind, root, stream)
            for rank, count in enumerate(counts) if self.ranks[i] == root else ():
                if count:
                    comm.recv(pointer(i, rank), count, kind, rank, stream)

        self._each(to_root if root is not None else same if len(set(counts)) == 1 else to_all, arrays)

    def _broadcast(self, arrays, root):
        self._each(lambda i, comm, kind, stream: comm.broadcast(
            arrays[i].data.ptr, arrays[i].data.ptr, arrays[i].size, kind, root, stream), arrays)

    def _each(self, call, arrays):
        """``call(i, comm, NCCL's dtype, stream)`` for each rank of this process, as one group."""
        name = dtype_name(arrays[0])
        if name not in _TYPES:
            raise TypeError(f"{self._op}: arrays must be {', '.join(_TYPES)}, got {name}")
        kind, cuda = getattr(self._nccl, f"NCCL_{_TYPES[name]}"), sys.modules["cupy"].cuda
        self._nccl.groupStart()
        try:
            for i, (comm, device) in enumerate(zip(self._comms, self.devices, strict=True)):
                with cuda.Device(device):
                    call(i, comm, kind, cuda.get_current_stream().ptr)
        finally:
            self._nccl.groupEnd()


def _nccl():
    import warnings

    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # CuPy's own, about the missing library
        from cupy.cuda import nccl
    if not nccl.available:
        raise RuntimeError("NCCLCommunicator: NCCL must be installed for CuPy; pip install nvidia-nccl-cu13 for CUDA "
                           f"13, nvidia-nccl-cu12 for CUDA 12 (CuPy {cupy.__version__})")
    return nccl
