"""Rotary position embedding of queries and keys: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU, Native
from ._tensors import compute_dtype, empty_as_laid_out, unit_stride
from .reference import rotary as reference


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """y = x cos + rotate_half(x) sin for x in (query, key), where rotate_half((a, b)) = (-b, a) swaps the halves of D.

    Args:
        query: (..., D), for example (B, Hq, L, D); float32, bfloat16, float16 or float64; D even.
        key: (..., D) in query's dtype; the heads may differ.
        cos, sin: broadcastable to query and to key; float32 is best whatever query's dtype, since angles need the
            precision.

    Returns:
        (query, key) rotated, in their dtype; a view of (B, L, H, D) memory gives one too. The arithmetic is in float32
        or wider and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Su et al., RoFormer, 2021, eq. 34, in the half-split order of GPT-NeoX.

    >>> q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    >>> angle = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    >>> rotary(q, k, angle.cos(), angle.sin())[1].shape
    torch.Size([1, 2, 3, 8])
    """
    op = "rotary"
    if (quick := _rotary.quick()) is not None and _library.is_plain(query, key, cos, sin):
        try:
            return quick.run_unchecked(query, key, cos, sin)
        except (TypeError, ValueError):
            pass
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
    return _rotary.choose(query, key, cos, sin).forward(query, key, cos, sin)


class Rotating(Native):
    """What `rotary` and `norm_rotary` ask of a call."""

    def supports(self, *tensors: Tensor | None) -> str | None:
        query, cos, sin = tensors[0], tensors[-2], tensors[-1]
        assert query is not None
        assert cos is not None
        assert sin is not None
        wide = compute_dtype(query.dtype)
        if cos.dtype != wide or sin.dtype != wide:
            return f"cos and sin are {cos.dtype} and {sin.dtype}, not {wide}"
        if cos.shape[-1] != query.shape[-1] or sin.shape[-1] != query.shape[-1]:
            return "cos or sin is broadcast over the last dimension"
        return super().supports(*tensors)


class _Native(Rotating):
    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.run_unchecked(unit_stride(query), unit_stride(key), unit_stride(cos), unit_stride(sin))

    def run_unchecked(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        query_out, key_out = empty_as_laid_out(query), empty_as_laid_out(key)
        self.module.rotary(query, key, cos, sin, query_out, key_out)
        return query_out, key_out


class _Reference:
    """Plain PyTorch."""

    def supports(self, *tensors: Tensor) -> str | None:
        return None

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return reference.forward(query, cos, sin), reference.forward(key, cos, sin)


_rotary = _backends.Operation("rotary", {**{name: _Native(name) for name in CPU}, "reference": _Reference()})
