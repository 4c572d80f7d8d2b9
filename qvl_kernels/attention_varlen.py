"""Softmax attention over packed segments of unequal length: contract, checks, choice of the backend."""

from __future__ import annotations

import math

from torch import Tensor

from . import _backends, _checks
from ._attention import NATIVE, Options, Reference


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    precision: str = "highest",
) -> Tensor:
    """out[s] = softmax(scale q[s] k[s]^T) v[s] for every segment s; segments do not see each other.

    Segment s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1, as in flash-attn's varlen functions; lengths of 0
    are allowed.

    Args:
        query: (Tq, Hq, D), all segments' queries one after the other.
        key: (Tk, Hkv, D); Hq is a multiple of Hkv.
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (S + 1,) int32 or int64, ascending from 0 to Tq.
        cu_seqlens_k: (S + 1,) likewise, from 0 to Tk.
        causal, scale, window, precision: as in `attention`, aligned bottom-right within each segment.

    Returns:
        (Tq, Hq, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device, shape, or offsets; the message names it.

    Source: Dao, FlashAttention-2, 2023 (its `flash_attn_varlen_func` fixes the layout).

    >>> q = torch.randn(5, 2, 8)
    >>> offsets = torch.tensor([0, 2, 5])
    >>> attention_varlen(q, q, q, offsets, offsets).shape
    torch.Size([5, 2, 8])
    """
    op = "attention_varlen"
    rounded = _checks.precision(op, precision) == "medium"
    _checks.floating(op, query=query, key=key, value=value)
    _checks.shape(op, "query", query, "(Tq, Hq, D)", (None, None, None))
    tokens_q, heads_q, dim = query.shape
    _checks.shape(op, "key", key, "(Tk, Hkv, D)", (None, None, dim))
    _checks.shape(op, "value", value, "(Tk, Hkv, Dv)", (key.shape[0], key.shape[1], None))
    _checks.head_groups(op, heads_q, key.shape[1])
    left, right = _checks.window(op, window)
    _checks.offsets(op, "cu_seqlens_q", cu_seqlens_q, tokens_q)
    _checks.offsets(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        segments_q, segments_k = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
        raise ValueError(f"{op}: cu_seqlens_k must have cu_seqlens_q's {segments_q} segments, got {segments_k}")
    if scale is None:
        scale = 1 / math.sqrt(dim) if dim else 1.0
    options = Options(scale, causal, left, right, rounded, None, None, cu_seqlens_q.long(), cu_seqlens_k.long())
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _attention_varlen.choose(query, key, value).run(query, key, value, options)[0].transpose(0, 1)


_attention_varlen = _backends.Operation("attention_varlen", {**NATIVE, "reference": Reference()})
