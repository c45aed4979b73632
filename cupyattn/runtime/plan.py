# SPDX-License-Identifier: Apache-2.0
"""Specialisation (which code) and Plan (which code, how many blocks): frozen, printable, without arrays."""

import re
from dataclasses import dataclass, field

from . import structs
from .bound import Bound

CUDA_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_TYPE = re.compile(r"[A-Za-z_][\w:<>, *]*")   # no character that an option parser would take for its own


@dataclass(frozen=True)
class Specialisation:
    """One kernel with its compile-time constants.

    Parameters
    ----------
    source : str
        Stem of the `.cu` file, or the path of one.
    kernel : str
        Its ``extern "C"`` symbol.
    args : str
        Name of its argument struct.
    constants : dict
        ``{"T": "float16", "VEC": 8}`` becomes ``-DCA_T=__half -DCA_VEC=8``; dtype names become CUDA types, also inside
        a C++ type: ``{"KV": "KvInt8<float16>"}`` and ``{"KV": "KvInt8<__half>"}`` mean the same.
    min_sm : int
        Lowest compute capability it compiles for, times ten.
    expects : tuple of str
        SASS mnemonics the compiled kernel must contain.
    spill_bytes : int
        Spilled bytes tolerated by the compile tests.
    """

    source: str
    kernel: str
    args: str
    constants: tuple
    min_sm: int = 75
    expects: tuple = ()
    spill_bytes: int = 0
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.constants, dict):
            object.__setattr__(self, "constants", tuple(sorted(self.constants.items())))
        for name, value in self.constants:
            legal = isinstance(value, int) or isinstance(value, str) and _TYPE.fullmatch(value)
            if not legal or not _NAME.fullmatch(name):
                raise ValueError(f"{self.kernel}: constants must be UPPER_CASE names of integers, dtype names or C++ "
                                 f"types, got {name}={value!r}")
        object.__setattr__(self, "_hash", hash((self.source, self.kernel, self.args, self.constants)))

    def __hash__(self):
        return self._hash

    @property
    def layout(self):
        """Layout of the argument struct."""
        return structs.layout(self.args, self.source)

    def defines(self):
        """``-D`` options, the same for both compilers."""
        return (*(f"-DCA_{name}={_spelling(value)}" for name, value in self.constants),
                f"-DCA_SIZEOF_ARGS={self.layout.dtype.itemsize}")

    def __str__(self):
        return f"{self.kernel}[{', '.join(f'{k}={v}' for k, v in self.constants)}]"


def _spelling(value):
    """A constant as the compiler reads it."""
    if isinstance(value, int):
        return str(int(value))
    return re.sub(r"\w+", lambda word: CUDA_TYPES.get(word[0], word[0]), value)


@dataclass(frozen=True)
class Plan:
    """What one call launches: a pure function of shapes, dtypes, arch and options.

    Parameters
    ----------
    spec : Specialisation
    arch : str
        ``"cpu"`` or ``"sm_90a"`` and the like.
    grid, block : tuple of int
        Up to three numbers each; missing ones are 1.
    shared_bytes : int
        Dynamic shared memory per block.
    workspace_bytes : int
        Scratch the op takes from the stream's workspace.
    note : str
        Why this version of the op was chosen.
    """

    spec: Specialisation
    arch: str
    grid: tuple
    block: tuple
    shared_bytes: int = 0
    workspace_bytes: int = 0
    note: str = ""
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "grid", (*self.grid, 1, 1)[:3])
        object.__setattr__(self, "block", (*self.block, 1, 1)[:3])
        object.__setattr__(self, "_hash", hash((self.spec, self.arch, self.grid, self.block, self.shared_bytes)))

    def __hash__(self):
        return self._hash

    def bind(self, *, buffers=(), const_buffers=(), **fields):
        """A prepared launch: all that ops do before one is done here, once.

        Parameters
        ----------
        buffers, const_buffers : sequence of ndarray
            As in `runtime.launch`.
        **fields
            Fields of the argument struct, as in `make_args`.

        Returns
        -------
        Bound
            Call it to launch; the arrays may hold other values each time.
        """
        return Bound(self, make_args(self, **fields), buffers, const_buffers)


def make_args(plan, **values):
    """Argument struct of `plan`'s kernel, filled by field name.

    Pointers take an array or None, nested structs a dict of their fields or None for all zero. A missing or
    unknown field is a TypeError that lists the fields.
    """
    return structs.fill(plan.spec.layout, values)
