"""What the kernels ask of tensors: the layout they read and the dtype they compute in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Scratch(threading.local):
    """A thread's memory for kernels that answer with 0, or, having done nothing, with the bytes that they need."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def run(self, kernel: Callable[..., int], *tensors: Any, last: tuple[Any, ...], kept: int | None = None) -> int:
        """Calls kernel(*tensors, scratch, *last) until it has enough. Memory of more than `kept` bytes is not kept for
        the next call. A negative answer, a refusal, is handed on."""
        scratch = self.buffer
        while (needed := kernel(*tensors, scratch, *last)) > 0:
            scratch = torch.empty(needed, dtype=torch.uint8)
            if kept is None or needed <= kept:
                self.buffer = scratch
        return needed


def unit_stride(x: Tensor) -> Tensor:
    """x, copied where its last stride is not 1."""
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def empty_rows(x: Tensor) -> Tensor:
    """Contiguous and uninitialised, with x's shape, dtype and device. Naming the memory format costs 0.3 us."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if storage == torch.float64 else torch.float32


def empty_as_laid_out(x: Tensor) -> Tensor:
    """Uninitialised, with x's shape, dtype, device and order of dimensions in memory, last stride 1, no gaps."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
