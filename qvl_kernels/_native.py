"""What the native CPU backends of the small operations share: they run where nothing but plain eager arithmetic looks
at a call; autograd, torch.compile and functorch look through the reference."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import _backends, _library

CPU = ("cpu_avx512", "cpu_avx2")


class Native:
    """One ISA of one operation. Subclasses add `forward`, and `run_unchecked` for `Operation.quick`: the same for
    tensors that have the layout already."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def supports(self, *tensors: Tensor | None) -> str | None:
        first = tensors[0]
        if first is not None and not first.is_cpu:
            return f"the tensors are on {first.device}"
        if first is not None and first.ndim > 6:
            return f"the tensors have {first.ndim} dimensions, more than 6"
        if not _library.needs_dispatcher(*tensors):
            return None
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return "a gradient is needed, and autograd takes it from the reference"
        return "torch.compile, a transform, a dispatch mode or a tensor subclass looks at the call"

    @functools.cached_property
    def module(self) -> ModuleType:
        return _backends.module(self.backend, "")
