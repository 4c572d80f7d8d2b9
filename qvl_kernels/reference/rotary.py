"""Rotary position embedding in plain PyTorch (Su et al., RoFormer, 2021, eq. 34, in GPT-NeoX's half-split order)."""

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x cos + rotate_half(x) sin, rotate_half((a, b)) = (-b, a); in float32 or wider, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
