# SPDX-License-Identifier: Apache-2.0
"""NVRTC without a GPU: compiles with exactly the options ``cupy.RawModule`` would use, and reads the result.

Compiled code is kept on disk, keyed by source, options, target and NVRTC version.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cupy
from cupy.cuda import nvrtc

from cupyattn.runtime import env, source

VERSION = nvrtc.getVersion()


class Compiled(NamedTuple):
    """A cubin, and what ptxas said about it."""

    cubin: bytes
    log: str


class Resources(NamedTuple):
    """What one kernel of a cubin needs."""

    registers: int
    stack_bytes: int
    spill_bytes: int           # stores and loads
    static_shared_bytes: int
    max_threads: int           # of __launch_bounds__ and of the registers


def full_options(options, arch):
    """`options` of a RawModule as they reach NVRTC on a GPU of `arch` (``"sm_80"``, ``"sm_90a"``)."""
    number = arch.removeprefix("sm_").rstrip("a")
    return (*cupy._core.core.assemble_cupy_compiler_options(options), "-ftz=true", f"-arch=sm_{number}",
            "--device-as-default-execution-space")


def compile_code(code, options, arch, name="kernel.cu"):
    """Compiled form of `code`; raises CuPy's CompileException as RawModule would."""
    options = (*full_options(options, arch), "--ptxas-options=-v")
    key = repr((code, options, VERSION))
    if "-DCA_SOURCE_HASH=" in key:   # which stands for the files' content, wherever they are
        key = key.replace(str(source.root()), "")
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    stored = env.cache_dir() / "nvrtc" / digest
    try:
        log, cubin = stored.read_bytes().split(b"\0", 1)
        return Compiled(cubin, json.loads(log))
    except FileNotFoundError:
        pass
    program = nvrtc.createProgram(code, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy drops the last byte, always a zero; the driver does not mind, nvdisasm does
        done = Compiled(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise cupy.cuda.compiler.CompileException(log, code, name, options, "nvrtc") from None
    finally:
        nvrtc.destroyProgram(program)
    _store(stored, json.dumps(done.log).encode() + b"\0" + done.cubin)
    return done


def resources(compiled, kernel):
    """Resources of `kernel`, from ptxas' report and the cubin."""
    entry = re.search(rf"Compiling entry function '{kernel}' for.*?(?=Compiling entry function|\Z)", compiled.log,
                      re.DOTALL).group(0)

    def number(pattern):
        return sum(int(n) for n in re.findall(pattern, entry))

    registers = number(r"Used (\d+) registers")
    allocated = 32 * -(-registers // 8) * 8   # registers are handed out to warps in units of 256
    return Resources(registers, number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill"),
                     number(r"(\d+) bytes smem"), min(_launch_bound(compiled.cubin, kernel), 65536 // allocated * 32))


def _launch_bound(cubin, kernel):
    """Threads per block that `kernel` was compiled for, from attribute 5 of its .nv.info section; 1024 if none."""
    section = sections(cubin).get(f".nv.info.{kernel}", b"")
    at = 0
    while at < len(section):
        form, attribute, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == 4:   # `value` bytes follow
            if attribute == 5:
                x, y, z = struct.unpack_from("<III", section, at)
                return x * y * z
            at += value
    return 1024


def sections(elf):
    """{name: bytes} of a 64-bit ELF file."""
    start, = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = headers[names_index][4]
    return {elf[names + h[0]:elf.index(b"\0", names + h[0])].decode(): elf[h[4]:h[4] + h[5]]
            for h in headers if h[1] != 8}   # 8: no bits in the file


@functools.cache
def _nvdisasm():
    import nvidia

    for folder in nvidia.__path__:
        for found in Path(folder).glob("*/bin/nvdisasm"):
            return found
    found = shutil.which("nvdisasm")
    assert found, "nvdisasm not found: pip install nvidia-cuda-nvdisasm"
    return found


def loop_instructions(cubin, kernel, mark):
    """Instructions on the shortest way round the loop of `kernel`'s SASS that holds the most of mnemonic `mark`, as a
    list: branches go where less is to be done, inner loops are left aside."""
    code, labels = [], {}
    for line in _lines(cubin, kernel):
        if line.startswith(".L"):
            labels[line] = len(code)
        else:
            code.append(line)
    target = [labels.get(m.group(1)) if (m := re.search(r"\bBRA.*`\((\.L\w+)\)", text)) else None for text in code]
    loops = [(to, i) for i, to in enumerate(target) if to is not None and to <= i]
    head, tail = max(loops, key=lambda loop: sum(mark in text for text in code[loop[0]:loop[1] + 1]))
    inside = {i for a, b in loops if head < a and b < tail for i in range(a, b + 1)}
    best = {tail: (1, None)}   # (instructions to the end, next one); jumps back are inner loops
    for i in range(tail - 1, head - 1, -1):
        ways = [] if re.match(r"(BRA(?!\.DIV)\S* `|EXIT|RET)", code[i]) else [i + 1]
        ways += [] if target[i] is None or "BRA.DIV" in code[i] or target[i] <= i else [target[i]]
        ways = [(best[way][0] + 1, way) for way in ways if way in best]
        if ways and i not in inside:
            best[i] = min(ways)
    path = [head]
    while path[-1] != tail:
        path.append(best[path[-1]][1])
    return [code[i] for i in path]


def opcodes(cubin, kernel):
    """How often each mnemonic stands in `kernel`'s SASS, a Counter: {"HMMA": 128, "LDSM": 48, ...}."""
    stored = env.cache_dir() / "nvrtc" / f"{hashlib.sha256(cubin).hexdigest()[:24]}.{kernel}.json"
    if not stored.is_file():
        found = Counter(mnemonic(line).split(".")[0] for line in _lines(cubin, kernel) if not line.startswith(".L"))
        _store(stored, json.dumps(found).encode())
    return Counter(json.loads(stored.read_text()))


def instructions(cubin, kernel):
    """Instructions of `kernel`'s SASS in their order."""
    return [line for line in _lines(cubin, kernel) if not line.startswith(".L")]


def mnemonic(instruction):
    """``"LDG.E.128"`` of ``"@P0 LDG.E.128 R4, [R2]"``."""
    return re.match(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", instruction).group(1)


def loops(cubin, kernel):
    """Instructions of every loop of `kernel`, the shortest first."""
    instructions, labels, found = [], {}, []
    for line in _lines(cubin, kernel):
        if line.startswith(".L"):
            labels[line] = len(instructions)
            continue
        instructions.append(line)
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if target and target.group(1) in labels:   # backwards
            found.append(instructions[labels[target.group(1)]:])
    return sorted(found, key=len)


def bytes_asked_for(body):
    """Bytes that a lane loads from global memory in the instructions of `body` before it uses the first of them."""
    pending, total = set(), 0
    for line in body:
        name, operands = mnemonic(line), re.findall(r"\bR(\d+)(\.64)?", line.split(mnemonic(line), 1)[1])
        reads = operands if name.startswith(("STG", "STS", "ISETP", "FSETP")) else operands[1:]
        if pending & {int(n) + i for n, wide in reads for i in range(2 if wide else 1)}:
            break
        if name.startswith("LDG"):
            width = next((int(part) // 8 for part in re.findall(r"\d+", name)), 4)
            pending |= {int(operands[0][0]) + i for i in range(max(1, width // 4))}
            total += width
    return total


def _lines(cubin, kernel):
    """Instructions and labels (``".L_x_1"``) of `kernel`, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_nvdisasm(), "-c", file.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body = re.search(rf"^\.text\.{kernel}:(.*?)(?=^\.text\.|\Z)", done.stdout, re.DOTALL | re.MULTILINE).group(1)
    return [label or instruction.strip()
            for label, instruction in re.findall(r"^(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body, re.MULTILINE)]


def _store(path, content):
    """Write a file so that other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
