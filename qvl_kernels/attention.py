"""Softmax attention over (B, H, L, D) tensors: contract, checks, choice of the backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks
from ._attention import Options, softmax_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """out = softmax(scale q k^T + mask) v over the keys that a query may see.

    Query i of Lq stands at position p = length - Lq + i of its row's keys (bottom-right aligned, a cache's convention),
    where length is Lk or `key_lengths[b]`. It sees key j < length if j <= p (`causal`) and p - left <= j <= p + right
    (`window`). For Lq = 2, Lk = 4 and causal::

        key      0 1 2 3
        query 0  x x x .
        query 1  x x x x

    Args:
        query: (B, Hq, Lq, D). float32, bfloat16, float16 or float64; any strides.
        key: (B, Hkv, Lk, D); Hq is a multiple of Hkv, query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Lk, Dv).
        causal: hide later keys.
        scale: factor of the scores; None is 1 / sqrt(D).
        window: (left, right) keys around a query's own position; a negative side is unlimited.
        mask: broadcastable to (B, Hq, Lq, Lk); bool (True = attend) or floating (added to the scaled scores).
        key_lengths: (B,) integers, the valid keys of each row of a ragged cache; values are clamped to [0, Lk].

    Returns:
        (B, Hq, Lq, Dv) in query's dtype. A query that sees no key gives zeros, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Vaswani et al., Attention is all you need, 2017, eq. 1; grouped heads: Ainslie et al., GQA, 2023, section
    2.2.

    >>> q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    >>> attention(q, k, v, causal=True).shape
    torch.Size([1, 4, 3, 8])
    """
    op = "attention"
    _checks.floating(op, query=query, key=key, value=value)
    _checks.shape(op, "query", query, "(B, Hq, Lq, D)", (None, None, None, None))
    batch, heads_q, len_q, dim = query.shape
    _checks.shape(op, "key", key, "(B, Hkv, Lk, D)", (batch, None, None, dim))
    _checks.shape(op, "value", value, "(B, Hkv, Lk, Dv)", (batch, key.shape[1], key.shape[2], None))
    _checks.head_groups(op, heads_q, key.shape[1])
    left, right = _checks.window(op, window)
    if mask is not None:
        _check_mask(mask, (batch, heads_q, len_q, key.shape[2]))
    if key_lengths is not None:
        _checks.shape(op, "key_lengths", key_lengths, "(B,)", (batch,))
        if key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
            raise TypeError(f"{op}: key_lengths must be integers, got {key_lengths.dtype}")
    if scale is None:
        scale = 1 / math.sqrt(dim) if dim else 1.0
    options = Options(scale, causal, left, right, mask, key_lengths)
    return softmax_attention.choose(query, key, value, mask).run(query, key, value, options)


def _check_mask(mask: Tensor, scores: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask must be bool or floating, got {mask.dtype}")
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(have not in (1, want) for have, want in zip(sizes, scores)):
        raise ValueError(f"attention: mask must broadcast to (B, Hq, Lq, Lk) = {scores}, got {tuple(mask.shape)}")
