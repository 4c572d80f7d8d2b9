"""LayerNorm in plain PyTorch (Ba, Kiros and Hinton, 2016, eq. 3)."""

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual (or x); y = (h - mean(h)) / sqrt(var(h) + eps) * w + b over the last dimension, in float32 or
    wider. Returns (y, h)."""
    hidden = x if residual is None else x + residual
    wide = hidden.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight + bias).to(x.dtype), hidden
