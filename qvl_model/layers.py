"""The small layers that vision and text share, on the operations of qvl_kernels."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from qvl_kernels import PackedLinear, gelu_tanh, layer_norm, rms_norm, swiglu


class RMSNorm(nn.Module):
    """y = h / rms(h) * weight with h = x, or x + residual, which then comes back too: (y, h)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, self.eps, residual)  # type: ignore[call-overload, no-any-return]


class LayerNorm(nn.Module):
    """y = (h - mean) / std * weight + bias over the last dimension, eps 1e-6 as in every Qwen3-VL, with h = x, or x +
    residual, which then comes back too: (y, h)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(x, self.weight, self.bias, 1e-6, residual)  # type: ignore[call-overload, no-any-return]


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x)), the text model's feed-forward layer."""

    def __init__(self, channels: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(channels, intermediate, bias=False)
        self.up_proj = nn.Linear(channels, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, channels, bias=False)
        self.gate_up_proj: nn.Module | None = None  # in place of the two, where the weights are packed

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            return self.down_proj(self.gate_up_proj(x, activation="swiglu"))
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GeluMLP(nn.Module):
    """y = fc2(gelu_tanh(fc1(x))) + residual, the vision encoder's feed-forward layer."""

    def __init__(self, channels: int, intermediate: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(channels, intermediate)
        self.linear_fc2 = nn.Linear(intermediate, channels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if isinstance(self.linear_fc1, PackedLinear):
            return self.linear_fc2(self.linear_fc1(x, activation="gelu_tanh"), residual=residual)
        return residual + self.linear_fc2(gelu_tanh(self.linear_fc1(x)))


def embedding(rows: int, channels: int) -> nn.Embedding:
    """`nn.Embedding` without its own initialisation, which on the meta device imports half of torch's compiler (1
    s)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, channels), freeze=False)
