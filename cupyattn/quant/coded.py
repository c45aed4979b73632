# SPDX-License-Identifier: Apache-2.0
"""CodedWeight: what every checkpoint format says about a quantized weight, in the same words."""

from dataclasses import dataclass

import numpy as np

# numbers of the 4-bit codes that are no integers
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4 = (0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLES = {
    "nf4": NF4,
    "fp4": _FP4 + tuple(-v for v in _FP4),      # of bitsandbytes; not E2M1
    "e2m1": _E2M1 + tuple(-v for v in _E2M1),
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
FLOAT8 = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(frozen=True, eq=False)
class Segment:
    """Columns of a weight that are coded alike; most weights are one.

    Column k of the segment, in group ``k // group``, stands for

        value(code) * scale                 neither `zero` nor `minimum`
        (value(code) - zero) * scale        with `zero`
        value(code) * scale + minimum       with `minimum`

    where scale is ``scale[n, k // group]``, times ``super_scale[n, k // super_group]`` if there is one, and likewise
    minimum and `super_minimum`. value(code) is ``code - centre`` for integers, else the number of the code.

    Attributes
    ----------
    codes : ndarray [N, columns], uint8
    bits : int
        2 to 6 or 8; codes are below ``2 ** bits``.
    kind : str
        ``"int"``, a key of `TABLES` (4 bits) or of `FLOAT8` (8 bits).
    group : int
        Columns that share a scale; the last group may have fewer.
    scale : ndarray [N, ceil(columns / group)]
        float16, bfloat16 or float32; int8 with a `super_scale`; float8_e4m3fn or float8_e8m0fnu.
    centre : int
        0 or ``2 ** (bits - 1)``; only for integers.
    zero : ndarray like scale, optional
        Zero points less `centre`, in the dtype of `scale`.
    minimum : ndarray like scale, optional
    super_scale, super_minimum : ndarray [N, ceil(columns / super_group)], float16 or float32, optional
    super_group : int
        A multiple of `group`.
    """

    codes: np.ndarray
    bits: int
    kind: str
    group: int
    scale: np.ndarray
    centre: int = 0
    zero: np.ndarray | None = None
    minimum: np.ndarray | None = None
    super_scale: np.ndarray | None = None
    super_minimum: np.ndarray | None = None
    super_group: int = 0

    def values(self):
        """Numbers of the codes, float64 [N, columns]."""
        if self.kind == "int":
            return self.codes.astype(np.float64) - self.centre
        if self.kind in TABLES:
            return np.array(TABLES[self.kind], np.float64)[self.codes]
        import ml_dtypes

        return self.codes.view(getattr(ml_dtypes, FLOAT8[self.kind])).astype(np.float64)

    def dequantize(self):
        """The weights, float64 [N, columns]."""
        columns = self.codes.shape[1]

        def spread(array, above):
            wide = np.repeat(array.astype(np.float64), self.group, axis=1)[:, :columns]
            if above is None:
                return wide
            return wide * np.repeat(above.astype(np.float64), self.super_group, axis=1)[:, :columns]

        values = self.values()
        if self.zero is not None:
            values = values - spread(self.zero, None)
        values = values * spread(self.scale, self.super_scale)
        return values if self.minimum is None else values + spread(self.minimum, self.super_minimum)


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A quantized weight [N, K] as its checkpoint says it.

    Attributes
    ----------
    format : str
        Name of the format, for people.
    shape : (int, int)
        (out_features, in_features).
    segments : tuple of Segment
        Side by side along the columns.
    order : ndarray [columns], int32, optional
        Column k of the segments multiplies ``x[..., order[k]]``, or 0 where ``order[k]`` is -1: groups of odd sizes
        are filled with such columns. Every column of x occurs once. None: in order.
    """

    format: str
    shape: tuple
    segments: tuple
    order: np.ndarray | None = None

    def dequantize(self):
        """The weight, float64 [N, K], in the order of x."""
        columns = np.concatenate([segment.dequantize() for segment in self.segments], axis=1)
        if self.order is None:
            return columns
        weight = np.empty(self.shape, np.float64)
        real = self.order >= 0
        weight[:, self.order[real]] = columns[:, real]
        return weight
