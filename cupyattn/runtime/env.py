# SPDX-License-Identifier: Apache-2.0
"""The six environment variables, read each time they are asked for, and the cache folder."""

import atexit
import logging
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

log = logging.getLogger("cupyattn")

# every launch asks for some of these, and the dict behind os.environ answers in a tenth of the time
_variables = getattr(os.environ, "_data", None)
_keys = {name: os.environ.encodekey(name) for name in ("CUPYATTN_DEBUG", "CUPYATTN_CHECK")}


def _is_set(name):
    """False is certain; `name` is in `_keys`."""
    return _variables is None or _keys[name] in _variables


def _flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def debug():
    """``CUPYATTN_DEBUG``: 0 quiet, 1 a line per compile, 2 also a line per launch, 3 also commands and logs."""
    if not _is_set("CUPYATTN_DEBUG"):
        return 0
    text = os.environ.get("CUPYATTN_DEBUG") or "0"
    level = int(text) if text.isdecimal() else 1
    if level and not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.DEBUG)
    return level


def check():
    """``CUPYATTN_CHECK=1``: CPU launches run in the checking mode; content of CuPy arrays is validated."""
    return _is_set("CUPYATTN_CHECK") and _flag("CUPYATTN_CHECK")


def cxx():
    """``CUPYATTN_CXX``: the host C++ compiler to use instead of the first one found."""
    return os.environ.get("CUPYATTN_CXX") or None


def forbid_compile():
    """``CUPYATTN_FORBID_COMPILE=1``: a kernel that is not in the cache is an error, not a compilation."""
    return _flag("CUPYATTN_FORBID_COMPILE")


def tuned():
    """``CUPYATTN_TUNED=0``: what `cupyattn.tune` has measured is not looked at."""
    return os.environ.get("CUPYATTN_TUNED", "1") not in ("", "0")


def cache_dir():
    """Folder of compiled kernels: ``CUPYATTN_CACHE_DIR``, else the user's cache folder. It may not exist yet."""
    wanted = os.environ.get("CUPYATTN_CACHE_DIR")
    if not wanted:
        import platformdirs

        wanted = platformdirs.user_cache_dir("cupyattn", appauthor=False)
    return Path(wanted)


_fallbacks = {}   # cache folder that could not be written -> temporary folder used instead
_fallbacks_lock = threading.Lock()


def cache_dirs():
    """Where a compiled kernel may be found: the cache folder and, if that could not be written, its substitute."""
    wanted = cache_dir()
    instead = _fallbacks.get(wanted)
    return (wanted,) if instead is None else (wanted, instead)


def fallback_cache_dir(error):
    """Temporary folder to write to because `error` came from the cache folder; warns the first time."""
    wanted = cache_dir()
    with _fallbacks_lock:
        if wanted not in _fallbacks:
            _fallbacks[wanted] = Path(tempfile.mkdtemp(prefix="cupyattn-"))
            atexit.register(shutil.rmtree, _fallbacks[wanted], ignore_errors=True)
            warnings.warn(
                f"cupyattn: the cache folder {wanted} cannot be written ({error.strerror or error}); kernels are kept "
                f"in {_fallbacks[wanted]} until this process ends; set CUPYATTN_CACHE_DIR to a writable folder",
                RuntimeWarning, stacklevel=2)
        return _fallbacks[wanted]
