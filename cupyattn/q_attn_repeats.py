# SPDX-License-Identifier: Apache-2.0
"""Calls of a layer that are made again with the very same objects."""

from threading import get_ident

import numpy as np

from .runtime import arch_of, env
from .runtime.capturing import taping
from .runtime.cpu import current_settings
from .runtime.launch import is_watched


class Repeats:
    """The launches of a call, for the calls after it that are made with the same objects.

    It keeps the objects of the call it repeats alive, and no others. Arrays may have other contents each time.

    Attributes
    ----------
    kept : tuple or None
        (objects of the call, bound launches, what these are for, array that must have the next bytes or None, bytes):
        one tuple, which another thread replaces as a whole.
    """

    def __init__(self, xp):
        self._xp = xp
        self._seen = None   # of the last call
        self.kept = None

    def again(self, kept):
        """Launch what `kept` holds; False, and nothing launched, where that would not be the same."""
        _, runs, (thread, settings, stream), watched, contents = kept
        if thread != get_ident() or is_watched() or (
                settings != current_settings() if stream is None else stream != self._stream()):
            return False
        if watched is not None and watched.tobytes() != contents:
            return False
        for run in runs:
            run()
        return True

    def first(self, call, seen, step, watched):
        """``step()``; when the last call was made with the same objects, its launches are kept for the next.

        Parameters
        ----------
        call : tuple
            All that the step depends on, but the contents of arrays.
        seen : tuple
            Identities of its objects and values of its numbers. Others may have them once these are gone; to take
            such a call for the last one again costs time, no more.
        step : callable
            Launches, and does nothing else that would have to be done again.
        watched : callable
            ``watched()``: whether the step can be repeated, and the array whose contents it must find, or None.
        """
        if seen != self._seen or is_watched() or env.check():
            self._seen = seen
            return step()
        can, array = watched()
        if not can:
            return step()
        with taping(arch_of(self._xp), keep=True) as tape:
            step()
        array = array if self._xp is np else None
        self.kept = (call, tuple(launch.run for launch in tape.launches), self._place(), array,
                     None if array is None else array.tobytes())

    def _place(self):
        """What bound launches are for, beside their arguments: workspaces are a thread's, and a stream's."""
        return get_ident(), current_settings(), None if self._xp is np else self._stream()

    def _stream(self):
        return self._xp.cuda.runtime.getDevice(), self._xp.cuda.get_current_stream().ptr
