"""SwiGLU in plain PyTorch (Shazeer, GLU variants improve Transformer, 2020, eq. 5)."""

import torch
from torch import Tensor


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate sigmoid(gate) up, in float32 or wider, rounded once."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * torch.sigmoid(wide) * up).to(gate.dtype)
