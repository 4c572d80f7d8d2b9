"""Rotary position embedding of queries and keys: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks
from .reference import rotary as reference


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """y = x cos + rotate_half(x) sin for x in (query, key), where rotate_half((a, b)) = (-b, a) swaps the halves of D.

    Args:
        query: (..., D), for example (B, Hq, L, D); float32, bfloat16, float16 or float64; D even.
        key: (..., D) in query's dtype; the heads may differ.
        cos, sin: broadcastable to query and to key; float32 is best whatever query's dtype, since angles need the
            precision.

    Returns:
        (query, key) rotated, in their dtype. The arithmetic is in float32 or wider and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Su et al., RoFormer, 2021, eq. 34, in the half-split order of GPT-NeoX.

    >>> q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    >>> angle = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    >>> rotary(q, k, angle.cos(), angle.sin())[1].shape
    torch.Size([1, 2, 3, 8])
    """
    op = "rotary"
    _checks.floating(op, query=query, key=key)
    dim = _checks.channels(op, "query", query)
    if dim % 2:
        raise ValueError(f"{op}: query's last dimension must be even, got {dim}")
    if key.ndim == 0 or key.shape[-1] != dim:
        raise ValueError(f"{op}: key's last dimension must be query's {dim}, got shape {tuple(key.shape)}")
    for name, angle in (("cos", cos), ("sin", sin)):
        for other, x in (("query", query), ("key", key)):
            sizes = (1,) * (x.ndim - angle.ndim) + tuple(angle.shape)
            if len(sizes) != x.ndim or any(have not in (1, want) for have, want in zip(sizes, x.shape)):
                raise ValueError(f"{op}: {name} must broadcast to {other}'s {tuple(x.shape)}, got {tuple(angle.shape)}")
    run = _rotary.choose().forward
    return run(query, cos, sin), run(key, cos, sin)


_rotary = _backends.Operation("rotary", {"reference": _backends.Reference(reference.forward)})
