"""The opcodes, by class. `build` turns an instruction into a function that executes it."""

from . import arithmetic, convert, logic, memory, warp  # noqa: F401  (each registers its opcodes)
from .registry import CONTROL, build

__all__ = ["CONTROL", "build"]
