"""Argument checks shared by the operations: one sentence that names the operation, the argument, what it must be and
what it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("highest", "medium")


def precision(op: str, name: str) -> str:
    """The name, one of PRECISIONS."""
    if name not in PRECISIONS:
        raise ValueError(f"{op}: precision must be 'highest' or 'medium', got {name!r}")
    return name


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors share one dtype among float32, bfloat16, float16, float64, and one device.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument is on another device.
    """
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if first is None:
            first, first_name, dtype, device = tensor, name, tensor.dtype, tensor.device
            if dtype not in FLOATS:
                raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {_name(dtype)}")
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must have {first_name}'s dtype {_name(dtype)}, got {_name(tensor.dtype)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {first_name}'s device {device}, got {tensor.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape(op: str, name: str, tensor: Tensor, letters: str, expected: Sequence[int | None]) -> None:
    """`tensor` has the expected sizes; None allows any. `letters` spells them, for example "(B, Hkv, Lk, D)".

    Raises:
        ValueError: it has not; the message gives both.
    """
    actual = tensor.shape
    if len(actual) == len(expected):
        for want, have in zip(expected, actual):
            if want is not None and want != have:
                break
        else:
            return
    wanted = ", ".join("*" if want is None else str(want) for want in expected)
    wanted += "," if len(expected) == 1 else ""
    raise ValueError(f"{op}: {name} must have shape {letters} = ({wanted}), got {tuple(actual)}")


def window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    """`window` is None, which comes back as (-1, -1), or two integers (left, right); a negative one means no limit."""
    if window is None:
        return -1, -1
    if len(window) != 2 or not all(isinstance(side, int) for side in window):
        raise ValueError(f"{op}: window must be a pair of integers (left, right), got {window!r}")
    return window[0], window[1]


def head_groups(op: str, heads_q: int, heads_kv: int) -> None:
    """Hq is a multiple of Hkv."""
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(f"{op}: query's {heads_q} heads must be a multiple of key's {heads_kv}")


def offsets(op: str, name: str, offsets: Tensor, tokens: int) -> None:
    """Where packed segments start: (S + 1,) integers that ascend from 0 to the number of tokens."""
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {offsets.dtype}")
    shape(op, name, offsets, "(S + 1,)", (None,))
    if torch.compiler.is_compiling():  # values are not known while tracing; the kernel checks them again
        return
    values = offsets.tolist()
    if not values or values[0] != 0 or values[-1] != tokens or any(a > b for a, b in pairwise(values)):
        shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        raise ValueError(f"{op}: {name} must ascend from 0 to {tokens}, got {shown}")


def channels(op: str, name: str, tensor: Tensor) -> int:
    """The size C of the last dimension of a (..., C) tensor."""
    if tensor.ndim == 0:
        raise ValueError(f"{op}: {name} must have shape (..., C), got ()")
    return tensor.shape[-1]
