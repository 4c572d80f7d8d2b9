"""cvt, mov and cvta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import PtxError, bits_type, numpy_type
from ..parser import Instruction, Symbol, Vector
from .arithmetic import ROUNDING, flushed, narrowed
from .registry import Elementwise, Execute, elementwise, general

if TYPE_CHECKING:
    from ..machine import Lanes, Machine

# To an integer value: nearest even, towards zero, down, up.
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_CVT_MODIFIERS = (*_TO_INTEGER, *ROUNDING, "sat", "ftz")


@elementwise("cvt", category="convert", modifiers=_CVT_MODIFIERS)
def _convert(instruction: Instruction) -> Elementwise:
    to, source = instruction.types
    to_float, from_float = to.startswith("f"), source.startswith("f")
    rounding = next((m for m in instruction.modifiers if m in _CVT_MODIFIERS[:-2]), None)
    saturate = "sat" in instruction.modifiers
    target = numpy_type(to)
    if from_float and to_float:
        if rounding in _TO_INTEGER:
            function = lambda x: _TO_INTEGER[rounding](x).astype(target)  # noqa: E731
        else:
            function = lambda x: narrowed(x.astype(np.float64), target, rounding or "rn")  # noqa: E731
        return Elementwise((source,), flushed(function, instruction), to)
    if from_float:
        return Elementwise((source,), lambda x: _float_to_integer(_TO_INTEGER[rounding](x), target), to)
    if to_float and rounding != "rn":
        raise PtxError(f"line {instruction.line}: rounding .{rounding} of an integer is not understood")
    if not to_float and saturate:
        limits = np.iinfo(target)
        return Elementwise((source,), lambda x: _clamp(x, limits.min, limits.max).astype(target), to)
    return Elementwise((source,), lambda x: x.astype(target), to)


def _clamp(x: np.ndarray, low: int, high: int) -> np.ndarray:
    own = np.iinfo(x.dtype)
    return np.clip(x, max(low, own.min), min(high, own.max))


def _float_to_integer(x: np.ndarray, target: np.dtype) -> np.ndarray:
    """Out of range gives the nearest limit; NaN gives 0 for up to 32 bits, the sign bit for 64."""
    limits = np.iinfo(target)
    wide = np.asarray(x, np.float64)
    nan_value = 0 if target.itemsize < 8 else 1 << 63
    # float(2^63 - 1) is 2^63 already, so "<" is right for 64 bits; below, the limit itself is inside.
    beyond = float(limits.max) if target.itemsize == 8 else float(limits.max) + 1
    inside = (wide >= limits.min) & (wide < beyond)
    value = np.where(inside, wide, 0).astype(target)
    value = np.where(~inside, np.where(wide < 0, target.type(limits.min), target.type(limits.max)), value)
    return np.where(np.isnan(wide), np.array(nan_value, np.uint64).astype(target), value)


@general("mov", category="move")
def _move(instruction: Instruction) -> Execute:
    """Also packs {a, b} into a register and unpacks it, lowest part first, and takes a variable's address."""
    dtype = instruction.types[0]
    target, source = instruction.operands

    def unpack(machine: Machine, lanes: Lanes) -> None:
        part_bits = 8 * bits_type(dtype).itemsize // len(target.items)
        value = machine.read(source, dtype, lanes)
        for i, item in enumerate(target.items):
            part = value.view(bits_type(dtype)) >> bits_type(dtype).type(i * part_bits)
            machine.write(item, part.astype(f"u{part_bits // 8}"), lanes)

    def pack(machine: Machine, lanes: Lanes) -> None:
        stored = bits_type(dtype)
        part_bits = 8 * stored.itemsize // len(source.items)
        total = stored.type(0)
        for i, item in enumerate(source.items):
            total = total | machine.read(item, f"b{part_bits}", lanes).astype(stored) << stored.type(i * part_bits)
        machine.write(target, np.asarray(total), lanes)

    def copy(machine: Machine, lanes: Lanes) -> None:
        machine.write(target, machine.read(source, dtype, lanes), lanes)

    return unpack if isinstance(target, Vector) else pack if isinstance(source, Vector) else copy


@general("cvta", category="int", modifiers=("to", "global", "shared", "local", "const"))
def _convert_address(instruction: Instruction) -> Execute:
    """Between an address in a state space and a generic one. Global addresses are generic ones."""
    from ..machine import LOCAL_WINDOW, SHARED_WINDOW

    space = next(m for m in instruction.modifiers if m in ("global", "shared", "local", "const"))
    window = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space)
    if window is None:
        raise PtxError(f"line {instruction.line}: state space .{space} is not understood")
    target, source = instruction.operands
    shift = np.uint64(window) if "to" not in instruction.modifiers else np.uint64(-window % (1 << 64))
    if isinstance(source, Symbol) and space == "global":
        raise PtxError(f"line {instruction.line}: global variables are not understood")

    def execute(machine: Machine, lanes: Lanes) -> None:
        machine.write(target, machine.read(source, "u64", lanes) + shift, lanes)

    return execute
