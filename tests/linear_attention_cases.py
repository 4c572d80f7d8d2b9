"""What the tests of linear attention share: its definition as one matrix of weights, and the bound's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import EluFeatures, FavorFeatures


class Squares(torch.nn.Module):
    """A user's feature map with parameters: (x W)^2."""

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, features) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).square()


def feature_map(name: str, dim: int, features: int = 24, seed: int = 3):
    torch.manual_seed(seed)
    return {
        "favor": lambda: FavorFeatures(dim, features, seed=seed),
        "elu": EluFeatures,
        "squares": lambda: Squares(dim, features),
    }[name]()


def phi_of(x: Tensor, map_: torch.nn.Module) -> Tensor:
    """The map as its paper writes it, in x's dtype."""
    if isinstance(map_, FavorFeatures):
        x = x / x.shape[-1] ** 0.25
        w = map_.projection.to(x.dtype)
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / w.shape[0] ** 0.5
    if isinstance(map_, EluFeatures):
        return F.elu(x) + 1
    return (x @ map_.weight.to(x.dtype)).square()


def definition(q: Tensor, k: Tensor, v: Tensor, map_, *, causal=False, key_mask=None) -> Tensor:
    """sum_j phi(q).phi(k_j) v_j / sum_j phi(q).phi(k_j), all weights at once, in q's dtype (16-bit ones: in float32,
    where exponentials do not overflow, and rounded once); zeros without a key."""
    if q.element_size() == 2:
        wide = (x.float() for x in (q, k, v))
        return definition(*wide, map_, causal=causal, key_mask=key_mask).to(q.dtype)
    group = q.shape[1] // k.shape[1]
    phi_k, v = phi_of(k, map_).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    weights = (phi_of(q, map_) @ phi_k.transpose(-1, -2)).masked_fill(~seen, 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total.masked_fill(total == 0, 1.0)


def size_of_exponents(q: Tensor, k: Tensor, map_) -> float:
    """The exponential turns an exponent's absolute error into a relative one of the result: the largest exponent."""
    if not isinstance(map_, FavorFeatures) or not q.numel() or not k.numel():
        return 1.0
    largest = max(x.double().square().sum(-1).max().item() for x in (q, k)) / q.shape[-1] ** 0.5
    return max(1.0, map_.projection.double().norm(dim=-1).max().item() * largest**0.5 + largest / 2)
