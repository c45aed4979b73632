# SPDX-License-Identifier: Apache-2.0
"""Bound launches: everything resolved but the contents of arrays."""

from . import cpu, cuda


class Bound:
    """A launch that is called without arguments, any number of times. From `Plan.bind`.

    The compiled kernel, the packed argument struct, grid, block and shared memory are those of the moment it was made;
    on the CPU also the executor's settings, on a GPU the device. What the arrays hold is read when it is called.

    Attributes
    ----------
    plan : Plan
    args : Args
        Keeps the arrays alive.
    buffers : tuple of ndarray
        Those the kernel reaches only through addresses in other arrays; kept alive as well.
    run : callable
        The launch itself: what a call of the object calls.

    Notes
    -----
    On a GPU asynchronous on the stream that is current when it is called. Nothing is checked but the device, and
    neither `runtime.recording` nor `runtime.profiling` sees it.
    """

    __slots__ = ("plan", "args", "buffers", "run")

    def __init__(self, plan, args, buffers=(), const_buffers=()):
        bind = cpu.bind if plan.arch == "cpu" else cuda.bind
        self.plan, self.args, self.buffers = plan, args, (*buffers, *const_buffers)
        self.run = bind(plan, args, buffers, const_buffers)

    def __call__(self):
        self.run()

    def __repr__(self):
        return f"Bound({self.plan.spec.kernel}, {self.plan.arch}, grid={self.plan.grid}, block={self.plan.block})"


class LibraryCall:
    """A call of another library that stands among bound launches."""

    __slots__ = ("name", "run")

    def __init__(self, name, run):
        self.name, self.run = name, run

    def __call__(self):
        self.run()

    def __repr__(self):
        return f"LibraryCall({self.name})"


def in_order(launches):
    """A function without arguments that runs `launches`, of both kinds above, one after the other.

    When that ends early, by an error or Ctrl-C, what they have counted is zero again, as each of them needs it.
    """
    runs = tuple(launch.run for launch in launches)

    def run():
        try:
            for one in runs:
                one()
        except BaseException:
            for launch in launches:
                if isinstance(launch, Bound):
                    cpu.reset_counters(launch.args)
            raise

    return run
