# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models
from timing import DEVICE

import cupyattn
from cupyattn.reference.schedule import make_work

MAX_K_LEN = 8192


@pytest.mark.parametrize("batch", [1, 8, 64] if DEVICE.is_gpu else [1, 8])
@pytest.mark.parametrize("model", models(), ids=str)
def bench_schedule(bench, model, batch):
    """The work list of a decode step over ragged lengths, planned where they are.

    The GPU's baseline is the planner in NumPy and the copies of its lists.
    """
    lengths = np.random.default_rng(2).integers(1, MAX_K_LEN, batch).astype(np.int32)
    kwargs = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    room = cupyattn.schedule(DEVICE.array(lengths), max_k_len=MAX_K_LEN, **kwargs) if DEVICE.is_gpu else None
    work = (room or cupyattn.schedule(lengths, **kwargs)).decode
    wanted = make_work(lengths, 1, num_kv_heads=model.num_kv_heads, heads_per_kv=model.num_heads // model.num_kv_heads,
                       rows=work.rows, workers=work.workers)

    def call(lengths):
        return cupyattn.schedule(lengths, **kwargs, out=room).decode.items

    def on_host(_):
        cupyattn.schedule(lengths, xp=DEVICE.xp, **kwargs)

    bench(f"{model} batch {batch} up to {MAX_K_LEN}", lambda rng: (lengths,), call, lambda _: wanted.items,
          tolerance=(0, 0), nbytes=sum(getattr(wanted, name).nbytes for name in wanted.ARRAYS),
          baseline=on_host if DEVICE.is_gpu else None, checked=lambda items: items[:len(wanted.items)])
