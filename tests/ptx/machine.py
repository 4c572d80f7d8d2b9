"""Runs a kernel: every thread of a batch of blocks at once, the threads at the lowest instruction first.

Threads that stand at the same instruction execute it together, as arrays. Of several such groups the one at the lowest
instruction goes first, so that threads that took the longer path of a branch catch up before code after it runs: the
reconvergence of a Pascal warp for code laid out in order, which a compiler's output is. Blocks are independent, so a
grid runs in batches of blocks that stay small enough for the processor's caches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .counts import Counts
from .dtypes import PtxError, bits_type, numpy_type
from .memory import AccessError, GlobalMemory, LocalMemory, SharedMemory
from .parser import Immediate, Instruction, Kernel, Module, Register, Symbol

_BATCH_THREADS = 1 << 15
_DONE = np.int64(1) << 40
_WAITING = np.int64(1) << 39

# Generic addresses of shared and local memory lie above those of any process.
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 2 << 56


@dataclass(frozen=True)
class Geometry:
    """Grid and block of a launch, (x, y, z), and the bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


def run_plan(module: Module, plan: Any, memory: GlobalMemory) -> Counts:
    """Executes a `_cuda.Plan`: the launch that the driver would be given."""
    arguments = [pack(kind, value) for _, kind, value in plan.args]
    geometry = Geometry(tuple(plan.grid), tuple(plan.block), plan.shared_bytes)
    return run(module, plan.kernel, geometry, arguments, memory)


def pack(kind: str, value: Any) -> bytes:
    """The bytes of an argument of this kind: "pointer", "i32", "f32" or "bytes"."""
    return bytes(value) if kind == "bytes" else struct.pack({"pointer": "<Q", "i32": "<i", "f32": "<f"}[kind], value)


def run(module: Module, name: str, geometry: Geometry, arguments: Sequence[bytes], memory: GlobalMemory) -> Counts:
    """Executes kernel `name` of the module; returns what it did. Raises PtxError for what a GPU would not forgive."""
    if name not in module.kernels:
        raise PtxError(f"the module has no kernel {name}")
    kernel = module.kernels[name]
    parameters = _parameter_bytes(kernel, arguments)
    threads = math.prod(geometry.block)
    if threads > min(1024, kernel.max_threads):
        raise PtxError(f"{name}: a block of {threads} threads, but the kernel allows {kernel.max_threads}")
    if any(g > 65535 for g in geometry.grid[1:]) or geometry.grid[0] > 2**31 - 1:
        raise PtxError(f"{name}: the grid {geometry.grid} is too large")
    shared = kernel.space_size("shared") + geometry.shared_bytes
    if shared > 48 * 1024:
        raise PtxError(f"{name}: {shared} bytes of shared memory, but Pascal gives a block 49152")
    counts = Counts()
    memory.begin()
    blocks = math.prod(geometry.grid)
    batch = max(1, _BATCH_THREADS // (-(-threads // 32) * 32))
    program = _compile(kernel)
    for first in range(0, blocks, batch):
        machine = Machine(kernel, program, geometry, (first, min(batch, blocks - first)), memory, counts)
        machine.parameters = parameters
        with np.errstate(all="ignore"):
            machine.run()
    memory.count_distinct(counts)
    return counts


def _parameter_bytes(kernel: Kernel, arguments: Sequence[bytes]) -> np.ndarray:
    sizes = [parameter.size for parameter in kernel.parameters]
    if [len(argument) for argument in arguments] != sizes:
        got = [len(argument) for argument in arguments]
        raise PtxError(f"{kernel.name}: arguments of {got} bytes, but its parameters have {sizes}")
    buffer = np.zeros(kernel.space_size("param") + 16, np.uint8)
    for parameter, argument in zip(kernel.parameters, arguments):
        buffer[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(argument, np.uint8)
    return buffer


@dataclass(frozen=True)
class Step:
    """An instruction ready to run. `execute` is None for control flow, which the machine does itself."""

    instruction: Instruction
    category: str
    execute: Callable[[Machine, Lanes], None] | None
    target: int = -1

    @property
    def label(self) -> str:
        return ".".join((self.instruction.opcode, *self.instruction.modifiers))


def _compile(kernel: Kernel) -> list[Step]:
    from .ops import CONTROL, build  # the operations need the names of this file

    steps = []
    for instruction in kernel.instructions:
        if instruction.opcode in CONTROL and "warp" not in instruction.modifiers:
            target = kernel.labels[instruction.operands[0].name] if instruction.opcode == "bra" else -1
            steps.append(Step(instruction, "branch" if target >= 0 else CONTROL[instruction.opcode], None, target))
        else:
            execute, category = build(instruction)
            steps.append(Step(instruction, category, execute))
    return steps


class Lanes:
    """Threads of a batch that execute together, in order. `index` selects them from an array over all threads."""

    def __init__(self, threads: np.ndarray) -> None:
        self.threads = threads
        self.count = threads.size
        contiguous = self.count > 0 and threads[-1] - threads[0] + 1 == self.count
        self.index: Any = slice(int(threads[0]), int(threads[-1]) + 1) if contiguous else threads
        self.warp_ids = threads // 32
        self.warps = int(np.count_nonzero(np.diff(self.warp_ids))) + 1 if self.count else 0


class Machine:
    """The state of one batch of blocks: registers, memories, and where each thread stands."""

    def __init__(
        self,
        kernel: Kernel,
        program: list[Step],
        geometry: Geometry,
        batch: tuple[int, int],  # first block, number of blocks
        memory: GlobalMemory,
        counts: Counts,
    ) -> None:
        self.kernel, self.program, self.geometry, self.memory, self.counts = kernel, program, geometry, memory, counts
        self.first_block, self.blocks = batch
        threads = math.prod(geometry.block)
        self.block_threads = -(-threads // 32) * 32  # whole warps; the lanes beyond the block never run
        self.size = self.blocks * self.block_threads
        self.registers: dict[str, np.ndarray] = {}
        self.parameters = np.empty(0, np.uint8)
        self.shared = SharedMemory(self.blocks, kernel.space_size("shared") + geometry.shared_bytes, self.block_threads)
        self.local = LocalMemory(self.size, kernel.space_size("local"))
        self.pc = np.zeros(self.size, np.int64)
        self.pc.reshape(self.blocks, -1)[:, threads:] = _DONE
        self.resume = np.zeros(self.size, np.int64)

    # Scheduling

    def run(self) -> None:
        """Until every thread has left."""
        while True:
            lowest = self.pc.min()
            if lowest >= _WAITING:
                if not self._pass_barriers():
                    return
                continue
            here = self.pc == lowest
            others = self.pc[~here]
            limit = int(others.min()) if others.size else len(self.program)
            self._run_group(int(lowest), Lanes(np.flatnonzero(here)), min(limit, len(self.program)))

    def _run_group(self, pc: int, lanes: Lanes, limit: int) -> None:
        """Runs a group until it forks, waits, leaves, or meets the next group at `limit`."""
        while True:
            if pc >= limit:
                self.pc[lanes.threads] = pc if pc < len(self.program) else _DONE
                return
            step = self.program[pc]
            active = self._guarded(step.instruction, lanes)
            if active.count:
                self._count(step, active)
                if step.execute is not None:
                    self._execute(step, active)
                    pc += 1
                    continue
            if step.execute is not None or not active.count:
                pc += 1
            elif step.category == "branch":
                if active.count == lanes.count:
                    pc = step.target
                else:
                    self.counts.divergent_branches += 1
                    self.pc[lanes.threads] = pc + 1
                    self.pc[active.threads] = step.target
                    return
            elif step.category == "exit":
                self.pc[active.threads] = _DONE
                if active.count == lanes.count:
                    return
                lanes = Lanes(np.setdiff1d(lanes.threads, active.threads, assume_unique=True))
                pc += 1
            else:
                self._wait(step, active, pc + 1)
                if active.count == lanes.count:
                    return
                self.pc[np.setdiff1d(lanes.threads, active.threads)] = pc + 1
                return

    def _guarded(self, instruction: Instruction, lanes: Lanes) -> Lanes:
        if instruction.guard is None:
            return lanes
        holds = self.registers[instruction.guard][lanes.index] != instruction.guard_negated
        if holds.all():
            return lanes
        return Lanes(lanes.threads[holds])

    def _execute(self, step: Step, lanes: Lanes) -> None:
        try:
            step.execute(self, lanes)
        except KeyError as error:
            raise PtxError(f"{self._place(step)}: register {error.args[0]} is read before it is written") from None
        except AccessError as error:
            thread = int(lanes.threads[error.first])
            raise PtxError(f"{self._place(step)}: {error}; {self.describe(thread)}") from None
        except PtxError as error:
            raise PtxError(f"{self._place(step)}: {error}") from None

    def _count(self, step: Step, lanes: Lanes) -> None:
        self.counts.warp_instructions[step.category] += lanes.warps
        self.counts.thread_instructions[step.category] += lanes.count
        self.counts.opcodes[step.label] += lanes.warps

    def _wait(self, step: Step, lanes: Lanes, resume: int) -> None:
        """bar.sync: the lanes stand still until all threads of their block that have not left stand at a barrier."""
        if step.instruction.operands != (Immediate(0),):
            raise PtxError(f"{self._place(step)}: only barrier 0 for the whole block is understood")
        live = (self.pc != _DONE).reshape(-1, 32).sum(axis=1)
        arrived = np.bincount(lanes.warp_ids, minlength=live.size)
        divergent = np.flatnonzero((arrived > 0) & (arrived != live))
        if divergent.size:
            where = self.describe(int(divergent[0]) * 32)
            raise PtxError(f"{self._place(step)}: a barrier in divergent code: the warp is split; {where}")
        self.resume[lanes.threads] = resume
        self.pc[lanes.threads] = _WAITING

    def _pass_barriers(self) -> bool:
        """When no thread can run, every block that waits is complete. Returns whether there was one."""
        waiting = self.pc == _WAITING
        blocks = np.flatnonzero(waiting.reshape(self.blocks, -1).any(axis=1))
        self.counts.barriers += blocks.size
        self.shared.pass_barrier(blocks)
        self.pc[waiting] = self.resume[waiting]
        return blocks.size > 0

    # Operands

    def read(self, operand: object, ptx_type: str, lanes: Lanes) -> np.ndarray:
        """The operand's value in each lane, as the numpy type of ptx_type; a scalar where it is the same for all."""
        if isinstance(operand, Register):
            if operand.name.startswith("%") and operand.name not in self.kernel.registers:
                bits = self._special(operand.name, lanes)
            else:
                bits = self.registers[operand.name][lanes.index]
        elif isinstance(operand, Immediate):
            bits = _immediate(operand, ptx_type)
        elif isinstance(operand, Symbol):
            bits = np.uint64(self.address_of(operand.name))
        else:
            raise PtxError(f"operand {operand} has no value")
        if ptx_type == "pred":
            return bits
        stored = bits_type(ptx_type)
        if bits.dtype != stored:
            bits = bits.astype(stored)  # the low bits of a wider register
        return bits.view(numpy_type(ptx_type))

    def write(self, operand: object, value: np.ndarray, lanes: Lanes) -> None:
        """Sets a register in the lanes; a value narrower than it is extended by its own sign."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot be written")
        if operand.name == "_":
            return
        if operand.name not in self.kernel.registers:
            raise PtxError(f"register {operand.name} is not declared")
        stored = bits_type(self.kernel.registers[operand.name])
        value = np.asarray(value)
        if value.dtype.itemsize != stored.itemsize and stored.kind != "b":
            kind = "i" if value.dtype.kind == "i" else "u"
            if value.dtype.kind == "f":
                value = value.view(f"u{value.dtype.itemsize}")
            value = value.astype(f"{kind}{stored.itemsize}")
        register = self.registers.get(operand.name)
        if register is None:
            register = self.registers[operand.name] = np.zeros(self.size, stored)
        register[lanes.index] = value.view(stored)

    def address_of(self, name: str) -> int:
        """The offset of a variable in its own state space."""
        variable = self.kernel.variables.get(name)
        if variable is None:
            raise PtxError(f"variable {name} is not understood: only a kernel's own .shared, .local and .param are")
        return variable.offset

    def _special(self, name: str, lanes: Lanes) -> np.ndarray:
        block, thread = np.divmod(lanes.threads, self.block_threads)
        base, _, axis = name[1:].partition(".")
        if base == "laneid":
            return (thread % 32).astype(np.uint32)
        sizes = {"tid": self.geometry.block, "ntid": self.geometry.block}.get(base, self.geometry.grid)
        at = "xyz".index(axis) if axis else 0
        if base in ("ntid", "nctaid"):
            return np.uint32(sizes[at])
        if base not in ("tid", "ctaid"):
            raise PtxError(f"special register {name} is not understood")
        linear = thread if base == "tid" else block + self.first_block
        return (linear // math.prod(sizes[:at]) % sizes[at]).astype(np.uint32)

    def left(self) -> np.ndarray:
        """Which threads have left the kernel."""
        return self.pc == _DONE

    # Messages

    def _place(self, step: Step) -> str:
        return f"{self.kernel.name}, line {step.instruction.line}: `{step.instruction.text}`"

    def describe(self, thread: int) -> str:
        """The coordinates of a thread of this batch."""
        block, linear = divmod(thread, self.block_threads)
        x, y, _ = self.geometry.block
        gx, gy, _ = self.geometry.grid
        block += self.first_block
        coordinates = (linear % x, linear // x % y, linear // (x * y))
        return f"block ({block % gx}, {block // gx % gy}, {block // (gx * gy)}), thread {coordinates}"


def _immediate(operand: Immediate, ptx_type: str) -> np.ndarray:
    if ptx_type == "pred":
        return np.bool_(operand.value)
    stored = bits_type(ptx_type)
    return np.array(operand.value % (1 << 8 * stored.itemsize), dtype=stored)[()]
