"""RMSNorm, with an optional residual: contract, checks, choice of the backend, registration.

The pattern of every operation: the public function validates once and asks `_backends` for an implementation; each
implementation has `supports`, `forward` and `backward`; `torch.library` sees the same implementations for whatever is
not plain eager code.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from . import _backends, _checks, _library
from ._tensors import compute_dtype, empty_rows, unit_stride
from .reference import rms_norm as reference

# On the CPU a sum over rows is made of this many partial sums at most, whatever the number of threads.
_BACKWARD_CHUNKS = 16


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * weight, the mean over the last dimension, with h = x or, given a residual, x +
    residual.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64; any strides (a copy is made where the last one is not 1).
        weight: (C,) in x's dtype.
        eps: added to the mean square.
        residual: x's shape and dtype, or None.

    Returns:
        y, (..., C) in x's dtype; with a residual the pair (y, h), where h is rounded to x's dtype before it is
        normalised, so that both are what the two steps one after the other give. The arithmetic is in float32 (float64
        for float64). Gradients flow to x, weight and residual.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Zhang and Sennrich, Root mean square layer normalization, 2019, eq. 4.

    >>> x, weight = torch.tensor([[3.0, 4.0]]), torch.ones(2)
    >>> rms_norm(x, weight, 0.0)
    tensor([[0.8485, 1.1314]])
    >>> y, h = rms_norm(x, weight, 0.0, residual=x)
    >>> h
    tensor([[6., 8.]])
    """
    op = "rms_norm"
    if (quick := _rms_norm.quick()) is not None and _library.is_plain(x, weight, residual):
        try:
            y, hidden = quick.run_unchecked(x, weight, eps, residual)
            return y if residual is None else (y, hidden)
        except (TypeError, ValueError):
            pass
    _checks.floating(op, x=x, weight=weight, residual=residual)
    _checks.shape(op, "weight", weight, "(C,)", (_checks.channels(op, "x", x),))
    if residual is not None:
        _checks.shape(op, "residual", residual, "x's", tuple(x.shape))
    if not _library.needs_dispatcher(x, weight, residual):
        y, hidden, _ = _rms_norm.choose(x).forward(x, weight, eps, residual)
        return y if hidden is None else (y, hidden)
    if residual is None:
        return torch.ops.qvl.rms_norm(x, weight, eps)[0]
    y, hidden, _ = torch.ops.qvl.add_rms_norm(x, residual, weight, eps)
    return y, hidden


class _Reference:
    """Plain PyTorch."""

    def supports(self, x: Tensor) -> str | None:
        return None

    def forward(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, save_rstd: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, hidden, rstd = reference.forward(x, weight, eps, residual)
        return y, None if residual is None else hidden, rstd if save_rstd else None

    def backward(
        self, grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reference.backward(grad_y, grad_hidden, hidden, weight, rstd)


class _Native:
    """A compiled or Triton module whose functions fill the outputs that are allocated here:
    `rms_norm(x, residual, weight, y, hidden, rstd, eps)` and
    `rms_norm_backward(grad_y, grad_hidden, hidden, weight, rstd, grad_x, grad_weight, partial)`.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.device = "cpu" if backend.startswith("cpu") else "cuda"
        self.dtypes = _DTYPES[backend]

    def supports(self, x: Tensor) -> str | None:
        if _backends.interprets(self.backend):
            if x.dtype == torch.bfloat16:
                return "Triton's interpreter truncates to bfloat16 where a GPU rounds"
        elif x.device.type != self.device:
            return f"x is on {x.device}"
        if x.dtype not in self.dtypes:
            return f"x is {x.dtype}"
        return None

    def forward(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, save_rstd: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = unit_stride(x), weight.contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        hidden = None
        if residual is not None:
            residual, hidden = unit_stride(residual), torch.empty_like(y)
        rstd = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype)) if save_rstd else None
        self._call("rms_norm", x, residual, weight, y, hidden, rstd, eps)
        return y, hidden, rstd

    def backward(
        self, grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_y, hidden, weight = unit_stride(grad_y), unit_stride(hidden), weight.contiguous()
        grad_hidden = None if grad_hidden is None else unit_stride(grad_hidden)
        grad_x = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        grad_weight = torch.empty_like(weight)
        if self.backend == "cuda":
            chunks = _backends.module("cuda", "rms_norm").rms_norm_backward_chunks(rstd.numel(), weight.shape[0])
        else:
            chunks = max(1, min(_BACKWARD_CHUNKS, rstd.numel()))
        partial = weight.new_empty((chunks, weight.shape[0]), dtype=rstd.dtype)
        arguments = grad_y, grad_hidden, hidden, weight, rstd.contiguous(), grad_x, grad_weight, partial
        self._call("rms_norm_backward", *arguments)
        return grad_x, grad_weight

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        function = getattr(_backends.module(self.backend, "rms_norm"), name)
        function(x, *arguments, *_backends.stream(self.backend, x))


class _NativeCpu(_Native):
    def run_unchecked(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        y = empty_rows(x)
        hidden = None if residual is None else torch.empty_like(y)
        _backends.module(self.backend, "rms_norm").rms_norm(x, residual, weight, y, hidden, None, eps)
        return y, hidden


_ALL_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {
    "cpu_avx512": _ALL_FLOATS,
    "cpu_avx2": _ALL_FLOATS,
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.float16),
}


_native = {name: (_NativeCpu if name.startswith("cpu") else _Native)(name) for name in _DTYPES}
_rms_norm = _backends.Operation("rms_norm", {**_native, "reference": _Reference()})


def _run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _rms_norm.choose(x).forward(x, weight, eps, None, save_rstd=True)
    return y, rstd


def _run_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _rms_norm.choose(x).forward(x, weight, eps, residual, save_rstd=True)


def _run_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return _rms_norm.choose(hidden).backward(grad_y, grad_hidden, hidden, weight, rstd)


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake(x, weight, eps)
    return y, torch.empty_like(y), rstd


def _fake_backward(
    grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_y: Tensor | None, _grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None
    hidden, weight, rstd = ctx.saved_tensors
    return *torch.ops.qvl.rms_norm_backward(grad_y, None, hidden, weight, rstd), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _differentiate_add(
    ctx: Any, grad_y: Tensor | None, grad_hidden: Tensor | None, _grad_rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return grad_hidden, grad_hidden, None, None
    hidden, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.qvl.rms_norm_backward(grad_y, grad_hidden, hidden, weight, rstd)
    return grad_x, grad_x, grad_weight, None


_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)", _run, _fake)
_library.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor hidden, Tensor rstd)",
    _run_add,
    _fake_add,
)
_library.define(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_hidden, Tensor hidden, Tensor weight, Tensor rstd)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    _run_backward,
    _fake_backward,
)
_library.differentiate("rms_norm", _differentiate, _save)
_library.differentiate("add_rms_norm", _differentiate_add, _save_add)
