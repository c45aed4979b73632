# SPDX-License-Identifier: Apache-2.0
"""What the CPU executor found in a launch, in words: its errors as exceptions, its counters by argument and line."""

import re
import subprocess
from typing import NamedTuple

from ..errors import KernelCheckError

_KINDS = ("none", "out_of_bounds", "read_only_write", "uninitialised_shared", "race", "divergent_barrier", "deadlock",
          "collective_mismatch", "stack_overflow", "global_race", "bad_launch", "misaligned")
COUNTS = ("blocks", "threads", "switches", "barriers", "collectives", "mma", "ldmatrix", "shuffles", "cp_async_bytes")
_ACCESSES = ("read", "write", "ldmatrix", "cp_async")


# ---- counters --------------------------------------------------------------------------------------------

class LaunchCounters(NamedTuple):
    """What one checked launch did; see `counters`."""

    kernel: str
    counts: dict
    buffers: dict
    shared: dict
    conflicts: dict


def collect(plan, names, library, counts, instructions):
    """LaunchCounters from what the executor counted; `instructions` are those that touched shared memory."""
    worst = sorted((s for s in instructions if s.conflicts), key=lambda s: -s.conflicts)
    lines = _locations(library, [s.pc for s in worst])
    by_line = {}
    for line, instruction in zip(lines, worst, strict=True):
        by_line.setdefault((line, _ACCESSES[instruction.access]), []).append(instruction)
    return LaunchCounters(
        plan.spec.kernel, {name: getattr(counts, name) for name in COUNTS},
        {name: _fields(counts.per_buffer[i]) for i, name in enumerate(names)},
        {name: _total(s for s in instructions if s.access == i) for i, name in enumerate(_ACCESSES)},
        {place: _total(found) for place, found in by_line.items()})


def _fields(struct):
    return {name: getattr(struct, name) for name, _ in struct._fields_}


def _total(instructions):
    total = {"requests": 0, "conflicts": 0, "max_ways": 0}
    for s in instructions:
        total["requests"] += s.requests
        total["conflicts"] += s.conflicts
        total["max_ways"] = max(total["max_ways"], s.max_ways)
    return total


# ---- errors ----------------------------------------------------------------------------------------------

def explain(plan, names, library, error):
    """KernelCheckError (or ValueError for a bad launch) from what the executor reported."""
    kind = _KINDS[error.kind]
    message = error.message.decode(errors="replace")
    if kind == "bad_launch":
        return ValueError(f"{plan.spec.kernel}: {message}; plan {plan!r}")
    block, thread = tuple(error.block), tuple(error.thread)
    location, other = _location(library, error.pc), _location(library, error.other_pc)
    argument = names[error.argument] if 0 <= error.argument < len(names) else None
    where = location or "an unknown line (binutils would name it)"
    text = f"{plan.spec.kernel}: {kind.replace('_', ' ')} at {where}, block {block}, thread {thread}: {message}"
    if argument:
        text += f" (argument {argument})"
    if other:
        text += f"; the other access: {other}, block {tuple(error.other_block)}, thread {tuple(error.other_thread)}"
    return KernelCheckError(text, kind=kind, kernel=plan.spec.kernel, location=location, other_location=other,
                            block=block, thread=thread, argument=argument)


def _location(library, pc):
    """``file:line`` of a return address inside `library`, a loaded kernel, or None."""
    return _locations(library, [pc])[0] if pc else None


# what is inlined into every kernel: the line that calls it says more
_PRIMITIVES = re.compile(r"/cuda_src/cpu/|/(prelude|cp_async|mma|warp|barrier|pairs|eight_floats)\.cuh:")


def _locations(library, pcs):
    """`_location` of each of several addresses."""
    with open("/proc/self/maps") as maps:
        base = next((int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(library))), None)
    if not pcs or base is None:
        return [None] * len(pcs)
    try:
        out = subprocess.run(["addr2line", "-a", "-i", "-e", str(library), *(hex(pc - 1 - base) for pc in pcs)],
                             capture_output=True, text=True)
    except OSError:
        return [None] * len(pcs)
    if out.returncode != 0:
        return [None] * len(pcs)
    found = []
    for part in re.split(r"^0x[0-9a-f]+\n", out.stdout, flags=re.MULTILINE)[1:]:
        frames = [line.split(" ")[0] for line in part.splitlines() if not line.startswith("??")]   # innermost first
        found.append(next((f for f in frames if not _PRIMITIVES.search(f)), frames[0] if frames else None))
    return found
