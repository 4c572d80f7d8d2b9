"""ld and st in every state space, and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import PtxError, bits_type
from ..memory import count_bank_passes, count_sectors
from ..parser import Address, Instruction, Symbol, Vector
from .registry import Execute, general, with_category

if TYPE_CHECKING:
    from ..machine import Lanes, Machine

_SPACES = ("param", "global", "shared", "local")
# How an access is cached or ordered: of no consequence where threads run in order.
_HINTS = ("nc", "volatile", "weak", "relaxed", "acquire", "release", "cta", "gpu", "sys", "ca", "cg", "cs", "lu")
_HINTS += ("cv", "wb", "wt", "v2", "v4")


def _parse(instruction: Instruction) -> tuple[str, str, int]:
    """(state space or "generic", type, number of elements)"""
    space, count = "generic", 1
    for modifier in instruction.modifiers:
        if modifier in _SPACES:
            space = modifier
        elif modifier in ("v2", "v4"):
            count = int(modifier[1:])
        elif modifier not in _HINTS and modifier not in instruction.types and not modifier.startswith(("L1_", "L2_")):
            raise PtxError(f"line {instruction.line}: modifier .{modifier} of `{instruction.text}` is not understood")
    return space, instruction.types[-1], count


def _addresses(machine: Machine, address: Address, lanes: Lanes) -> np.ndarray:
    if isinstance(address.base, Symbol):
        base: np.ndarray = np.uint64(machine.address_of(address.base.name))
    else:
        base = machine.read(address.base, _address_type(machine, address), lanes).astype(np.uint64)
    moved = base + np.uint64(address.offset % (1 << 64))
    return np.ascontiguousarray(np.broadcast_to(moved, lanes.count))


def _address_type(machine: Machine, address: Address) -> str:
    """Shared and local addresses may be held in 32 bits."""
    return "u32" if machine.kernel.registers.get(getattr(address.base, "name", "")) in ("b32", "u32", "s32") else "u64"


def _space_of(machine: Machine, space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """Resolves a generic address by the window it lies in."""
    from ..machine import LOCAL_WINDOW, SHARED_WINDOW

    if space != "generic":
        return space, addresses
    windows = np.unique(addresses & np.uint64(SHARED_WINDOW | LOCAL_WINDOW))
    if windows.size != 1:
        raise PtxError("generic addresses of one instruction in several state spaces are not understood")
    window = int(windows[0])
    names = {0: "global", SHARED_WINDOW: "shared", LOCAL_WINDOW: "local"}
    return names[window], addresses - np.uint64(window)


def _items(operand: object) -> tuple[object, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _category(verb: str, space: str) -> str:
    return "param" if space == "param" else f"{verb}_{'global' if space == 'generic' else space}"


@with_category("ld")
def _load(instruction: Instruction) -> tuple[Execute, str]:
    space, dtype, count = _parse(instruction)
    target, address = instruction.operands
    items, stored = _items(target), bits_type(dtype)
    signed = dtype.startswith("s")  # narrower than the register: extended by its sign

    def execute(machine: Machine, lanes: Lanes) -> None:
        if space == "param" and isinstance(address.base, Symbol):
            at = machine.address_of(address.base.name) + address.offset
            values = machine.parameters[at : at + stored.itemsize * count].view(stored)[None, :]
        else:
            values = _load_values(machine, lanes, *_space_of(machine, space, _addresses(machine, address, lanes)))
        for i, item in enumerate(items):
            value = np.ascontiguousarray(values[:, i])
            machine.write(item, value.view(f"i{stored.itemsize}") if signed else value, lanes)

    def _load_values(machine: Machine, lanes: Lanes, where: str, addresses: np.ndarray) -> np.ndarray:
        width = stored.itemsize * count
        if where == "global":
            machine.counts.loaded_bytes += width * lanes.count
            machine.counts.loaded_sectors += count_sectors(lanes.warp_ids, addresses)
            return machine.memory.load(addresses, stored, count)
        if where == "shared":
            _count_shared(machine, lanes, addresses, width)
            return machine.shared.load(lanes.threads, addresses, stored, count)
        if where == "local":
            return machine.local.load(lanes.threads, addresses, stored, count)
        raise PtxError("a parameter's address in a register is not understood")

    return execute, _category("load", space)


@with_category("st")
def _store(instruction: Instruction) -> tuple[Execute, str]:
    space, dtype, count = _parse(instruction)
    address, source = instruction.operands
    items, width = _items(source), bits_type(dtype).itemsize * count
    if space == "param":
        raise PtxError(f"line {instruction.line}: calls are not understood")

    def execute(machine: Machine, lanes: Lanes) -> None:
        where, addresses = _space_of(machine, space, _addresses(machine, address, lanes))
        values = np.empty((lanes.count, count), bits_type(dtype))
        for i, item in enumerate(items):
            values[:, i] = machine.read(item, f"b{8 * bits_type(dtype).itemsize}", lanes)
        if where == "global":
            machine.counts.stored_bytes += width * lanes.count
            machine.counts.stored_sectors += count_sectors(lanes.warp_ids, addresses)
            machine.memory.store(addresses, values)
        elif where == "shared":
            _count_shared(machine, lanes, addresses, width)
            machine.shared.store(lanes.threads, addresses, values)
        else:
            machine.local.store(lanes.threads, addresses, values)

    return execute, _category("store", space)


def _count_shared(machine: Machine, lanes: Lanes, addresses: np.ndarray, width: int) -> None:
    accesses, conflicts = count_bank_passes(lanes.threads, addresses, width)
    machine.counts.shared_accesses += accesses
    machine.counts.bank_conflicts += conflicts


@general("membar", "fence", category="fence", modifiers=("cta", "gl", "sys", "gpu", "acq_rel", "sc"))
def _fence(instruction: Instruction) -> Execute:
    return lambda machine, lanes: None
