"""Bits, shifts, comparisons, selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import PtxError, numpy_type
from ..parser import Instruction
from .registry import Elementwise, Execute, check_modifiers, elementwise, with_category

if TYPE_CHECKING:
    from ..machine import Lanes, Machine

_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@elementwise(*_BITWISE, category="int")
def _bitwise(instruction: Instruction) -> Elementwise:
    return Elementwise((instruction.types[0],) * 2, _BITWISE[instruction.opcode], instruction.types[0])


@elementwise("not", category="int")
def _not(instruction: Instruction) -> Elementwise:
    return Elementwise(instruction.types, np.invert, instruction.types[0])


@elementwise("shl", "shr", category="int")
def _shift(instruction: Instruction) -> Elementwise:
    """Amounts beyond the width give 0, or the sign."""
    dtype = numpy_type(instruction.types[0])
    bits = dtype.itemsize * 8

    def shift(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
        small = np.minimum(amount, bits - 1).astype(dtype)
        if instruction.opcode == "shr" and dtype.kind == "i":
            return a >> small
        moved = a << small if instruction.opcode == "shl" else a >> small
        return np.where(amount >= bits, dtype.type(0), moved)

    return Elementwise((instruction.types[0], "u32"), shift, instruction.types[0])


@elementwise("shf", category="int", modifiers=("l", "r", "wrap", "clamp"))
def _funnel_shift(instruction: Instruction) -> Elementwise:
    """32 bits of the 64-bit value (b, a) shifted."""
    left, wrap = instruction.modifiers[0] == "l", instruction.modifiers[1] == "wrap"

    def shift(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        by = (amount & np.uint32(31) if wrap else np.minimum(amount, 32)).astype(np.uint64)
        return (both << by) >> np.uint64(32) if left else both >> by

    return Elementwise(("u32",) * 3, lambda *x: shift(*x).astype(np.uint32), "u32")


@elementwise("lop3", category="int")
def _lop3(instruction: Instruction) -> Elementwise:
    """Any function of three bits, given as a table of 8."""

    def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for case in range(8):
            if int(table) >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return Elementwise(("u32",) * 4, logic, "b32")


@elementwise("bfe", category="int")
def _extract_field(instruction: Instruction) -> Elementwise:
    """`length` bits of a from `start`, extended by their sign for signed types."""
    dtype = instruction.types[0]
    bits, signed = int(dtype[1:]), dtype.startswith("s")

    def extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(x & np.uint32(255), bits).astype(np.int64) for x in (start, length))
        wide = np.asarray(a).astype(object) % (1 << bits)
        top = np.minimum(start + length, bits)
        field = (wide >> start.astype(object)) % (1 << np.maximum(top - start, 0).astype(object))
        sign_at = np.minimum(start + length - 1, bits - 1)
        negative = (signed & (length > 0)) & ((wide >> np.maximum(sign_at, 0).astype(object)) % 2 == 1)
        extended = field - np.where(negative, 1 << np.maximum(top - start, 0).astype(object), 0)
        return (extended % (1 << bits)).astype(f"u{bits // 8}").view(numpy_type(dtype))

    return Elementwise((dtype, "u32", "u32"), lambda *x: extract(*map(np.atleast_1d, x)), dtype)


@elementwise("bfi", category="int")
def _insert_field(instruction: Instruction) -> Elementwise:
    """b with `length` bits from `start` taken from the low bits of a."""
    dtype = instruction.types[0]
    bits, unsigned = int(dtype[1:]), numpy_type(dtype)

    def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (np.minimum(x & np.uint32(255), bits).astype(np.uint64) for x in (start, length))
        ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1))
        mask = np.where(start >= 64, np.uint64(0), ones << np.minimum(start, 63))
        moved = np.where(start >= 64, np.uint64(0), a.astype(np.uint64) << np.minimum(start, 63))
        return ((b.astype(np.uint64) & ~mask) | (moved & mask)).astype(unsigned)

    return Elementwise((dtype, dtype, "u32", "u32"), insert, dtype)


@elementwise("prmt", category="int")
def _permute_bytes(instruction: Instruction) -> Elementwise:
    """Each nibble of the selector names a byte of (b, a), or its sign spread over the byte."""

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(np.broadcast(both, selector).shape, np.uint64)
        for byte in range(4):
            nibble = (selector >> np.uint32(4 * byte)).astype(np.uint64) & np.uint64(15)
            value = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(value >= 128, np.uint64(255), np.uint64(0))
            result |= np.where(nibble >= 8, sign, value) << np.uint64(8 * byte)
        return result.astype(np.uint32)

    return Elementwise(("u32",) * 3, permute, "b32")


@elementwise("popc", "clz", "brev", category="int")
def _count_bits(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    bits = int(dtype[1:])

    def count(a: np.ndarray) -> np.ndarray:
        a = np.atleast_1d(a)
        digits = np.unpackbits(a.view(np.uint8).reshape(a.size, -1), axis=1, bitorder="little")  # lowest bit first
        if instruction.opcode == "popc":
            return digits.sum(axis=1, dtype=np.uint32)
        if instruction.opcode == "clz":
            return np.where(digits.any(axis=1), digits[:, ::-1].argmax(axis=1), bits).astype(np.uint32)
        return np.packbits(digits[:, ::-1], axis=1, bitorder="little").view(a.dtype).reshape(-1)

    return Elementwise((dtype,), count, dtype if instruction.opcode == "brev" else "u32")


def _ordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
_COMPARE |= {"gt": np.greater, "ge": np.greater_equal}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_FLOAT_COMPARE = {name: _ordered(function) for name, function in _COMPARE.items()}
_FLOAT_COMPARE |= {name + "u": _unordered(function) for name, function in _COMPARE.items()}
_FLOAT_COMPARE |= {
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@with_category("setp")
def _set_predicate(instruction: Instruction) -> tuple[Execute, str]:
    """p = (a cmp b) op c; q = !(a cmp b) op c."""
    dtype, compare_name = instruction.types[-1], instruction.modifiers[0]
    combine = next((_BITWISE[m] for m in instruction.modifiers[1:] if m in _BITWISE), None)
    check_modifiers(instruction, (compare_name, "ftz", *_BITWISE))
    table = _FLOAT_COMPARE if dtype.startswith("f") else _COMPARE | _UNSIGNED
    if compare_name not in table or "ftz" in instruction.modifiers:
        raise PtxError(f"line {instruction.line}: `{instruction.text}` is not understood")
    compare = table[compare_name]
    sources = 2 if combine is None else 3
    targets, operands = instruction.operands[:-sources], instruction.operands[-sources:]

    def execute(machine: Machine, lanes: Lanes) -> None:
        holds = compare(machine.read(operands[0], dtype, lanes), machine.read(operands[1], dtype, lanes))
        for target, value in zip(targets, (holds, ~np.asarray(holds))):
            if combine is not None:
                value = combine(value, machine.read(operands[2], "pred", lanes))
            machine.write(target, np.asarray(value, bool), lanes)

    return execute, "predicate"


@elementwise("selp", category="predicate")
def _select(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    return Elementwise((dtype, dtype, "pred"), lambda a, b, p: np.where(p, a, b), dtype)
