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


def weights_of(q: Tensor, k: Tensor, map_, *, causal=False, key_mask=None) -> tuple[Tensor, Tensor]:
    """phi(q_i).phi(k_j) where i sees j, else 0, (B, Hq, Lq, Lk), and its sum over j, 1 where it is 0."""
    phi_k = phi_of(k, map_).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    weights = (phi_of(q, map_) @ phi_k.transpose(-1, -2)).masked_fill(~seen, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights, total.masked_fill(total == 0, 1.0)


def definition(q: Tensor, k: Tensor, v: Tensor, map_, **options) -> Tensor:
    """sum_j phi(q).phi(k_j) v_j / sum_j phi(q).phi(k_j), all weights at once, in q's dtype (16-bit ones: in float32,
    where exponentials do not overflow, and rounded once); zeros without a key."""
    if q.element_size() == 2:
        return definition(*(x.float() for x in (q, k, v)), map_, **options).to(q.dtype)
    weights, total = weights_of(q, k, map_, **options)
    return (weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)) / total


def bound_size(q: Tensor, k: Tensor, v: Tensor, map_) -> float:
    """What float32's roundings are relative to: the largest value, times the largest exponent, as the exponential turns
    an exponent's absolute error into a relative one of the result. 16-bit dtypes round once: the result's own size."""
    if q.element_size() == 2 or not v.numel():
        return 0.0
    return exponent_size(q, k, map_) * v.abs().max().item()


def exponent_size(q: Tensor, k: Tensor, map_) -> float:
    if not isinstance(map_, FavorFeatures) or not q.numel() or not k.numel():
        return 1.0
    rows = [x.double().flatten(0, 2) / x.shape[-1] ** 0.25 for x in (q, k)]
    projected = max((x @ map_.projection.double().T).abs().max().item() for x in rows)
    return max(1.0, projected + max(x.square().sum(-1).max().item() for x in rows) / 2)
