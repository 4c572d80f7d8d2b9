"""How an opcode is registered.

An elementwise opcode is a function from an instruction to `Elementwise`: the types of its sources, the function of
arrays, the type of its result. Anything else is a function from an instruction to one that executes it on
(machine, lanes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import PtxError, numpy_type
from ..parser import Instruction

if TYPE_CHECKING:
    from ..machine import Lanes, Machine

Execute = Callable[["Machine", "Lanes"], None]

# Control flow, which the machine does itself, with its class in the counts.
CONTROL = {"bra": "branch", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}


@dataclass(frozen=True)
class Elementwise:
    """result = function(*sources), thread by thread."""

    source_types: tuple[str, ...]
    function: Callable[..., Any]
    result_type: str


_builders: dict[str, Callable[[Instruction], tuple[Execute, str]]] = {}


def elementwise(*opcodes: str, category: str | None = None, modifiers: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Registers a builder of an `Elementwise`. A modifier that is neither a type nor in `modifiers` is an error.

    Without a category it is that of the result: "fp64", "fp32", "fp16" or "int".
    """

    def register(define: Callable[[Instruction], Elementwise]) -> Callable[[Instruction], Elementwise]:
        def builder(instruction: Instruction) -> tuple[Execute, str]:
            check_modifiers(instruction, modifiers)
            operation = define(instruction)
            return _execute(instruction, operation), category or arithmetic_category(operation.result_type)

        _builders.update(dict.fromkeys(opcodes, builder))
        return define

    return register


def _execute(instruction: Instruction, operation: Elementwise) -> Execute:
    target, *sources = instruction.operands
    if len(sources) != len(operation.source_types):
        raise PtxError(f"line {instruction.line}: `{instruction.text}` has {len(sources)} sources")
    pairs = list(zip(sources, operation.source_types))
    result_type = numpy_type(operation.result_type)
    function = operation.function

    def execute(machine: Machine, lanes: Lanes) -> None:
        value = function(*(machine.read(operand, dtype, lanes) for operand, dtype in pairs))
        machine.write(target, np.asarray(value).astype(result_type, copy=False), lanes)

    return execute


def general(*opcodes: str, category: str, modifiers: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Registers a builder of a function that executes the instruction on (machine, lanes)."""

    def register(define: Callable[[Instruction], Execute]) -> Callable[[Instruction], Execute]:
        def builder(instruction: Instruction) -> tuple[Execute, str]:
            check_modifiers(instruction, modifiers)
            return define(instruction), category

        _builders.update(dict.fromkeys(opcodes, builder))
        return define

    return register


def with_category(*opcodes: str) -> Callable[[Any], Any]:
    """Registers a builder that returns (execute, category) itself."""

    def register(define: Callable[[Instruction], tuple[Execute, str]]) -> Callable[..., Any]:
        _builders.update(dict.fromkeys(opcodes, define))
        return define

    return register


def build(instruction: Instruction) -> tuple[Execute, str]:
    """(execute, category) of an instruction. Raises PtxError that names what is not understood."""
    builder = _builders.get(instruction.opcode)
    if builder is None:
        raise PtxError(f"line {instruction.line}: opcode {instruction.opcode} is not understood: `{instruction.text}`")
    return builder(instruction)


def check_modifiers(instruction: Instruction, allowed: tuple[str, ...]) -> None:
    """Raises PtxError for a modifier that would be ignored."""
    unknown = [m for m in instruction.modifiers if m not in allowed and m not in instruction.types]
    if unknown:
        raise PtxError(f"line {instruction.line}: modifier .{unknown[0]} of `{instruction.text}` is not understood")


def arithmetic_category(ptx_type: str) -> str:
    """The class of an arithmetic instruction of this type."""
    return {"f64": "fp64", "f32": "fp32", "f16": "fp16", "f16x2": "fp16"}.get(ptx_type, "int")
