"""A linear layer on packed weights, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """y = f(x W^T + b) + residual, with W and b converted to the dtype of x."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return epilogue(y, activation, residual)


def epilogue(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """f(y) + residual, in float32 or wider, rounded once."""
    if activation is None and residual is None:
        return y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=-1)
        wide = F.silu(gate) * up
    elif activation == "gelu_tanh":
        wide = F.gelu(wide, approximate="tanh")
    return (wide if residual is None else wide + residual).to(y.dtype)


def dequantize(weight: Tensor, scale: Tensor | None, minimum: Tensor | None, in_features: int) -> Tensor:
    """W (out_features, in_features) in float32, from the bytes that `qvl_kernels/_packing.py` describes."""
    if scale is None:
        return weight.float()
    if minimum is None:
        groups = weight.unflatten(1, (scale.shape[1], 128)).float() * scale.float().unsqueeze(-1)
    else:
        blocks = weight.unflatten(1, (weight.shape[1] // 32, 32))
        quants = torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1, 2)
        groups = quants.float() * scale.float().unsqueeze(-1) + minimum.float().unsqueeze(-1)
    return groups.flatten(1)[:, :in_features]
