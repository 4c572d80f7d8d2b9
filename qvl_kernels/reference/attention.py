"""Softmax attention in plain PyTorch (Vaswani et al., 2017, eq. 1; grouped heads: Ainslie et al., 2023)."""

import torch
from torch import Tensor


def visible_keys(
    len_q: int,
    len_k: int,
    causal: bool,
    window: tuple[int, int] | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """True where query i may see key j, (1 or B, 1, Lq, Lk), or None where all may.

    Query i stands at position `length - Lq + i` of its row's keys (bottom-right aligned).
    """
    if not causal and window is None and key_lengths is None:
        return None
    lengths = torch.tensor([len_k], device=device) if key_lengths is None else key_lengths.to(device).clamp(0, len_k)
    lengths = lengths.view(-1, 1, 1, 1)
    key = torch.arange(len_k, device=device)
    position = lengths - len_q + torch.arange(len_q, device=device).view(-1, 1)
    left, right = window if window is not None else (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    visible = key < lengths
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    return visible.expand(-1, 1, len_q, len_k)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None, mask: Tensor | None
) -> Tensor:
    """softmax(scale q k^T + mask) v in float32 or wider; a row that sees no key gives zeros."""
    batch, heads_q, len_q, dim = query.shape
    heads_kv, len_k = key.shape[1:3]
    if len_k == 0:
        return query.new_zeros(batch, heads_q, len_q, value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scale).reshape(batch, heads_kv, heads_q // heads_kv * len_q, dim)
    scores = (grouped @ key.to(wide).transpose(-1, -2)).view(batch, heads_q, len_q, len_k)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total > 0, total, 1.0)).view(batch, heads_kv, -1, len_k)
    return (weights @ value.to(wide)).view(batch, heads_q, len_q, value.shape[-1]).to(query.dtype)
