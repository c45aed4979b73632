# SPDX-License-Identifier: Apache-2.0
"""The five environment variables, read each time they are asked for, and the cache folder."""

import functools
import logging
import os
import tempfile
import warnings
from pathlib import Path

log = logging.getLogger("cupyattn")


def _flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def debug():
    """``CUPYATTN_DEBUG``: 0 quiet, 1 a line per compile, 2 also a line per launch, 3 also commands and logs."""
    level = int(os.environ.get("CUPYATTN_DEBUG") or 0)
    if level and not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.DEBUG)
    return level


def check():
    """``CUPYATTN_CHECK=1``: CPU launches run in the checking mode; content of CuPy arrays is validated."""
    return _flag("CUPYATTN_CHECK")


def cxx():
    """``CUPYATTN_CXX``: the host C++ compiler to use instead of the first one found."""
    return os.environ.get("CUPYATTN_CXX") or None


def forbid_compile():
    """``CUPYATTN_FORBID_COMPILE=1``: a kernel that is not in the cache is an error, not a compilation."""
    return _flag("CUPYATTN_FORBID_COMPILE")


def cache_dir():
    """Folder of compiled kernels: ``CUPYATTN_CACHE_DIR``, else the user's cache folder.

    A folder that cannot be written (read-only, full) is replaced by a temporary one, with one warning.
    """
    wanted = os.environ.get("CUPYATTN_CACHE_DIR")
    if not wanted:
        import platformdirs

        wanted = platformdirs.user_cache_dir("cupyattn", appauthor=False)
    return _usable(wanted)


@functools.lru_cache(maxsize=8)
def _usable(wanted):
    path = Path(wanted)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 4096)
        return path
    except OSError as error:
        return fallback_cache_dir(wanted, error)


@functools.lru_cache(maxsize=8)
def _temporary(wanted):
    return tempfile.TemporaryDirectory(prefix="cupyattn-")


def fallback_cache_dir(wanted, error):
    """Temporary folder used because `wanted` raised `error`; warns the first time."""
    fresh = _temporary.cache_info().currsize
    folder = _temporary(str(wanted)).name
    if _temporary.cache_info().currsize != fresh:
        warnings.warn(
            f"cupyattn: the cache folder {wanted} cannot be written ({error.strerror or error}); "
            f"kernels are kept in {folder} until this process ends; set CUPYATTN_CACHE_DIR to a writable folder",
            RuntimeWarning, stacklevel=2)
    return Path(folder)
