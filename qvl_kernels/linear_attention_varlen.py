"""Linear attention over packed segments of unequal length: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks
from ._linear_attention import NATIVE, Reference
from .linear_attention import FeatureMap, mapped


def linear_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    feature_map: FeatureMap,
    causal: bool = False,
) -> Tensor:
    """out[s] = phi(q[s]) (sum of phi(k[s]) v[s]^T) / phi(q[s]) (sum of phi(k[s])) for every segment s; segments do not
    see each other.

    Segment s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1, as in flash-attn's varlen functions; lengths of 0
    are allowed.

    Args:
        query: (Tq, Hq, D), all segments' queries one after the other.
        key: (Tk, Hkv, D); Hq is a multiple of Hkv.
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (S + 1,) int32 or int64, ascending from 0 to Tq.
        cu_seqlens_k: (S + 1,) likewise, from 0 to Tk.
        feature_map: as in `linear_attention`; another callable than ours sees (1, H, T, D).
        causal: hide later keys, aligned bottom-right within each segment.

    Returns:
        (Tq, Hq, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device, shape, or offsets; the message names it.

    Source: Katharopoulos et al., Transformers are RNNs, 2020, section 3; the layout is flash-attn's.

    >>> q = torch.randn(5, 2, 8)
    >>> offsets = torch.tensor([0, 2, 5])
    >>> linear_attention_varlen(q, q, q, offsets, offsets, feature_map=EluFeatures(), causal=True).shape
    torch.Size([5, 2, 8])
    """
    op = "linear_attention_varlen"
    _checks.floating(op, query=query, key=key, value=value)
    _checks.shape(op, "query", query, "(Tq, Hq, D)", (None, None, None))
    tokens_q, heads_q, dim = query.shape
    _checks.shape(op, "key", key, "(Tk, Hkv, D)", (None, None, dim))
    _checks.shape(op, "value", value, "(Tk, Hkv, Dv)", (key.shape[0], key.shape[1], None))
    _checks.head_groups(op, heads_q, key.shape[1])
    _checks.offsets(op, "cu_seqlens_q", cu_seqlens_q, tokens_q)
    _checks.offsets(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        segments_q, segments_k = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
        raise ValueError(f"{op}: cu_seqlens_k must have cu_seqlens_q's {segments_q} segments, got {segments_k}")
    dtype = query.dtype
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    query, key, value, options = mapped(op, query, key, value, feature_map, causal)
    options = options._replace(offsets_q=cu_seqlens_q.long(), offsets_k=cu_seqlens_k.long())
    out, _ = _linear_attention_varlen.choose(query, key, value, options).run(query, key, value, options)
    return out[0].transpose(0, 1).to(dtype)


_linear_attention_varlen = _backends.Operation("linear_attention_varlen", {**NATIVE, "reference": Reference()})
