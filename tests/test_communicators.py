# SPDX-License-Identifier: Apache-2.0
"""Communicators: in one process, over MPI in several, over NCCL's stand-in."""

import threading
import warnings

import numpy as np
import pytest
import standin_nccl
from compare import assert_same_bits
from mpi_ranks import collectives, parts, run
from standin import install

from cupyattn import CaptureError, Communicator, InProcessCommunicator, MPICommunicator, NCCLCommunicator
from cupyattn.graphs import capture
from cupyattn.runtime.checks import check_apart


@pytest.mark.parametrize("size", [1, 2, 3])
def test_in_one_process(size):
    results = collectives(InProcessCommunicator(size), None)
    for name in ("float16", "float32", "float64", "int32"):
        arrays = parts(size, name)
        for result in results:
            assert_same_bits(result[f"all_gather {name}"], np.concatenate(arrays, axis=1))
            assert_same_bits(result[f"gather {name}"], np.concatenate(arrays, axis=1))
            assert_same_bits(result[f"even {name}"], np.concatenate([a[:, :2] for a in arrays]))
            assert_same_bits(result[f"broadcast {name}"], arrays[-1][:, :2].copy())
            if name != "int32":
                total = sum(a[:, :2].astype(np.float64) for a in arrays)
                np.testing.assert_allclose(result[f"all_reduce {name}"], total, rtol=2.0**-10, atol=0.2)
                assert_same_bits(result[f"all_reduce {name}"], results[0][f"all_reduce {name}"])


@pytest.mark.parametrize("size", [2, 3])
def test_over_mpi(tmp_path, size):
    """The very bits of ranks in one process."""
    found = run("collectives", size, tmp_path)
    for mine, other in zip(found, collectives(InProcessCommunicator(size), None), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_same_bits(mine[name], other[name])


def test_sums_are_rounded_once():
    """1 + 2^-11 + 2^-11 is 1 if every sum is rounded to float16."""
    arrays = [np.float16([1]), np.float16([2.0**-11]), np.float16([2.0**-11])]
    for array in InProcessCommunicator(3).all_reduce(arrays):
        assert array == np.float16(1 + 2.0**-10)


def test_on_the_device(xp):
    communicator = InProcessCommunicator(3, device=None if xp.name == "numpy" else 0)
    arrays = parts(3, np.float32)
    found = communicator.all_gather([xp.array(a) for a in arrays], axis=1, sizes=[2, 3, 4])
    even = [np.ascontiguousarray(a[:, :2]) for a in arrays]
    sums = communicator.all_reduce([xp.array(a) for a in even])
    copies = communicator.broadcast([xp.array(a) for a in even], root=1)
    one = communicator.gather([xp.array(a) for a in even], root=2)
    for rank in range(3):
        assert_same_bits(xp.numpy(found[rank]), np.concatenate(arrays, axis=1))
        assert_same_bits(xp.numpy(sums[rank]), even[0] + even[1] + even[2])
        assert_same_bits(xp.numpy(copies[rank]), even[1])
    assert_same_bits(xp.numpy(one), np.concatenate(even))


def test_out_is_written():
    communicator = InProcessCommunicator(2)
    arrays = [np.ones((2, 3)), np.zeros((2, 3))]
    for axis, shape in ((0, (4, 3)), (1, (2, 6))):
        out = [np.full(shape, np.nan) for _ in range(2)]
        found = communicator.all_gather(arrays, axis, out=out)
        assert found[0] is out[0] and found[1] is out[1]
        assert_same_bits(out[1], np.concatenate(arrays, axis))
        assert communicator.gather(arrays, axis, root=1, out=out[0]) is out[0]
    empty = communicator.all_gather([np.ones((0, 3)), np.ones((0, 3))], 1)
    assert empty[0].shape == (0, 6)
    some = communicator.all_gather([np.ones((2, 0)), np.ones((2, 1))], 1, sizes=(0, 1))
    assert some[0].tolist() == [[1], [1]]


# ---- NCCL -------------------------------------------------------------------------------------------------

@pytest.fixture
def three_gpus():
    with install(devices=3) as arrays, standin_nccl.install() as log:
        yield arrays, log


def _on(arrays, values):
    """A CuPy array on GPU i for the i-th value."""
    import cupy

    made = []
    for device, value in enumerate(values):
        with cupy.cuda.Device(device):
            made.append(arrays.array(value))
    return made


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "int32", "uint8", "int64"])
def test_nccl_in_one_process(three_gpus, name):
    """One process drives three GPUs: each gets what an in-process communicator gives."""
    from compare import dtype_of

    xp, log = three_gpus
    nccl, plain = NCCLCommunicator.local([0, 1, 2]), InProcessCommunicator(3)
    assert (nccl.size, nccl.ranks, nccl.devices) == (3, (0, 1, 2), (0, 1, 2))
    arrays = parts(3, dtype_of(name))
    even = [np.ascontiguousarray(a[:, :2]) for a in arrays]

    def check(found, expected, calls):
        assert [xp.numpy(f).tobytes() for f in found] == [e.tobytes() for e in expected]
        assert sorted(log) == sorted((rank, kind, count, name, root, 0) for rank in range(3)
                                     for kind, count, root in calls)
        log.clear()

    for axis in (0, 1):
        check(nccl.all_gather(_on(xp, even), axis), plain.all_gather(even, axis), [("allGather", 30, None)])
    check(nccl.all_gather(_on(xp, arrays), 1, sizes=[2, 3, 4]), plain.all_gather(arrays, 1, sizes=[2, 3, 4]),
          [("broadcast", 30, 0), ("broadcast", 45, 1), ("broadcast", 60, 2)])
    check(nccl.broadcast(_on(xp, even), 2), [even[2]] * 3, [("broadcast", 30, 2)])
    if np.dtype(even[0].dtype).kind != "i" and name != "uint8":
        (close, *_), sums = map(xp.numpy, nccl.all_reduce(_on(xp, even))), plain.all_reduce([a.copy() for a in even])
        np.testing.assert_allclose(close.astype(np.float64), sums[0].astype(np.float64), rtol=2.0**-7)
        assert {entry[1:] for entry in log} == {("allReduce", 30, name, None, 0)} and len(log) == 3
        log.clear()
    assert_same_bits(xp.numpy(nccl.gather(_on(xp, arrays), 1, root=1, sizes=[2, 3, 4])), np.concatenate(arrays, 1))
    assert sorted((entry[:3], entry[4]) for entry in log) == [
        ((0, "send", 30), 1), ((1, "recv", 30), 0), ((1, "recv", 45), 1), ((1, "recv", 60), 2), ((1, "send", 45), 1),
        ((2, "send", 60), 1)]


def test_nccl_uses_the_current_stream(three_gpus):
    import cupy

    xp, log = three_gpus
    nccl, stream = NCCLCommunicator.local([0, 1]), cupy.cuda.Stream(non_blocking=True)
    with stream:
        nccl.all_reduce(_on(xp, [np.float32([1, 2]), np.float32([3, 4])]))
    assert {entry[-1] for entry in log} == {stream.ptr} != {0}


def test_captured_exchanges(three_gpus):
    """A process with one rank; with several, whose GPUs have streams of their own, a capture is refused."""
    xp, _ = three_gpus
    one = NCCLCommunicator.local([0])
    source, out = xp.array(np.float32([[1, 2]])), xp.array(np.zeros((1, 2), np.float32))
    graph = capture(lambda: one.all_gather([source], 1, out=[out]), xp=xp.module)
    source.set(np.float32([[3, 4]]))
    graph.replay()
    assert xp.numpy(out).tolist() == [[3, 4]]
    two, arrays = NCCLCommunicator.local([0, 1]), _on(xp, [np.ones(2, np.float32)] * 2)
    with pytest.raises(CaptureError, match="must not exchange arrays between GPUs of one process"):
        capture(lambda: two.all_reduce(arrays), xp=xp.module)


@pytest.mark.gpu
def test_nccl_on_one_gpu():
    """A single rank, as far as one GPU goes; without the library, how to get it."""
    import cupy

    if not _library_found():
        with pytest.raises(RuntimeError, match="pip install nvidia-nccl-cu13"):
            NCCLCommunicator.local([0])
        return
    for nccl in (NCCLCommunicator.local([0]), NCCLCommunicator.over(InProcessCommunicator(1))):
        arrays = [cupy.asarray(parts(1, np.float32)[0])]
        whole = nccl.all_gather(arrays, 1)[0]
        assert_same_bits(nccl.all_reduce([arrays[0].copy()])[0].get(), arrays[0].get())
        assert_same_bits(nccl.broadcast([arrays[0].copy()])[0].get(), arrays[0].get())
        assert_same_bits(whole.get(), arrays[0].get())
        assert_same_bits(nccl.gather(arrays, 1).get(), arrays[0].get())


def _library_found():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl.available


class Threads(Communicator):
    """Ranks in threads of one process: what it takes to write another communicator."""

    def __init__(self, rank, shared, barrier):
        super().__init__(barrier.parties, [rank], ["cpu"])
        self._shared, self._barrier = shared, barrier

    def _broadcast(self, arrays, root):
        if self.ranks == (root,):
            self._shared[0] = arrays[0]
        self._barrier.wait(60)
        arrays[0][:] = self._shared[0]
        self._barrier.wait(60)


def test_nccl_with_one_process_per_rank(three_gpus):
    """The processes, here threads, find each other over another communicator; each has its own GPU."""
    import cupy

    xp, _ = three_gpus
    shared, barrier, found = [None], threading.Barrier(3), {}

    def process(rank):
        cupy.cuda.set_allocator(standin_nccl.device.allocate)
        cupy.cuda.Device(rank).use()
        nccl = NCCLCommunicator.over(Threads(rank, shared, barrier))
        assert (nccl.ranks, nccl.devices, nccl.size) == ((rank,), (rank,), 3)
        sizes = [2, 3, 4]
        (whole,) = nccl.all_gather([xp.array(parts(3, np.float16)[rank])], 1, sizes=sizes)
        (total,) = nccl.all_reduce([xp.array(np.float32([rank, 1]))])
        found[rank] = xp.numpy(whole), xp.numpy(total).tolist()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        assert_same_bits(found[rank][0], np.concatenate(parts(3, np.float16), 1))
        assert found[rank][1] == [3, 3]


def test_what_the_nccl_stand_in_refuses(three_gpus, monkeypatch):
    """It fails where NCCL would hang, or read and write past an array."""
    xp, _ = three_gpus
    a, b = standin_nccl.NcclCommunicator.initAll([0, 1])
    one, two = _on(xp, [np.zeros(4, np.float32), np.zeros(4, np.float32)])

    def group(*calls):
        standin_nccl.groupStart()
        try:
            for device, call in enumerate(calls):
                with standin_nccl.device.Device(device):
                    call()
        finally:
            standin_nccl.groupEnd()

    def reduce(comm, array, count=4, dtype=standin_nccl.NCCL_FLOAT32, stream=0):
        return lambda: comm.allReduce(array.data.ptr, array.data.ptr, count, dtype, 0, stream)

    group(reduce(a, one), reduce(b, two))
    for other in (reduce(b, two, 3), reduce(b, two, 4, standin_nccl.NCCL_INT32)):
        with pytest.raises(RuntimeError, match="NCCL hangs"):
            group(reduce(a, one), other)
    monkeypatch.setattr(standin_nccl, "PATIENCE", 0.1)
    with pytest.raises(RuntimeError, match=r"NCCL hangs: of 2 ranks only \[0\] called"):
        group(reduce(a, one))
    with pytest.raises(RuntimeError, match="does not lie in one allocation"):
        group(reduce(a, one, 500), reduce(b, two, 500))
    with pytest.raises(RuntimeError, match="current is 0"):
        group(reduce(a, one, stream=7))
    with pytest.raises(RuntimeError, match="is on GPU 1, current is 0"):
        group(reduce(b, two))


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda c: c.all_reduce([np.ones(2)]), ValueError, "a list of one for each of the ranks .0, 1., got 1"),
    (lambda c: c.all_reduce(np.ones(2)), ValueError, "got ndarray"),
    (lambda c: c.all_reduce([np.ones(2), np.ones(3)]), ValueError, "arrays must be alike on every rank"),
    (lambda c: c.all_reduce([np.ones(2), np.ones(2, np.float32)]), TypeError, "arrays must be float64, got float32"),
    (lambda c: c.all_reduce([np.ones(2, int)] * 2), TypeError, "arrays must be float16 or"),
    (lambda c: c.all_reduce([np.ones((4, 4)).T[:2]] * 2), ValueError, "must be C-contiguous"),
    (lambda c: c.all_reduce([[1], [2]]), TypeError, "arrays must be a NumPy or CuPy array, got list"),
    (lambda c: c.all_reduce([np.broadcast_to(np.ones(1), (1,))] * 2), ValueError, "must be writeable"),
    (lambda c: c.broadcast([np.ones(2)] * 2, root=2), ValueError, "root must be below size 2, got 2"),
    (lambda c: c.gather([np.ones(2)] * 2, root=-1), ValueError, "root must be"),
    (lambda c: c.all_gather([np.ones(2)] * 2, axis=1), ValueError, "axis must be one of the 1 of the arrays, got 1"),
    (lambda c: c.all_gather([np.ones(2)] * 2, sizes=[2, 3]), ValueError, r"sizes must hold \[2, 2\] for the ranks"),
    (lambda c: c.all_gather([np.ones(2)] * 2, sizes=[4]), ValueError, "sizes must hold"),
    (lambda c: c.all_gather([np.ones(2)] * 2, out=[np.ones(4), np.ones(3)]), ValueError,
     r"out must be all ranks' arrays side by side = \[4\], got \[3\]"),
    (lambda c: c.all_gather([np.ones(2)] * 2, out=[np.ones(4, np.float32)] * 2), TypeError, "out must be float64, got"),
    (lambda c: c.all_gather([np.ones(2)] * 2, out=[np.ones(8)[::2]] * 2), ValueError, "out must be C-contiguous"),
    (lambda c: c.all_gather([np.ones(2)] * 2, out=[np.ones(4)]), ValueError, "out must be a list of one for .*, got 1"),
    (lambda c: c.all_gather([np.ones(2)] * 2, axis="x"), TypeError, "axis must be an integer, got str"),
    (lambda c: c.all_gather([np.ones(2)] * 2, sizes=["2", 2]), TypeError, "sizes must be an integer, got str"),
    (lambda c: c.all_gather([np.ones(2)] * 2, sizes=[-2, 2]), ValueError, "sizes must be an int32 of at least 0"),
    (lambda c: InProcessCommunicator(0), ValueError, "size must be"),
    (lambda c: InProcessCommunicator(2, device="gpu"), TypeError, "device must be None"),
])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"InProcessCommunicator: .*{message}"):
        call(InProcessCommunicator(2))


def test_memory_of_two_ranks(three_gpus):
    """What is written is one rank's own; nothing has changed after a refusal."""
    xp, _ = three_gpus
    one, two, plain = np.arange(4.0), np.arange(8.0), InProcessCommunicator(2)
    calls = [
        (lambda: plain.all_reduce([one, one]), r"arrays\[1\] must share no memory with arrays\[0\], got the same"),
        (lambda: plain.all_reduce([two[:4], two[3:7]]), r"arrays\[1\] must share no .*, got arrays that overlap"),
        (lambda: plain.broadcast([two[3:7], two[:4]], root=1), r"arrays\[1\] must share no memory with arrays\[0\]"),
        (lambda: plain.all_gather([one, one.copy()], out=[two, two]), r"out\[1\] must share no memory with out\[0\]"),
        (lambda: plain.gather([two[:4], one], out=two), r"arrays\[0\] must share no memory with out\[0\]"),
        (lambda: plain.all_gather([one, two[:4]], out=[np.empty(8), two]), r"arrays\[1\] must .* with out\[1\]")]
    for call, message in calls:
        with pytest.raises(ValueError, match=f"InProcessCommunicator: {message}"):
            call()
        assert one.tolist() == [*range(4)] and two.tolist() == [*range(8)]
    assert plain.all_gather([one, one])[0].tolist() == [0, 1, 2, 3] * 2   # it is only read
    on_gpu, both = InProcessCommunicator(2, device=0), xp.array(two)
    with pytest.raises(ValueError, match=r"arrays\[1\] must share no memory with arrays\[0\]"):
        on_gpu.all_reduce([both[:5], both[3:]])
    assert xp.numpy(on_gpu.all_reduce([both[:4], both[4:]])[0]).tolist() == [4, 6, 8, 10]


@pytest.mark.parametrize("kind", ["numpy", "cupy"])
def test_views_between_each_other(kind, three_gpus):
    """The heads of two ranks in one cache are apart."""
    xp, _ = three_gpus
    whole = np.zeros((3, 4, 5, 8), np.float16)
    whole = whole if kind == "numpy" else xp.array(whole)
    check_apart("op", [("a", whole[:, :, :2]), ("b", whole[:, :, 2:]), ("c", whole[:0])])
    with pytest.raises(ValueError, match="op: b must share no memory with a, got arrays that overlap"):
        check_apart("op", [("a", whole[:, :, :3]), ("b", whole[:, :, 2:])])
    with pytest.raises(ValueError, match="op: read must share no memory with a, got the same array twice"):
        check_apart("op", [("a", whole)], [("read", whole)])
    check_apart("op", [("a", whole[0])], [("b", whole[1:]), ("c", whole[1:])])


@pytest.mark.parametrize(("ranks", "devices", "message"), [
    ([0, 3], ["cpu"] * 2, r"ranks must be different ones of the 3, at least one, got \[0, 3\]"),
    ([1, 1], ["cpu"] * 2, r"ranks must be different ones of the 3, at least one, got \[1, 1\]"),
    ([], [], "ranks must be different ones of the 3"),
    ([0, 1], ["cpu"], r"devices must hold one for each of the ranks \[0, 1\], got \['cpu'\]"),
])
def test_ranks_that_cannot_be(ranks, devices, message):
    with pytest.raises(ValueError, match=f"Communicator: {message}"):
        Communicator(3, ranks, devices)


def test_arrays_of_another_place(three_gpus):
    xp, _ = three_gpus
    host, gpus = [np.ones(2), np.ones(2)], _on(xp, [np.ones(2), np.ones(2)])
    with pytest.raises(TypeError, match="arrays must be CuPy arrays for this rank, got numpy"):
        NCCLCommunicator.local([0, 1]).all_reduce(host)
    with pytest.raises(TypeError, match="arrays must be NumPy arrays for this rank, got cupy"):
        InProcessCommunicator(2).all_reduce(gpus)
    with pytest.raises(ValueError, match="arrays must be on GPU 0 for this rank, got GPU 1"):
        NCCLCommunicator.local([0, 1]).all_reduce(gpus[::-1])
    with pytest.raises(TypeError, match="NCCLCommunicator: arrays must be float16, .* got bool"):
        NCCLCommunicator.local([0, 1]).broadcast(_on(xp, [np.ones(2, bool)] * 2))
    with pytest.raises(ValueError, match="one rank per process and NumPy arrays"):
        NCCLCommunicator.over(InProcessCommunicator(2))


def test_what_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"pip install 'cupyattn\[mpi\]'"):
        MPICommunicator()
    with install(), standin_nccl.install():
        monkeypatch.setattr(standin_nccl, "available", False)
        with pytest.raises(RuntimeError, match="pip install nvidia-nccl-cu13"):
            NCCLCommunicator.local([0])
