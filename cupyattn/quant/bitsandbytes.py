# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4-bit weights: w = TABLES[quant_type][code] * absmax of its block.

    weight                 ceil(N * K / 2) bytes, whatever the dtype: codes row after row, high nibble first
    weight.absmax          float32 [ceil(N * K / blocksize)], or uint8 of double quantization
    weight.quant_map       float32 [16], the table
    weight.quant_state.bitsandbytes__nf4 (or __fp4)    uint8, JSON: quant_type, blocksize, shape, ...

Double quantization: absmax[i] = nested_quant_map[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset,

    weight.nested_absmax       float32 [ceil(blocks / nested_blocksize)]
    weight.nested_quant_map    float32 [256]

A block may end within a row; scales are then repeated for groups of gcd(K, blocksize) columns.
"""

import json
import math

import numpy as np

from .coded import TABLES, CodedWeight, Segment
from .nibbles import unpack_nibbles
from .tensors import check_shape, take

KINDS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"


def read(tensors, state=None):
    """An NF4 or FP4 weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        As above; ``weight.quant_map`` is looked at only to be what it must be.
    state : dict, optional
        What the JSON says, for arrays that come without: ``quant_type``, ``blocksize``, ``shape`` and, for double
        quantization, ``nested_blocksize`` and ``nested_offset``.

    Returns
    -------
    CodedWeight
        Scales float32.

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype, or the state lacks something; named in the message.
    NotImplementedError
        Another quant_type, blocksize or table.
    """
    state = _state(tensors) if state is None else state
    kind, blocksize = _field(state, "quant_type", str), _field(state, "blocksize", int)
    if kind not in KINDS:
        raise NotImplementedError(f"QMatrix: quant_type must be one of {', '.join(KINDS)}, got {kind!r}")
    if blocksize not in BLOCKSIZES:
        raise NotImplementedError(f"QMatrix: blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, "
                                  f"got {blocksize}")
    rows, columns = check_shape(_field(state, "shape", (list, tuple)))
    if "weight.quant_map" in tensors:
        table = take(tensors, "weight.quant_map", ("float32",), (16,))
        if not np.allclose(table, TABLES[kind], rtol=0, atol=1e-6):
            raise NotImplementedError(f"QMatrix: weight.quant_map must be the table of {kind}, got {table.tolist()}")
    if "weight" not in tensors:
        raise ValueError(f"QMatrix: tensors must have 'weight', got {', '.join(sorted(tensors)) or 'none'}")
    packed = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    if 2 * packed.size != rows * columns:
        raise ValueError(f"QMatrix: weight must hold {rows * columns // 2} bytes for [{rows}, {columns}], "
                         f"got {packed.size}")
    absmax = _absmax(tensors, state, -(-rows * columns // blocksize))
    group = math.gcd(columns, blocksize)
    if group < blocksize:
        absmax = np.repeat(absmax, blocksize // group)[:rows * columns // group]
    codes = unpack_nibbles(packed, high_first=True).reshape(rows, columns)
    return CodedWeight(kind, (rows, columns), (Segment(codes, 4, kind, group, absmax.reshape(rows, -1)),))


def _absmax(tensors, state, blocks):
    if "weight.nested_absmax" not in tensors:
        return take(tensors, "weight.absmax", ("float32",), (blocks,))
    absmax = take(tensors, "weight.absmax", ("uint8",), (blocks,))
    size, offset = _field(state, "nested_blocksize", int), _field(state, "nested_offset", (int, float))
    if size < 1:
        raise ValueError(f"QMatrix: nested_blocksize must be at least 1, got {size}")
    above = take(tensors, "weight.nested_absmax", ("float32",), (-(-blocks // size),))
    table = take(tensors, "weight.nested_quant_map", ("float32",), (256,))
    return table[absmax] * np.repeat(above, size)[:blocks] + np.float32(offset)   # rounded twice, as the package does


def _state(tensors):
    names = [name for name in tensors if name.startswith(_STATE)]
    if len(names) != 1:
        raise ValueError(f"QMatrix: tensors must have one {_STATE}*, got {', '.join(sorted(tensors)) or 'none'}")
    text = take(tensors, names[0], ("uint8",), (None,)).tobytes()
    try:
        state = json.loads(text)
    except ValueError as error:
        raise ValueError(f"QMatrix: {names[0]} must be JSON, got {text[:40]!r}") from error
    if not isinstance(state, dict):
        raise ValueError(f"QMatrix: {names[0]} must be a JSON object, got {text[:40]!r}")
    return state


def _field(state, name, kind):
    if not isinstance(state.get(name), kind):
        raise ValueError(f"QMatrix: quant_state must say {name}, got {state.get(name)!r}")
    return state[name]
