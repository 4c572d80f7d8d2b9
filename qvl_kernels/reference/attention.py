"""Softmax attention in plain PyTorch (Vaswani et al., 2017, eq. 1; grouped heads: Ainslie et al., 2023)."""

import torch
from torch import Tensor


def visible_keys(
    len_q: int, len_k: int, causal: bool, left: int, right: int, key_lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where query i may see key j, (1 or B, 1, Lq, Lk), or None where all may.

    Query i stands at position `length - Lq + i` of its row's keys (bottom-right aligned); a negative side is open.
    """
    if not causal and left < 0 and right < 0 and key_lengths is None:
        return None
    lengths = torch.tensor([len_k], device=device) if key_lengths is None else key_lengths.to(device).clamp(0, len_k)
    lengths = lengths.view(-1, 1, 1, 1)
    key = torch.arange(len_k, device=device)
    position = lengths - len_q + torch.arange(len_q, device=device).view(-1, 1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    visible = key < lengths
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    return visible.expand(-1, 1, len_q, len_k)


def scores(query: Tensor, key: Tensor, scale: float, visible: Tensor | None, mask: Tensor | None) -> Tensor:
    """scale q k^T + mask, (B, Hq, Lq, Lk) in float32 or wider; -inf where a query does not see a key."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(wide) * scale).unflatten(1, (key.shape[1], query.shape[1] // key.shape[1])).flatten(2, 3)
    result = (grouped @ key.to(wide).transpose(-1, -2)).view(*query.shape[:3], key.shape[2])
    if mask is not None and mask.dtype != torch.bool:
        result = result + mask
    elif mask is not None:
        result = result.masked_fill(~mask, -torch.inf)
    return result if visible is None else result.masked_fill(~visible, -torch.inf)


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, and the log-sum-exp (B, Hq, Lq) of the scores; a row that sees no key gives zeros
    and -inf."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if key.shape[2] == 0:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        return out, out.new_full(query.shape[:3], -torch.inf, dtype=wide)
    logits = scores(query, key, scale, visible, mask)
    top = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total > 0, total, 1.0)).view(*key.shape[:2], -1, key.shape[2])
    out = (weights @ value.to(wide)).view(*query.shape[:3], value.shape[-1]).to(query.dtype)
    return out, (top + total.detach().log()).squeeze(-1)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    visible: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P = exp(scores - lse) and dS = P (dO v^T - sum of dO O): dQ = scale dS k, dK = scale dS^T q, dV = P^T dO."""
    wide, group = lse.dtype, (key.shape[1], query.shape[1] // key.shape[1])
    logits = scores(query, key, scale, visible, mask)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    weights, grad, delta, rows = (x.to(wide).unflatten(1, group).flatten(2, 3) for x in (weights, grad, delta, query))
    grad_scores = weights * (grad @ value.to(wide).transpose(-1, -2) - delta) * scale
    grads = (grad_scores @ key.to(wide)).view_as(query), grad_scores.transpose(-1, -2) @ rows
    grad_query, grad_key, grad_value = (x.to(query.dtype) for x in (*grads, weights.transpose(-1, -2) @ grad))
    return grad_query, grad_key, grad_value
