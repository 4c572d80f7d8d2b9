"""A PTX interpreter: runs on a CPU the very PTX that the build ships, counts what it does and finds what it does wrong.

    module = load(path)                        a .ptx file
    memory = GlobalMemory()                    the buffers that a kernel may touch, at their own addresses
    memory.add_tensor("x", x, writable=False)
    counts = run_plan(module, plan, memory)    what the driver would be given

It finds accesses out of bounds or misaligned, loads of shared memory that nobody wrote, races in shared memory,
barriers and shuffles in divergent code, and registers that are read before they are written.

README.md says how to add an opcode.
"""

from __future__ import annotations

import functools
from pathlib import Path

from .counts import Counts
from .dtypes import PtxError
from .machine import Geometry, run, run_plan
from .memory import GlobalMemory
from .parser import Module, parse

__all__ = ["Counts", "Geometry", "GlobalMemory", "Module", "PtxError", "load", "parse", "run", "run_plan"]


@functools.cache
def load(path: Path) -> Module:
    """The module of a .ptx file."""
    return parse(path.read_text())
