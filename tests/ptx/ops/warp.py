"""Exchanges between the lanes of a warp.

On Pascal the lanes named by a mask must be converged: one that is not here (and has not left the kernel) is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import PtxError
from ..memory import AccessError
from ..parser import Instruction
from .registry import Execute, general

if TYPE_CHECKING:
    from ..machine import Lanes, Machine


def _present(machine: Machine, lanes: Lanes) -> np.ndarray:
    """(warps, 32): which lanes execute this instruction."""
    present = np.zeros(machine.size, bool)
    present[lanes.threads] = True
    return present.reshape(-1, 32)


def _check_mask(machine: Machine, lanes: Lanes, mask: np.ndarray) -> np.ndarray:
    """Checks the member mask of each lane; returns (warps, 32) presence."""
    present = _present(machine, lanes)
    mask = np.broadcast_to(mask, lanes.count)
    lane = (lanes.threads % 32).astype(np.uint32)
    if not ((mask >> lane) & 1).all():
        raise PtxError("a lane executes this without being in its own member mask")
    left = machine.left().reshape(-1, 32)
    named = (mask[:, None] >> np.arange(32, dtype=np.uint32)) & 1 == 1
    missing = (named & ~present[lanes.warp_ids] & ~left[lanes.warp_ids]).any(axis=1)
    if missing.any():
        raise AccessError("a lane named by the member mask is not here: the warp is split", np.flatnonzero(missing))
    return present


@general("shfl", category="shuffle", modifiers=("sync", "bfly", "up", "down", "idx"))
def _shuffle(instruction: Instruction) -> Execute:
    """d = a of another lane; p = whether that lane is in range. PTX ISA, "shfl.sync"."""
    if "sync" not in instruction.modifiers:
        raise PtxError(f"line {instruction.line}: shfl without .sync is not understood")
    mode = instruction.modifiers[1]
    *targets, source, distance, clamp, mask = instruction.operands

    def execute(machine: Machine, lanes: Lanes) -> None:
        present = _check_mask(machine, lanes, machine.read(mask, "u32", lanes))
        lane = lanes.threads % 32
        b = machine.read(distance, "u32", lanes).astype(np.int64) & 31
        c = machine.read(clamp, "u32", lanes).astype(np.int64)
        segment = (c >> 8) & 31
        last = (lane & segment) | (c & 31 & ~segment)
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b}.get(mode, (lane & segment) | (b & ~segment))
        in_range = other >= last if mode == "up" else other <= last
        other = np.where(in_range, other, lane)
        absent = ~present[lanes.warp_ids, other]
        if absent.any():
            raise AccessError("reads from a lane that is not active", np.flatnonzero(absent))
        values = np.zeros(machine.size, np.uint32)
        values[lanes.threads] = machine.read(source, "b32", lanes)
        machine.write(targets[0], values[lanes.warp_ids * 32 + other], lanes)
        if len(targets) == 2:
            machine.write(targets[1], in_range, lanes)

    return execute


@general("vote", category="vote", modifiers=("sync", "all", "any", "uni", "ballot"))
def _vote(instruction: Instruction) -> Execute:
    if "sync" not in instruction.modifiers:
        raise PtxError(f"line {instruction.line}: vote without .sync is not understood")
    mode = instruction.modifiers[1]
    target, predicate, mask = instruction.operands

    def execute(machine: Machine, lanes: Lanes) -> None:
        members = np.broadcast_to(machine.read(mask, "u32", lanes), lanes.count)
        _check_mask(machine, lanes, members)
        holds = np.zeros(machine.size, bool)
        holds[lanes.threads] = machine.read(predicate, "pred", lanes)
        ballots = _ballot(holds)[lanes.warp_ids] & members
        here = _ballot(_present(machine, lanes).reshape(-1))[lanes.warp_ids] & members
        results = {
            "ballot": ballots,
            "any": ballots != 0,
            "all": ballots == here,
            "uni": (ballots == 0) | (ballots == here),
        }
        machine.write(target, results[mode], lanes)

    return execute


def _ballot(holds: np.ndarray) -> np.ndarray:
    """One bit per lane, one word per warp."""
    return np.packbits(holds.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).reshape(-1)


@general("activemask", category="vote")
def _active_mask(instruction: Instruction) -> Execute:
    def execute(machine: Machine, lanes: Lanes) -> None:
        machine.write(instruction.operands[0], _ballot(_present(machine, lanes))[lanes.warp_ids], lanes)

    return execute


@general("bar", "barrier", category="fence", modifiers=("warp", "sync"))
def _warp_barrier(instruction: Instruction) -> Execute:
    """bar.warp.sync: orders the shared memory accesses of the lanes. The barrier of a block is the machine's own."""

    def execute(machine: Machine, lanes: Lanes) -> None:
        _check_mask(machine, lanes, machine.read(instruction.operands[0], "u32", lanes))
        machine.shared.pass_warp_barrier(np.unique(lanes.warp_ids))

    return execute
