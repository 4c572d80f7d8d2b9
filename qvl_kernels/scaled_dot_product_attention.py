"""torch's scaled_dot_product_attention to the letter, on the kernels where they take the call: contract and choice."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends
from ._attention import NATIVE, Options

_torch_own = F.scaled_dot_product_attention  # before `patch_sdpa` may put ours in its place


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """out = dropout(softmax(scale q k^T + mask)) v: what `torch.nn.functional.scaled_dot_product_attention` computes.

    Unlike `attention`, `is_causal` is aligned top-left: query i sees keys j <= i, whatever the lengths.

    Args:
        query: (..., Hq, Lq, D).
        key: (..., Hkv, Lk, D); Hkv is Hq, or a divisor of it with `enable_gqa`.
        value: (..., Hkv, Lk, Dv).
        attn_mask: bool (True = attend) or floating, broadcastable to (..., Hq, Lq, Lk).
        dropout_p: probability that a weight is dropped; applied whenever it is above 0.
        is_causal: hide later keys; not together with `attn_mask`.
        scale: factor of the scores; None is 1 / sqrt(D).
        enable_gqa: allow fewer key and value heads than query heads.

    Returns:
        (..., Hq, Lq, Dv) in query's dtype.

    Whatever the kernels do not take (dropout, other than four dimensions, a mask's gradient, GPUs) runs torch's own
    function; `explain().fallbacks` has the reason of the last such call.

    Raises:
        RuntimeError, ValueError: as torch's function.

    Source: torch's documentation of the function of that name; Vaswani et al., 2017, eq. 1.

    >>> q = torch.randn(1, 2, 3, 8)
    >>> scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([1, 2, 3, 8])
    """
    if attn_mask is None and dropout_p == 0.0 and (first := _scaled_dot_product_attention.preferred()):
        out = first.plain(query, key, value, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    return _scaled_dot_product_attention.choose(*call).forward(*call)


class _Native:
    """The kernel of `attention`."""

    def __init__(self, backend: str) -> None:
        self._attention = NATIVE[backend]

    def supports(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, *rest: Any
    ) -> str | None:
        is_causal, _, enable_gqa = rest
        if dropout_p > 0:
            return "dropout_p is above 0"
        if not query.ndim == key.ndim == value.ndim == 4:
            return "query, key and value do not have four dimensions"
        if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
            return "query, key and value are not of one floating dtype"
        batch, heads, len_q, dim = query.shape
        kv_heads, len_k = key.shape[1:3]
        shaped = key.shape == (batch, kv_heads, len_k, dim) and value.shape[:3] == key.shape[:3]
        grouped = heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0)
        if not (shaped and grouped):
            return "the shapes broadcast, or do not fit"
        if is_causal and (attn_mask is not None or len_q > len_k):
            return "is_causal comes with a mask, or with more queries than keys"
        if attn_mask is not None and not _fits(attn_mask, query, len_k):
            return "attn_mask does not broadcast, or is neither bool nor of query's dtype"
        return self._attention.supports(query, key, value, attn_mask)

    def plain(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
    ) -> Tensor | None:
        if not query.ndim == key.ndim == 4 or (is_causal and query.shape[2] != key.shape[2]):
            return None
        if not enable_gqa and query.shape[1] != key.shape[1]:
            return None
        return self._attention.plain(query, key, value, is_causal, scale)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        if is_causal:  # no query sees a key beyond its own index, and over the first Lq keys both alignments are one
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        if scale is None:
            scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
        return self._attention.run(query, key, value, Options(scale, is_causal, mask=attn_mask))


class _Torch:
    """torch's own function."""

    def supports(self, *arguments: Any) -> str | None:
        return None

    def plain(self, *arguments: Any) -> Tensor | None:
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        return _torch_own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _fits(mask: Tensor, query: Tensor, len_k: int) -> bool:
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    scores = (*query.shape[:3], len_k)
    broadcasts = len(sizes) == 4 and all(have in (1, want) for have, want in zip(sizes, scores))
    return broadcasts and mask.dtype in (torch.bool, query.dtype)


_scaled_dot_product_attention = _backends.Operation(
    "scaled_dot_product_attention", {**{backend: _Native(backend) for backend in NATIVE}, "reference": _Torch()}
)
