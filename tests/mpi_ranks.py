# SPDX-License-Identifier: Apache-2.0
"""Programs that run as ranks of MPI: ``run(name, size, folder)`` from a test, ``mpiexec ... mpi_ranks.py name folder``.

A program is a function of a communicator and the folder, which it may read; what it returns, a dict of arrays, is what
`run` returns, one for each rank. It is also what a test calls itself, with an InProcessCommunicator.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import cupyattn


def run(name, size, folder):
    """Run program `name` with `size` ranks; its results, rank by rank."""
    mpiexec(size, __file__, name, folder)
    ranks = []
    for rank in range(size):
        with np.load(folder / f"rank{rank}.npz") as file:
            ranks.append(dict(file))
    return ranks


def mpiexec(size, *command):
    """What `size` ranks of a Python program print."""
    import pytest

    program = Path(sys.executable).parent / "mpiexec"   # of the mpich wheel
    assert program.exists(), f"{program} is missing: pip install mpich mpi4py"
    here = Path(__file__).parent
    done = subprocess.run([program, "-n", str(size), sys.executable, *command], capture_output=True, text=True,
                          timeout=240, env=os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here)))})
    if done.returncode:
        pytest.fail(f"mpiexec -n {size} {command}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def parts(size, dtype, axis=1):
    """An array for each rank, of different lengths along `axis`."""
    rng = np.random.default_rng(5)
    shape = [3, 4, 5]
    made = []
    for rank in range(size):
        shape[axis] = rank + 2
        made.append((100 * rng.standard_normal(shape)).astype(dtype))
    return made


def collectives(communicator, folder):
    """Everything a communicator does; results of the ranks of this process by name."""
    size, ranks = communicator.size, communicator.ranks
    results = [{} for _ in ranks]

    def keep(name, arrays):
        for result, array in zip(results, arrays, strict=True):
            result[name] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array

    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32):
        name = np.dtype(dtype).name
        all_parts = parts(size, dtype)
        mine = [all_parts[rank] for rank in ranks]
        sizes = [part.shape[1] for part in all_parts]
        keep(f"all_gather {name}", communicator.all_gather(mine, axis=1, sizes=sizes))
        for root in range(size):
            whole = communicator.gather(mine, axis=-2, root=root, sizes=sizes)
            assert (whole is None) == (root not in ranks)
            if whole is not None:
                keep_in = results[ranks.index(root)]
                keep_in[f"gather {name}"] = whole.view(np.uint16) if name == "bfloat16" else whole
        same = [np.ascontiguousarray(part[:, :2]) for part in mine]
        keep(f"broadcast {name}", communicator.broadcast([part.copy() for part in same], root=size - 1))
        keep(f"even {name}", communicator.all_gather(same))
        if name != "int32":
            keep(f"all_reduce {name}", communicator.all_reduce(same))
    return results


def context_parallel(communicator, folder):
    """Decoding over keys that are spread over the ranks."""
    from test_context_parallel import decoded_by

    return [dict(zip(("out", "lse"), decoded_by(communicator), strict=True))]


def layers(communicator, folder):
    """Attention layers spread over the ranks, then decoding over keys that are, by the same communicator."""
    from test_tp_attn import MPI_LAYERS, spread

    (results,) = context_parallel(communicator, folder)
    for name in MPI_LAYERS:
        for paged in (True, False):
            (steps,) = spread(name, paged, communicator)
            results |= {f"{name} {paged} {n}": x for n, x in enumerate(steps)}
    return [results]


def functions(communicator, folder):
    """The tensor-parallel functions of ExLlamaV2."""
    from test_tp_attn_functions import MPI_LAYERS, spread

    results = {}
    for name in MPI_LAYERS:
        for paged in (True, False):
            returned, columns = spread(name, paged, communicator)
            results |= {f"{name} returned {paged} {n}": x for n, x in enumerate(returned)}
            results |= {f"{name} columns {paged} {n}": x for n, (x,) in enumerate(columns)}
    return [results]


if __name__ == "__main__":
    program, place = sys.argv[1], Path(sys.argv[2])
    ranks = cupyattn.MPICommunicator()
    (result,) = globals()[program](ranks, place)
    np.savez(place / f"rank{ranks.ranks[0]}.npz", **result)
