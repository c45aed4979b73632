# SPDX-License-Identifier: Apache-2.0
import functools

import numpy as np
import pytest
from shapes import models

import cupyattn
from cupyattn.quant import layout
from cupyattn.quant.coded import Segment

# name -> (bits, centre, group, dtype of the scales, zero points, columns of a super scale or 0)
CODINGS = {"gptq4": (4, 8, 128, np.float16, True, 0), "q3_k": (3, 4, 16, np.int8, False, 256),
           "int8": (8, 128, 1 << 20, np.float16, False, 0)}


@functools.lru_cache(maxsize=1)
def _arrays(n, k, name):
    bits, _, group, dtype, with_zero, super_group = CODINGS[name]
    rng = np.random.default_rng(1)
    groups = -(-k // group)
    arrays = [rng.integers(0, 2**bits, (n, k), np.uint8), rng.integers(1, 100, (n, groups)).astype(dtype)]
    if with_zero:
        arrays.append(rng.integers(-8, 8, (n, groups)).astype(dtype))
    if super_group:
        arrays.append(rng.random((n, -(-k // super_group)), np.float32).astype(np.float16))
    return tuple(arrays)


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("model", models(), ids=str)
def bench_repack(bench, model, name):
    """The gate projection of a layer."""
    bits, centre, group, _, with_zero, super_group = CODINGS[name]
    shape = model.intermediate_size, model.hidden_size

    def segment(codes, scale, *rest):
        return Segment(codes, bits, "int", group, scale, centre, zero=rest[0] if with_zero else None,
                       super_scale=rest[0] if super_group else None, super_group=super_group)

    host = _arrays(*shape, name)
    want = layout.pack_segment(segment(*host))
    outs = [array for array in (want.codes, want.scales, want.supers) if array is not None]

    def make(rng):
        return *host, *(np.empty_like(array) for array in outs)

    def call(*arrays):
        packed = (*arrays[len(host):], None)[:3]
        out = layout.PackedSegment(*packed, form=want.form, columns=want.columns)
        return cupyattn.repack(segment(*arrays[:len(host)]), out=out).codes

    bench(f"{model} {shape[0]}x{shape[1]} {name}", make, call, lambda *arrays: want.codes, tolerance=(0, 0),
          nbytes=sum(array.nbytes for array in (*host, *outs)))
