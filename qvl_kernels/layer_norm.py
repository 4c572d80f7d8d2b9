"""LayerNorm over the last dimension: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks
from .reference import layer_norm as reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, mean and (biased) variance over the last dimension.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight, bias: (C,) in x's dtype.
        eps: added to the variance.

    Returns:
        (..., C) in x's dtype; statistics are in float32 or wider.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Ba, Kiros and Hinton, Layer normalization, 2016, eq. 3.

    >>> layer_norm(torch.randn(2, 8), torch.ones(8), torch.zeros(8), 1e-6).shape
    torch.Size([2, 8])
    """
    op = "layer_norm"
    _checks.floating(op, x=x, weight=weight, bias=bias)
    channels = _checks.channels(op, "x", x)
    _checks.shape(op, "weight", weight, "(C,)", (channels,))
    _checks.shape(op, "bias", bias, "(C,)", (channels,))
    return _layer_norm.choose().forward(x, weight, bias, eps)


_layer_norm = _backends.Operation("layer_norm", {"reference": _backends.Reference(reference.forward)})
