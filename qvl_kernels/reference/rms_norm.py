"""RMSNorm in plain PyTorch (Zhang and Sennrich, 2019, eq. 4)."""

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual (or x); y = h rstd w with rstd = 1 / sqrt(mean(h^2) + eps). Returns (y, h, rstd)."""
    hidden = x if residual is None else x + residual
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * rstd * weight).to(x.dtype)
    return y, hidden, rstd.squeeze(-1)


def backward(
    grad_y: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_x = rstd (g - h rstd^2 mean(g h)) + grad_hidden, g = grad_y w; grad_w = sum over rows of grad_y h rstd."""
    rstd = rstd.unsqueeze(-1)
    normed = hidden.to(rstd.dtype) * rstd
    grad_normed = grad_y.to(rstd.dtype) * weight
    grad_x = rstd * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
    if grad_hidden is not None:
        grad_x = grad_x + grad_hidden
    grad_weight = (grad_y.to(rstd.dtype) * normed).reshape(rstd.numel(), weight.shape[0]).sum(0)
    return grad_x.to(hidden.dtype), grad_weight.to(weight.dtype)
