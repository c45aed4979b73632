# SPDX-License-Identifier: Apache-2.0
"""Random weights of every form a kernel reads, as CodedWeight."""

import itertools

import numpy as np

from cupyattn.quant.coded import FLOAT8, TABLES, CodedWeight, Segment
from cupyattn.runtime.arrays import dtype_of

# name -> (bits, kind, centre, scale dtype, mode, super dtype, usual group)
FORMS = {
    **{f"int{bits} {mode} {scale}": (bits, "int", 0 if mode == "minimum" else 2 ** (bits - 1), scale, mode, None, 128)
       for bits, mode, scale in (*itertools.product((2, 3, 4, 5, 6, 8), ("plain", "zero", "minimum"), ("float16",)),
                                 (3, "plain", "bfloat16"), (4, "zero", "bfloat16"), (4, "zero", "float32"),
                                 (8, "minimum", "float32"))},
    **{f"int{bits} {mode} int8 float16": (bits, "int", centre, "int8", mode, "float16", group)
       for bits, mode, centre, group in ((2, "minimum", 0, 16), (3, "plain", 4, 16), (4, "minimum", 0, 32),
                                         (5, "minimum", 0, 32), (6, "plain", 32, 16), (4, "plain", 8, 32))},
    "iq4 plain float16": (4, "iq4", 0, "float16", "plain", None, 32),
    "iq4 plain int8 float16": (4, "iq4", 0, "int8", "plain", "float16", 32),
    "nf4 plain float32": (4, "nf4", 0, "float32", "plain", None, 64),
    "fp4 plain float32": (4, "fp4", 0, "float32", "plain", None, 64),
    "e2m1 plain float8_e8m0fnu": (4, "e2m1", 0, "float8_e8m0fnu", "plain", None, 32),
    "e2m1 plain float8_e4m3fn float32": (4, "e2m1", 0, "float8_e4m3fn", "plain", "float32", 16),
    "e4m3 plain float32": (8, "e4m3", 0, "float32", "plain", None, 128),
    "e4m3 plain bfloat16": (8, "e4m3", 0, "bfloat16", "plain", None, 128),
    "e5m2 plain float16": (8, "e5m2", 0, "float16", "plain", None, 128),
}

# a few that between them have every kind of codes, scales and modes
SOME = ("int2 minimum int8 float16", "int3 plain bfloat16", "int4 zero float16", "int5 minimum float16",
        "int6 plain int8 float16", "int8 zero float16", "nf4 plain float32", "e2m1 plain float8_e8m0fnu",
        "e2m1 plain float8_e4m3fn float32", "e4m3 plain float32")


def coded_weight(name, rows, columns, group=None, seed=0):
    """A CodedWeight [rows, columns] of form `name`; its weights are of size 1 or so."""
    bits, kind, centre, scale, mode, super_scale, usual = FORMS[name]
    assert kind == "int" or kind in TABLES or kind in FLOAT8
    rng = np.random.default_rng((seed, rows, columns))
    group = group or usual
    super_group = 0 if super_scale is None else columns if scale == "float8_e4m3fn" else 256 // group * group or group
    groups, supers = -(-columns // group), super_scale and -(-columns // super_group)
    codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
    if kind in FLOAT8:
        codes = rng.standard_normal((rows, columns)).astype(dtype_of(FLOAT8[kind])).view(np.uint8)
    size = {"int": 2.0 ** (1 - bits), "iq4": 2.0**-7}.get(kind, 1.0)

    def numbers(count):
        if scale == "int8":
            return rng.integers(-32, 64, (rows, count)).astype(np.int8)
        if scale == "float8_e8m0fnu":
            return (2.0 ** rng.integers(-6, 6, (rows, count))).astype(dtype_of(scale))
        return (size * np.exp2(rng.uniform(-3, 3, (rows, count)))).astype(dtype_of(scale))

    def above():
        return (rng.uniform(0.5, 2, (rows, supers)) * (size / 32 if scale == "int8" else 1)).astype(super_scale)

    zero = None if mode != "zero" else rng.integers(0, 2**bits, (rows, groups)) - float(centre)
    return CodedWeight(name, (rows, columns), (Segment(
        codes, bits, kind, group, numbers(groups), centre, None if zero is None else zero.astype(dtype_of(scale)),
        numbers(groups) if mode == "minimum" else None, above() if supers else None,
        above() if supers and mode == "minimum" else None, super_group),))
