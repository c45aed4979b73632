# SPDX-License-Identifier: Apache-2.0
"""Compiling and launching: the only code that does either."""

from .bound import Bound
from .launch import (
    arch_of,
    arrival_counters,
    compile_all,
    compile_first,
    launch,
    layer_workspace,
    profiling,
    recording,
    workspace,
)
from .plan import Plan, Specialisation, make_args
from .prepared import Prepared, Template

__all__ = ["Bound", "Plan", "Prepared", "Specialisation", "Template", "arch_of", "arrival_counters", "compile_all",
           "compile_first", "launch", "layer_workspace", "make_args", "profiling", "recording", "workspace"]
