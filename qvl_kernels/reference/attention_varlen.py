"""Attention over packed segments in plain PyTorch: `attention` segment by segment."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from . import attention


def segments(offsets_q: list[int], offsets_k: list[int]) -> Iterator[tuple[slice, slice]]:
    """Where each segment's queries and keys lie."""
    return zip((slice(*ends) for ends in pairwise(offsets_q)), (slice(*ends) for ends in pairwise(offsets_k)))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets_q: list[int],
    offsets_k: list[int],
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """out[s] = softmax(scale q[s] k[s]^T) v[s] and its log-sum-exp; (1, H, T, D), segment s is [offsets[s], offsets[s +
    1])."""
    sizes = {(q.stop - q.start, k.stop - k.start) for q, k in segments(offsets_q, offsets_k)}
    if len(sizes) == 1:  # frames of one video, images of one size: a batch
        count = len(offsets_q) - 1
        q, k, v = (x[0].unflatten(1, (count, -1)).transpose(0, 1) for x in (query, key, value))
        visible = attention.visible_keys(*sizes.pop(), causal, left, right, None, query.device)
        out, lse = attention.forward(q, k, v, scale, visible, None)
        return out.transpose(0, 1).flatten(1, 2)[None], lse.transpose(0, 1).flatten(1, 2)[None]
    results = [attention.forward(query[:, :, :0], key[:, :, :0], value[:, :, :0], scale, None, None)]
    for i, j in segments(offsets_q, offsets_k):
        visible = attention.visible_keys(i.stop - i.start, j.stop - j.start, causal, left, right, None, query.device)
        results.append(attention.forward(query[:, :, i], key[:, :, j], value[:, :, j], scale, visible, None))
    outs, lses = zip(*results)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: list[int],
    offsets_k: list[int],
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention`'s gradients segment by segment."""
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for i, j in segments(offsets_q, offsets_k):
        visible = attention.visible_keys(i.stop - i.start, j.stop - j.start, causal, left, right, None, query.device)
        saved = grad[:, :, i], query[:, :, i], key[:, :, j], value[:, :, j], out[:, :, i], lse[:, :, i]
        part = attention.backward(*saved, scale, visible, None)
        for whole, where, values in zip(grads, (i, j, j), part):
            whole[:, :, where] = values
    return grads
