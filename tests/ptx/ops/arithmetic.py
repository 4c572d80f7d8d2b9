"""Integer and floating-point arithmetic, with IEEE rounding where PTX promises it.

The approximations (rsqrt, ex2, lg2, sin, cos, tanh, div.approx, ...) are computed in float64 and rounded once: a GPU's
may be off by what the PTX ISA states for each. A GPU may also fuse mul and add where neither names a rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ..dtypes import PtxError, numpy_type
from ..parser import Instruction
from .registry import Elementwise, elementwise

_MODIFIERS = ("rn", "ftz", "sat", "approx", "full", "lo", "wide", "hi")


def _is_float(dtype: str) -> bool:
    return dtype.startswith("f")


def flushed(function: Callable[..., np.ndarray], instruction: Instruction) -> Callable[..., np.ndarray]:
    """With .ftz subnormal float32 sources and results become zero; with .sat results are clamped to [0, 1]."""
    flush, saturate = "ftz" in instruction.modifiers, "sat" in instruction.modifiers
    if not flush and not saturate:
        return function

    def to_zero(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    def wrapped(*sources: np.ndarray) -> np.ndarray:
        value = function(*map(to_zero, sources)) if flush else function(*sources)
        if saturate:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        return to_zero(value) if flush else value

    return wrapped


ROUNDING = ("rn", "rz", "rm", "rp")  # to nearest even, towards zero, down, up


def narrowed(exact: np.ndarray, dtype: np.dtype, mode: str) -> np.ndarray:
    """float64 -> float32 or float16 in a rounding mode; numpy's own is "rn"."""
    value = np.asarray(exact).astype(dtype)
    if mode == "rn":
        return value
    towards_minus = {"rm": True, "rp": False, "rz": np.asarray(exact) > 0}[mode]
    past = np.where(towards_minus, value > exact, value < exact)
    limit = np.where(towards_minus, -np.inf, np.inf).astype(dtype)
    return np.where(past, np.nextafter(value, limit), value)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """a b + c rounded once, for float32 and float16.

    The product is exact in float64. The sum is rounded to odd (Boldo and Melquiond, 2008), so that rounding it again is
    rounding once: where it is inexact and its last bit is even, it moves one step towards the exact value.
    """
    product = np.asarray(a, np.float64) * b
    addend = np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = np.atleast_1d(total).view(np.int64)
    move = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    exact = (bits + np.where(move, towards, 0)).view(np.float64)
    return narrowed(exact.reshape(total.shape), np.result_type(a), mode)


def _halves(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Applies a function of float16 to both halves of each 32-bit value."""

    def both(*sources: np.ndarray) -> np.ndarray:
        sources = np.broadcast_arrays(*(np.atleast_1d(s) for s in sources))
        return function(*(np.ascontiguousarray(s).view(np.float16) for s in sources)).view(np.uint32)

    return both


@elementwise("add", "sub", "mul", modifiers=_MODIFIERS)
def _basic(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[instruction.opcode]
    if dtype == "f16x2":
        return Elementwise((dtype,) * 2, _halves(function), dtype)
    if _is_float(dtype):
        return Elementwise((dtype,) * 2, flushed(function, instruction), dtype)
    if instruction.opcode == "mul":
        return _integer_product(instruction, dtype)
    if "sat" in instruction.modifiers:
        raise PtxError(f"line {instruction.line}: integer .sat is not understood")
    return Elementwise((dtype,) * 2, function, dtype)


def _wider(dtype: str) -> str:
    return f"{dtype[0]}{int(dtype[1:]) * 2}"


def _product(dtype: str, part: str) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], str]:
    """The low half, the high half or all of an integer product, and its type."""
    if part == "lo":
        return np.multiply, dtype
    if part == "hi" and dtype.endswith("64"):
        return _high_64(dtype), dtype
    wide, bits = numpy_type(_wider(dtype)), int(dtype[1:])
    if part == "wide":
        return lambda a, b: np.multiply(a.astype(wide), b.astype(wide)), _wider(dtype)
    return lambda a, b: np.multiply(a.astype(wide), b.astype(wide)) >> wide.type(bits), dtype


def _high_64(dtype: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
        return (exact >> 64).astype(numpy_type(dtype))

    return high


def _integer_product(instruction: Instruction, dtype: str) -> Elementwise:
    part = next(m for m in instruction.modifiers if m in ("lo", "hi", "wide"))
    function, result = _product(dtype, part)
    return Elementwise((dtype,) * 2, function, result)


@elementwise("mad", modifiers=("lo", "hi", "wide"))
def _multiply_add(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    if _is_float(dtype):
        raise PtxError(f"line {instruction.line}: mad of floats is not understood")
    function, result = _product(dtype, instruction.modifiers[0])
    return Elementwise((dtype, dtype, result), lambda a, b, c: function(a, b).astype(c.dtype) + c, result)


@elementwise("fma", modifiers=(*ROUNDING, "ftz", "sat"))
def _fma(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    if dtype == "f64":
        raise PtxError(f"line {instruction.line}: fma of float64 is not understood")
    fma = functools.partial(fused_multiply_add, mode=next(m for m in instruction.modifiers if m in ROUNDING))
    return Elementwise((dtype,) * 3, _halves(fma) if dtype == "f16x2" else flushed(fma, instruction), dtype)


@elementwise("div", modifiers=_MODIFIERS)
def _divide(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    if _is_float(dtype):
        return Elementwise((dtype,) * 2, flushed(np.divide, instruction), dtype)
    return Elementwise((dtype,) * 2, _quotient, dtype)


@elementwise("rem")
def _remainder(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    return Elementwise((dtype,) * 2, lambda a, b: a - _quotient(a, b) * b, dtype)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero. Division by zero gives all ones, as GPUs do."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


@elementwise("min", "max", modifiers=("ftz",))
def _extreme(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    function = {"min": np.fmin, "max": np.fmax}[instruction.opcode]
    if _is_float(dtype):  # a number wins over NaN
        return Elementwise((dtype,) * 2, flushed(function, instruction), dtype)
    return Elementwise((dtype,) * 2, function, dtype)


@elementwise("abs", "neg", modifiers=("ftz",))
def _sign(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    function = {"abs": np.abs, "neg": np.negative}[instruction.opcode]
    return Elementwise((dtype,), flushed(function, instruction) if dtype == "f32" else function, dtype)


_SPECIAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@elementwise(*_SPECIAL, category="special", modifiers=("rn", "approx", "ftz"))
def _special(instruction: Instruction) -> Elementwise:
    dtype = instruction.types[0]
    function = _SPECIAL[instruction.opcode]
    # For sqrt and rcp this is correctly rounded: float64 has more than twice the bits of float32.
    in_float64 = flushed(lambda x: function(x.astype(np.float64)).astype(numpy_type(dtype)), instruction)
    return Elementwise((dtype,), in_float64, dtype)


@elementwise("dp4a", category="int")
def _dot_product_of_4(instruction: Instruction) -> Elementwise:
    """c + the sum of the products of four bytes."""
    a_type, b_type = instruction.types
    kinds = [np.dtype("i1" if dtype == "s32" else "u1") for dtype in (a_type, b_type)]
    result = "s32" if "s32" in (a_type, b_type) else "u32"

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        a, b, c = np.broadcast_arrays(*(np.atleast_1d(x) for x in (a, b, c)))
        a_bytes, b_bytes = (np.ascontiguousarray(x).view(kind).reshape(-1, 4) for x, kind in zip((a, b), kinds))
        products = a_bytes.astype(np.int64) * b_bytes
        return (c.astype(np.int64) + products.sum(axis=1)).astype(numpy_type(result))

    return Elementwise((a_type, b_type, result), dot, result)
