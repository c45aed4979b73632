# SPDX-License-Identifier: Apache-2.0
"""What launches become while a step is captured: kept, in order, to be launched again."""

import contextlib
import contextvars

from ..errors import CaptureError

_tape = contextvars.ContextVar("cupyattn_tape", default=None)


class Tape:
    """Where the launches of a step go while it is warmed up and captured.

    Parameters
    ----------
    arch : str
        Of the step's launches.
    keep : bool
        Capture: launches are kept. Those for a GPU also go to the stream that captures, those for ``"cpu"`` do not run.
        Otherwise they only run.

    Attributes
    ----------
    launches : list of callable
        Bound launches and calls of other libraries, in order.
    """

    def __init__(self, arch, keep):
        self.arch, self.keep = arch, keep
        self.launches = []

    def add(self, launch, on_host):
        """`launch` is a function without arguments."""
        if on_host != (self.arch == "cpu"):
            raise CaptureError(f"capture: xp must be {'numpy' if on_host else 'cupy'} for a step that launches "
                               f"{launch!r}")
        if not (self.keep and on_host):
            launch()
        if self.keep:
            self.launches.append(launch)


def tape():
    """The Tape of the warm-up or capture under way in this context, or None."""
    return _tape.get()


@contextlib.contextmanager
def taping(arch, keep):
    """Launches inside go to a new Tape; yields that."""
    if _tape.get() is not None:
        raise CaptureError("capture: a step under capture must not capture another")
    new = Tape(arch, keep)
    token = _tape.set(new)
    try:
        yield new
    finally:
        _tape.reset(token)


def refuse_in_capture(what):
    """Raises CaptureError while a step is captured; `what` is what it must not do."""
    under_capture = _tape.get()
    if under_capture is not None and under_capture.keep:
        raise CaptureError(f"capture: the step must not {what}; its warm-up must have done all that is done once")
