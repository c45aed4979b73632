# SPDX-License-Identifier: Apache-2.0
"""cupy.cuda.nccl without NCCL, beside the CuPy stand-in: what every rank asks for is checked, then done.

A group of calls is done once all ranks have sent theirs, in threads of their own or all in one. It fails where NCCL
would hang or write nonsense: ranks that call different things, other counts, dtypes or roots, buffers that are too
small, a stream or GPU that is not the current one.
"""

import collections
import contextlib
import ctypes
import sys
import threading
from unittest import mock

import cupy
import numpy as np
import standin_device as device
from compare import dtype_of

available = True
NCCL_SUM = 0
PATIENCE = 60         # seconds until a group that waits for other ranks counts as hanging
_TYPES = {"NCCL_INT8": (0, "int8"), "NCCL_UINT8": (1, "uint8"), "NCCL_INT32": (2, "int32"),
          "NCCL_UINT32": (3, "uint32"), "NCCL_INT64": (4, "int64"), "NCCL_UINT64": (5, "uint64"),
          "NCCL_FLOAT16": (6, "float16"), "NCCL_FLOAT32": (7, "float32"), "NCCL_FLOAT64": (8, "float64"),
          "NCCL_BFLOAT16": (9, "bfloat16")}
globals().update({name: number for name, (number, _) in _TYPES.items()})
_DTYPES = {number: name for number, name in _TYPES.values()}

log = []               # (rank, call, count, dtype, root, stream) of every call, in the order they were made
_worlds = {}           # unique id: World
_group = threading.local()


class Call(collections.namedtuple("Call", "kind send receive count dtype root stream")):
    """One call of one rank; `root` is the peer of a send or a receive."""

    def same_as(self, other):
        return (self.kind, self.count, self.dtype, self.root) == (other.kind, other.count, other.dtype, other.root)

    def array(self, pointer, count=None):
        size = (self.count if count is None else count) * self.dtype.itemsize
        if not any(b.address <= pointer and pointer + size <= b.address + b.bytes.size
                   for b in device.state.memory.values()):
            raise device.error(f"{self.kind} of {size} bytes does not lie in one allocation")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), self.dtype)


class World:
    """The ranks of one unique id."""

    def __init__(self, size):
        self.size, self.calls, self.done, self.lock = size, {}, 0, threading.Condition()

    def end(self, calls):
        """Take the calls of some ranks; wait until all have come and are done."""
        with self.lock:
            self.calls.update(calls)
            turn = self.done
            if len(self.calls) == self.size:
                ranks, self.calls = [self.calls[r] for r in range(self.size)], {}
                self.done += 1
                self.lock.notify_all()
                device.enqueue(lambda: self.do(ranks))
            elif not self.lock.wait_for(lambda: self.done > turn, timeout=PATIENCE):
                raise device.error(f"NCCL hangs: of {self.size} ranks only {sorted(self.calls)} called")

    def do(self, ranks):
        sent = {}
        queues = [list(calls) for calls in ranks]
        for rank, calls in enumerate(queues):
            for call in [c for c in calls if c.kind == "send"]:
                sent.setdefault((rank, call.root), []).append(call)
                calls.remove(call)
        for rank, calls in enumerate(queues):
            for call in [c for c in calls if c.kind == "recv"]:
                came = sent.get((call.root, rank))
                if not came or (came[0].count, came[0].dtype) != (call.count, call.dtype):
                    raise device.error(f"rank {rank} receives {call}, which rank {call.root} does not send")
                call.array(call.receive)[...] = call.array(came.pop(0).send).copy()
                calls.remove(call)
        if any(sent.values()):
            raise device.error(f"sent and never received: {sent}")
        if len({len(calls) for calls in queues}) > 1:
            raise device.error(f"NCCL hangs: ranks make {[len(calls) for calls in queues]} calls")
        for calls in zip(*queues, strict=True):
            if not all(call.same_as(calls[0]) for call in calls):
                raise device.error(f"NCCL hangs: ranks call {calls}")
            getattr(self, calls[0].kind)(calls)

    def allReduce(self, calls):
        total = sum(call.array(call.send).astype(np.float64) for call in calls)
        for call in calls:
            call.array(call.receive)[...] = total.astype(call.dtype)

    def allGather(self, calls):
        parts = [call.array(call.send).copy() for call in calls]
        for call in calls:
            call.array(call.receive, call.count * len(calls))[...] = np.concatenate(parts)

    def broadcast(self, calls):
        root = calls[calls[0].root]
        part = root.array(root.send).copy()
        for call in calls:
            call.array(call.receive)[...] = part


def groupStart():
    assert not hasattr(_group, "calls"), "groups are not nested here"
    _group.calls = {}


def groupEnd():
    calls, world = _group.calls, getattr(_group, "world", None)
    del _group.calls
    if calls:
        world.end(calls)


def get_unique_id():
    return bytes([len(_worlds) + 1]) * 128


class NcclCommunicator:
    """cupy.cuda.nccl.NcclCommunicator."""

    def __init__(self, ndev, commId, rank):
        assert isinstance(commId, bytes) and len(commId) == 128 and any(commId) and 0 <= rank < ndev
        self._world = _worlds.setdefault(commId, World(ndev))
        self._rank, self._device = rank, device.runtime_getDevice()

    @staticmethod
    def initAll(devices):
        assert isinstance(devices, list) and len(set(devices)) == len(devices)
        comms, unique = [], get_unique_id()
        for rank, number in enumerate(devices):
            with device.Device(number):
                comms.append(NcclCommunicator(len(devices), unique, rank))
        return comms

    def size(self):
        return self._world.size

    def rank_id(self):
        return self._rank

    def device_id(self):
        return self._device

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        assert op == NCCL_SUM
        self._call("allReduce", sendbuf, recvbuf, count, datatype, None, stream)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self._call("allGather", sendbuf, recvbuf, count, datatype, None, stream)

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self._call("broadcast", sendbuff, recvbuff, count, datatype, root, stream)

    def send(self, sendbuf, count, datatype, peer, stream):
        self._call("send", sendbuf, None, count, datatype, peer, stream)

    def recv(self, recvbuf, count, datatype, peer, stream):
        self._call("recv", None, recvbuf, count, datatype, peer, stream)

    def _call(self, kind, send, receive, count, datatype, root, stream):
        assert count > 0 and (root is None or 0 <= root < self.size())
        if device.runtime_getDevice() != self._device:
            raise device.error(f"rank {self._rank} is on GPU {self._device}, current is {device.runtime_getDevice()}")
        if stream != device.get_current_stream().ptr:
            raise device.error(f"{kind} on stream {stream}, current is {device.get_current_stream().ptr}")
        call = Call(kind, send, receive, count, np.dtype(dtype_of(_DTYPES[datatype])), root, stream)
        log.append((self._rank, kind, count, call.dtype.name, root, stream))
        _group.world = self._world
        _group.calls.setdefault(self._rank, []).append(call)


@contextlib.contextmanager
def install():
    """Put this module in the place of cupy.cuda.nccl inside a ``with`` block; the CuPy stand-in must be installed."""
    log.clear()
    _worlds.clear()
    module = sys.modules[__name__]
    with mock.patch.dict(sys.modules, {"cupy.cuda.nccl": module}), \
            mock.patch.object(cupy.cuda, "nccl", module, create=True):
        yield log
