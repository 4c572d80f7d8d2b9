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
    sizes = [(q1 - q0, k1 - k0) for q0, q1, k0, k1 in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:])]
    if not sizes:
        return query.new_zeros(0, query.shape[1], value.shape[-1])
    if len(set(sizes)) == 1:  # frames of one video, images of one size: a batch
        q, k, v = (x.unflatten(0, (len(sizes), -1)).transpose(1, 2) for x in (query, key, value))
        visible = attention.visible_keys(*sizes[0], causal, window, None, query.device)
        return attention.forward(q, k, v, scale, visible, None).transpose(1, 2).flatten(0, 1)
    segments = []
    lengths_q, lengths_k = ([size[i] for size in sizes] for i in (0, 1))
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)):
        visible = attention.visible_keys(q.shape[0], k.shape[0], causal, window, None, query.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        segments.append(attention.forward(q, k, v, scale, visible, None)[0].transpose(0, 1))
    return torch.cat(segments)
