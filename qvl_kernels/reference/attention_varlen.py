"""Attention over packed segments in plain PyTorch: `attention` segment by segment."""

import torch
from torch import Tensor

from . import attention


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets_q: list[int],
    offsets_k: list[int],
    scale: float,
    causal: bool,
    window: tuple[int, int] | None,
) -> Tensor:
    """out[s] = softmax(scale q[s] k[s]^T) v[s]; query, key, value are (T, H, D), segment s is [offsets[s], offsets[s +
    1])."""
    segments = []
    for q0, q1, k0, k1 in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:]):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        visible = attention.visible_keys(q1 - q0, k1 - k0, causal, window, None, query.device)
        segments.append(attention.forward(q, k, v, scale, visible, None)[0].transpose(0, 1))
    if not segments:
        return query.new_zeros(0, query.shape[1], value.shape[-1])
    return torch.cat(segments)
