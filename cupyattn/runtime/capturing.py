# SPDX-License-Identifier: Apache-2.0
"""What launches become while a step is captured: kept, in order, to be launched again."""

import contextlib
import contextvars

from ..errors import CaptureError

_tape = contextvars.ContextVar("cupyattn_tape", default=None)


class Tape:
    """Where the launches of a step go.

    Parameters
    ----------
    arch : str
        Of the step's launches.
    keep : bool
        Keep them.
    capturing : bool
        They are only kept. (Those for a GPU run as well, for the stream that captures them.)

    Attributes
    ----------
    launches : list of callable
        Bound launches and calls of other libraries, in order.
    """

    def __init__(self, arch, keep, capturing):
        self.arch, self.keep, self.capturing = arch, keep, capturing
        self.launches = []

    def add(self, launch, on_host):
        """`launch` is a function without arguments."""
        if on_host != (self.arch == "cpu"):
            raise CaptureError(f"capture: xp must be {'numpy' if on_host else 'cupy'} for a step that launches "
                               f"{launch!r}")
        if not (self.capturing and on_host):
            launch()
        if self.keep:
            self.launches.append(launch)


def tape():
    """The Tape that launches in this context go to, or None."""
    return _tape.get()


@contextlib.contextmanager
def taping(arch, *, keep=False, capturing=False):
    """Launches inside go to a new Tape; yields that."""
    if _tape.get() is not None:
        raise CaptureError("capture: a step under capture must not capture another")
    new = Tape(arch, keep, capturing)
    token = _tape.set(new)
    try:
        yield new
    finally:
        _tape.reset(token)


def refuse_to_keep(what):
    """Raises CaptureError while launches are kept; `what` is what would not be done again with them."""
    current = _tape.get()
    if current is not None and current.keep:
        raise CaptureError(f"capture: the step must not {what}")


def refuse_to_compile(spec):
    """Raises CaptureError while a step is captured."""
    current = _tape.get()
    if current is not None and current.capturing:
        raise CaptureError(f"capture: the step must not compile {spec}, which its warm-up did not launch")
