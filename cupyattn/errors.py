# SPDX-License-Identifier: Apache-2.0
"""The exceptions of cupyattn that NumPy has no name for."""


class CompileError(RuntimeError):
    """A kernel could not be compiled, or no compiler was found.

    The message holds the command and the first lines of the compiler's complaint.
    """


class CaptureError(RuntimeError):
    """A step did something while it was captured that its replays would not repeat."""


class KernelCheckError(RuntimeError):
    """The CPU executor caught a kernel doing something a GPU would not forgive.

    Attributes
    ----------
    kind : str
        ``"out_of_bounds"``, ``"read_only_write"``, ``"uninitialised_shared"``, ``"race"``, ``"divergent_barrier"``,
        ``"deadlock"``, ``"collective_mismatch"``, ``"stack_overflow"``, ``"global_race"``, ``"bad_launch"`` or
        ``"misaligned"``.
    kernel : str
        Symbol of the kernel.
    location, other_location : str or None
        ``file:line`` of the fault and, for races and barriers, of the access it collides with.
    block, thread : tuple of int
        Block and thread index ``(x, y, z)``.
    argument : str or None
        Field of the argument struct whose buffer was involved.
    """

    def __init__(self, message, *, kind, kernel, location=None, other_location=None, block=(0, 0, 0),
                 thread=(0, 0, 0), argument=None):
        super().__init__(message)
        self.kind = kind
        self.kernel = kernel
        self.location = location
        self.other_location = other_location
        self.block = block
        self.thread = thread
        self.argument = argument
