# SPDX-License-Identifier: Apache-2.0
"""Finding a C++ compiler and building shared libraries into the cache, safely among several processes."""

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import CompileError
from . import env

_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=fast",
          "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")


class Compiler(NamedTuple):
    """A host C++ compiler: command prefix, family and the line it identifies itself with."""

    command: tuple
    family: str      # "g++", "clang++" or "ziglang"
    identity: str

    def flags(self, extra=()):
        """Options every build gets, then `extra`, in this compiler's spelling."""
        own = ("-fno-gnu-unique",) if self.family == "g++" else ()
        if self.family != "g++" and "-fsanitize=thread" in extra:
            # without it clang drops the read of a read-modify-write, and its faults go unseen
            own = ("-mllvm", "-tsan-instrument-read-before-write=1")
        return (*_FLAGS, *own, *extra)


def _probe(command, family=None):
    try:
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if out.returncode != 0 or not out.stdout.strip():
        return None
    first = out.stdout.strip().splitlines()[0]
    if family is None:
        family = "clang++" if "clang" in out.stdout.lower() else "g++"
    return Compiler(tuple(command), family, f"{family}: {first}")


@functools.lru_cache(maxsize=8)
def _named(text):
    try:
        command = shlex.split(text)
    except ValueError:   # a quote that is not closed
        return None
    family = "ziglang" if "zig" in text else None
    return _probe(command, family)


@functools.lru_cache(maxsize=1)
def available():
    """Every compiler found, in the order they are preferred: g++, clang++, ziglang."""
    found = [_probe((name,), name) for name in ("g++", "clang++") if shutil.which(name)]
    if importlib.util.find_spec("ziglang") is not None:
        found.append(_probe((sys.executable, "-m", "ziglang", "c++"), "ziglang"))
    return tuple(c for c in found if c is not None)


def compiler(command=None):
    """The compiler in use: `command`, else ``CUPYATTN_CXX``, else the first of `available()`.

    Raises
    ------
    CompileError
        None was found; says how to get one.
    """
    wanted = command or env.cxx()
    if wanted is not None:
        found = _named(wanted)
        if found is None:
            raise CompileError(f"CUPYATTN_CXX={wanted} does not run; name a C++17 compiler, e.g. g++ or clang++")
        return found
    if not available():
        raise CompileError("no C++ compiler found, and the CPU executor needs one; install g++ "
                           "(Debian/Ubuntu: apt install g++), or run: pip install 'cupyattn[cpu]'")
    return available()[0]


@functools.lru_cache(maxsize=1)
def cpu_features():
    """What -march=native depends on, as one line."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "CPU part", "Features")
    lines = {line for line in text.splitlines() if line.startswith(keys)}
    return platform.machine() + " " + " ".join(sorted(lines))


def build(compiler, name, digest, sources, output, compile_flags=(), link_flags=()):
    """Path of a shared library in the cache, built if it is not there.

    Parameters
    ----------
    compiler : Compiler
    name : str
        Readable start of the folder name.
    digest : str
        Hash of everything the library's content depends on, compiler and flags included.
    sources : dict or sequence
        ``{file name: text}`` of generated files to write and compile, or paths of existing files.
    output : str
        File name of the library.
    compile_flags, link_flags : tuple of str
        Added to the compiler's own; the two steps are separate, so a flag of one never reaches the other.

    Returns
    -------
    (Path, bool)
        The library and whether it was found in the cache.
    """
    folder = Path("cpu") / f"{name}.{digest}"
    for root in env.cache_dirs():
        if (root / folder / output).is_file():
            return root / folder / output, True
    if env.forbid_compile():
        raise CompileError(f"{name} is not in the cache {env.cache_dir()}, and CUPYATTN_FORBID_COMPILE=1 forbids "
                           "compiling it")
    with tempfile.TemporaryDirectory(prefix=f"cupyattn-{name}-") as scratch:
        _compile(compiler, Path(scratch), name, sources, output, compile_flags, link_flags)
        try:
            return _publish(Path(scratch), env.cache_dir() / folder, output), False
        except OSError as error:
            return _publish(Path(scratch), env.fallback_cache_dir(error) / folder, output), False


def _compile(compiler, scratch, name, sources, output, compile_flags, link_flags):
    """`scratch`/`output` and the build log, from `sources` as `build` takes them."""
    if isinstance(sources, dict):
        for file, text in sources.items():
            (scratch / file).write_text(text)
        sources = [scratch / file for file in sources]
    start = time.perf_counter()
    objects = [str(scratch / f"{file.stem}.o") for file in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda file, to: _run(name, scratch, [*compiler.command, *compiler.flags(compile_flags), "-c",
                                                            str(file), "-o", to]), sources, objects))
    _run(name, scratch, [*compiler.command, "-shared", *objects, "-o", str(scratch / output), *link_flags])
    for file in objects:
        os.remove(file)
    if env.debug() >= 1:
        env.log.debug("compiled %s in %.1f s with %s", name, time.perf_counter() - start, compiler.identity)


def _publish(scratch, folder, output):
    """Copy `scratch` beside `folder` and rename: other processes see all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        shutil.copytree(scratch, temporary, dirs_exist_ok=True)
        os.replace(temporary, folder)
    except OSError as error:
        if not (folder / output).is_file():   # not the harmless case of another process having been first
            reasons = error.args[0] if isinstance(error, shutil.Error) else None
            raise OSError(reasons[0][2].split(": ")[0] if reasons else error.strerror or str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / output


def _run(name, folder, command):
    done = subprocess.run(command, capture_output=True, text=True)
    with open(folder / "build.log", "a") as log:
        log.write(shlex.join(command) + "\n" + done.stderr)
    if env.debug() >= 3:
        env.log.debug("%s\n%s", shlex.join(command), done.stderr)
    if done.returncode != 0:
        kept = Path(tempfile.mkdtemp(prefix="cupyattn-failed-"))
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        lines = done.stderr.splitlines()
        first = [line for line in lines if "error" in line][:8] or lines[:8]
        raise CompileError(f"{name}: the host compiler failed\n  " + "\n  ".join(first) +
                           f"\n  command: {shlex.join(command)}\n  sources and log: {kept}")


def digest_of(compiler, *parts):
    """16 hex digits of the hash of `parts`, compiler identity and CPU included."""
    total = hashlib.sha256()
    for part in (*parts, compiler.identity, cpu_features()):
        total.update(str(part).encode() + b"\0")
    return total.hexdigest()[:16]
