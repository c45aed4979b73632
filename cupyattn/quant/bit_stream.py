# SPDX-License-Identifier: Apache-2.0
"""The dense bit stream of GPTQ, EXL2 and compressed-tensors.

Code e of a vector is bits [e * bits, (e + 1) * bits) of its little-endian 32-bit words, lowest bit first, so 32 codes
fill `bits` words and a code may lie across two of them.
"""

import functools

import numpy as np

_CHUNK = 1 << 15   # groups of 8 codes in flight: 256 KiB each of the number and of what moves in it
# 8 codes of so many bits as little-endian numbers side by side
_PARTS = {1: ("u1",), 2: ("u2",), 3: ("u2", "u1"), 4: ("u4",), 5: ("u4", "u1"), 6: ("u4", "u2"),
          7: ("u4", "u2", "u1"), 8: ("u8",)}


def unpack_stream(words, bits, axis=-1, count=None):
    """Codes of a stream, uint8.

    Parameters
    ----------
    words : ndarray, int32 or uint32
        Streams along `axis`; left as it is.
    bits : int
        1 to 8.
    axis : int
    count : int, optional
        Codes of a stream. Default as many as the words hold.

    Returns
    -------
    ndarray, uint8
        Shape of `words` but for `axis`, whose elements lie side by side in memory whatever `axis` is.
    """
    _check(words, bits, 4)
    words = np.moveaxis(words, axis, -1)
    words = transposed(words.T) if words.ndim == 2 else np.ascontiguousarray(words)
    held = words.shape[-1] * 32 // bits
    count = held if count is None else count
    if count > held:
        raise ValueError(f"unpack_stream: count must be at most {held} for {words.shape[-1]} words, got {count}")
    units = -(-count // 8)   # of 8 codes in `bits` bytes
    stream = np.ascontiguousarray(_fit(words.view(np.uint8), units * bits))
    low, *upper = _numbers(stream.reshape(-1), bits)
    codes = np.empty((*words.shape[:-1], 8 * units), np.uint8)
    numbers = codes.reshape(-1).view("<u8")
    scratch = np.empty(min(_CHUNK, len(numbers)), "<u8")
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start:start + _CHUNK]
        room, at = scratch[:len(part)], 8 * low.itemsize
        part[:] = low[start:start + _CHUNK]
        for more in upper:
            room[:] = more[start:start + _CHUNK]
            room <<= np.uint64(at)
            part |= room
            at += 8 * more.itemsize
        if bits < 8:
            _spread(part, bits, room)
    return np.moveaxis(codes[..., :count], -1, axis)


def transposed(array):
    """``array.T`` of two axes as an array of its own: by 16 rows, as longer columns thrash the cache."""
    if array.T.flags.c_contiguous:
        return array.T
    out = np.empty(array.shape[::-1], array.dtype)
    for row in range(0, len(array), 16):
        out[:, row:row + 16] = array[row:row + 16].T
    return out


def pack_stream(codes, bits, axis=-1):
    """The words of codes below ``2 ** bits``: what `unpack_stream` undoes.

    Parameters
    ----------
    codes : ndarray, uint8
    bits, axis
        As in `unpack_stream`.

    Returns
    -------
    ndarray, int32
        ``ceil(count * bits / 32)`` words along `axis`; bits past the last code are 0.
    """
    _check(codes, bits, 1)
    codes = np.moveaxis(codes, axis, -1)
    count = codes.shape[-1]
    units, width = -(-count // 8), -(-count * bits // 32)
    numbers = np.array(_fit(np.ascontiguousarray(codes), 8 * units)).reshape(-1).view("<u8")
    stream = np.empty((len(numbers), bits), np.uint8)
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start:start + _CHUNK]
        _gather(part, bits)
        stream[start:start + _CHUNK] = part.view(np.uint8).reshape(-1, 8)[:, :bits]
    stream = _fit(stream.reshape(*codes.shape[:-1], units * bits), 4 * width)
    return np.moveaxis(np.ascontiguousarray(stream).view(np.int32), -1, axis)


def _numbers(stream, bits):
    """Views of the parts of each `bits` bytes of a stream: see `_PARTS`."""
    fields = [(f"part{i}", "<" + part) for i, part in enumerate(_PARTS[bits])]
    records = stream.view(fields)
    return [records[name] for name, _ in fields]


def _spread(numbers, bits, room):
    """Eight codes in the low ``8 * bits`` bits of each number become its eight bytes: halves part three times."""
    for half, place in ((4, 32), (2, 16), (1, 8)):
        low, by = (1 << half * bits) - 1, np.uint64(place - half * bits)
        if bits <= 4:   # what is left behind does not reach the upper halves' new places
            np.left_shift(numbers, by, out=room)
            room |= numbers
            np.bitwise_and(room, _lanes(low, place), out=numbers)
        else:
            np.bitwise_and(numbers, ~_lanes(low, 2 * place), out=room)
            room <<= by
            numbers &= _lanes(low, 2 * place)
            numbers |= room


def _gather(numbers, bits):
    """What `_spread` undoes."""
    for half, place in ((1, 8), (2, 16), (4, 32)):
        low = _lanes((1 << half * bits) - 1, 2 * place)
        upper = numbers >> np.uint64(place - half * bits)
        upper &= ~low & _lanes((1 << 2 * half * bits) - 1, 2 * place)
        numbers &= low
        numbers |= upper


@functools.cache
def _lanes(mask, width):
    return np.uint64(sum(mask << at for at in range(0, 64, width)))


def _fit(array, size):
    """The last axis cut or filled with zeros to `size`."""
    short = size - array.shape[-1]
    if short <= 0:
        return array[..., :size]
    return np.concatenate([array, np.zeros((*array.shape[:-1], short), array.dtype)], axis=-1)


def _check(array, bits, itemsize):
    if not 1 <= bits <= 8:
        raise ValueError(f"bit stream: bits must be 1 to 8, got {bits}")
    if array.dtype.kind not in "iu" or array.dtype.itemsize != itemsize:
        raise TypeError(f"bit stream: array must be {'words of 32 bits' if itemsize == 4 else 'uint8'}, "
                        f"got {array.dtype.name}")
