"""RMSNorm of each head, then rotary position embedding, in plain PyTorch (Yang et al., Qwen3 technical report, 2025,
section 2)."""

from torch import Tensor

from . import rms_norm, rotary


def forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """y = n cos + rotate_half(n) sin with n = x / sqrt(mean(x^2) + eps) * weight; n is rounded to x's dtype."""
    return rotary.forward(rms_norm.forward(x, weight, eps)[0], cos, sin)
