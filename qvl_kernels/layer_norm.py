"""LayerNorm over the last dimension: contract, checks, choice of the backend."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU, Native
from ._tensors import empty_rows, unit_stride
from .reference import layer_norm as reference


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: None = None) -> Tensor: ...


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, mean and (biased) variance over the last dimension, with
    h = x or, given a residual, x + residual.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64; any strides (a copy is made where the last one is not 1).
        weight, bias: (C,) in x's dtype.
        eps: added to the variance.
        residual: x's shape and dtype, or None.

    Returns:
        y, (..., C) in x's dtype; with a residual the pair (y, h), where h is rounded to x's dtype before it is
        normalised. Statistics are in float32 or wider.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Ba, Kiros and Hinton, Layer normalization, 2016, eq. 3.

    >>> layer_norm(torch.randn(2, 8), torch.ones(8), torch.zeros(8), 1e-6).shape
    torch.Size([2, 8])
    """
    op = "layer_norm"
    if (quick := _layer_norm.quick()) is not None and _library.is_plain(x, weight, bias, residual):
        try:
            y, hidden = quick.run_unchecked(x, weight, bias, eps, residual)
            return y if residual is None else (y, hidden)
        except (TypeError, ValueError):
            pass
    _checks.floating(op, x=x, weight=weight, bias=bias, residual=residual)
    channels = _checks.channels(op, "x", x)
    _checks.shape(op, "weight", weight, "(C,)", (channels,))
    _checks.shape(op, "bias", bias, "(C,)", (channels,))
    if residual is not None and residual.shape != x.shape:
        _checks.shape(op, "residual", residual, "x's", tuple(x.shape))
    y, hidden = _layer_norm.choose(x, weight, bias, residual).forward(x, weight, bias, eps, residual)
    return y if residual is None else (y, hidden)


class _Native(Native):
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = None if residual is None else unit_stride(residual)
        return self.run_unchecked(unit_stride(x), weight.contiguous(), bias.contiguous(), eps, residual)

    def run_unchecked(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y = empty_rows(x)
        hidden = None if residual is None else torch.empty_like(y)
        self.module.layer_norm(x, residual, weight, bias, y, hidden, eps)
        return y, x if hidden is None else hidden


_layer_norm = _backends.Operation(
    "layer_norm", {**{name: _Native(name) for name in CPU}, "reference": _backends.Reference(reference.forward)}
)
