# SPDX-License-Identifier: Apache-2.0
"""Where the kernels are, and a digest of everything a kernel file includes.

CuPy's disk cache hashes the text of a `.cu`, not the headers it includes; the digest of the include closure goes
into the options (``-DCA_SOURCE_HASH``), so an edited header is always a new kernel.
"""

import functools
import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def root():
    """Folder of the CUDA sources: inside an installed package, beside the package in a checkout."""
    installed = _PACKAGE / "_cuda_src"
    return installed if installed.is_dir() else _PACKAGE.parent / "cuda_src"


def path(source):
    """The `.cu` file of a stem, or `source` itself when it is a path to a `.cu` file."""
    found = Path(source) if str(source).endswith(".cu") else root() / f"{source}.cu"
    if not found.is_file():
        raise FileNotFoundError(f"no kernel source {found}")
    return found


def include_dirs(cpu):
    """Folders of ``-I``, in order. The CPU build sees the executor's headers first."""
    return (root() / "cpu", root() / "include") if cpu else (root() / "include",)


@functools.lru_cache(maxsize=256)
def closure(file, cpu):
    """Paths of `file` and of every project file it includes, in order of first inclusion."""
    seen = {}

    def visit(current):
        if current in seen:
            return
        seen[current] = None
        for quoted, angled in _INCLUDE.findall(current.read_text()):
            name = quoted or angled
            folders = ((current.parent,) if quoted else ()) + include_dirs(cpu)
            for folder in folders:
                if (folder / name).is_file():
                    visit((folder / name).resolve())
                    break

    visit(Path(file).resolve())
    return tuple(seen)


@functools.lru_cache(maxsize=256)
def digest(file, cpu):
    """Hash of the names and contents of `closure(file, cpu)`, 16 hex digits."""
    total = hashlib.sha256()
    for part in closure(file, cpu):
        total.update(part.name.encode() + b"\0" + part.read_bytes() + b"\0")
    return total.hexdigest()[:16]
