"""GELU with the tanh approximation, in plain PyTorch (Hendrycks and Gimpel, 2016, section 2)."""

import math

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float32 or wider, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)
