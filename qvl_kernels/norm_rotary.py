"""RMSNorm of each head of queries and keys, then rotary position embedding: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU
from ._tensors import empty_as_laid_out, unit_stride
from .rms_norm import rms_norm
from .rotary import Rotating, rotary


def norm_rotary(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    key_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = n cos + rotate_half(n) sin with n = x / sqrt(mean(x^2) + eps) * weight over D, for x in (query, key).

    What lies between a Qwen3 layer's products and its attention, in one pass over queries and keys: `rms_norm` of each
    head, then `rotary`.

    Args:
        query: (B, Hq, L, D), float32, bfloat16, float16 or float64, any strides; D even.
        key: (B, Hkv, L, D) in query's dtype.
        query_weight, key_weight: (D,) in query's dtype.
        eps: added to the mean square.
        cos, sin: (B, 1, L, D) or (1, 1, L, D); float32 is best whatever query's dtype, since angles need the precision.
        key_out: where the keys go, for example a view of a cache: key's shape and dtype, last stride 1, any other
            strides, no memory shared with key. None allocates.

    Returns:
        (query, key) in their dtype; key is `key_out` where that is given. A view of (B, L, H, D) memory gives one too.
        The arithmetic is in float32 or wider; kernels round once, the reference also between norm and rotation.
        Gradients flow to query, key and their weights: they are those of `rms_norm` and `rotary`, one after the other.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Yang et al., Qwen3 technical report, 2025, section 2 (QK-norm); Su et al., RoFormer, 2021, eq. 34.

    >>> q, k, weight = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.ones(8)
    >>> angle = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    >>> cache = torch.zeros(1, 2, 10, 8)
    >>> q, k = norm_rotary(q, k, weight, weight, 1e-6, angle.cos(), angle.sin(), key_out=cache[:, :, 4:7])
    >>> torch.equal(cache[:, :, 4:7], k)
    True
    """
    op = "norm_rotary"
    quick = _norm_rotary.quick()
    if quick is not None and _library.is_plain(query, key, query_weight, key_weight, cos, sin, key_out):
        try:
            return quick.run_unchecked(query, key, (query_weight, key_weight), eps, (cos, sin), key_out)
        except (TypeError, ValueError):
            pass
    _checks.floating(op, query=query, key=key, query_weight=query_weight, key_weight=key_weight, key_out=key_out)
    _checks.shape(op, "query", query, "(B, Hq, L, D)", (None, None, None, None))
    batch, _, length, dim = query.shape
    if dim % 2:
        raise ValueError(f"{op}: query's last dimension must be even, got {dim}")
    _checks.shape(op, "key", key, "(B, Hkv, L, D)", (batch, None, length, dim))
    _checks.shape(op, "query_weight", query_weight, "(D,)", (dim,))
    _checks.shape(op, "key_weight", key_weight, "(D,)", (dim,))
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (1, 1, length, dim):
            _checks.shape(op, name, angle, "(B, 1, L, D)", (batch, 1, length, dim))
    if key_out is not None:
        if key_out.shape != key.shape:
            _checks.shape(op, "key_out", key_out, "key's", tuple(key.shape))
        if dim > 1 and key_out.stride(-1) != 1:
            raise ValueError(f"{op}: key_out's last stride must be 1, got strides {key_out.stride()}")
    run = _norm_rotary.choose(query, key, query_weight, key_weight, key_out, cos, sin)
    return run.forward(query, key, (query_weight, key_weight), eps, (cos, sin), key_out)


class _Native(Rotating):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        weights: tuple[Tensor, Tensor],
        eps: float,
        angles: tuple[Tensor, Tensor],
        key_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weights = weights[0].contiguous(), weights[1].contiguous()
        angles = unit_stride(angles[0]), unit_stride(angles[1])
        return self.run_unchecked(unit_stride(query), unit_stride(key), weights, eps, angles, key_out)

    def run_unchecked(
        self,
        query: Tensor,
        key: Tensor,
        weights: tuple[Tensor, Tensor],
        eps: float,
        angles: tuple[Tensor, Tensor],
        key_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        query_out = empty_as_laid_out(query)
        if key_out is None:
            key_out = empty_as_laid_out(key)
        self.module.norm_rotary(query, key, *weights, *angles, query_out, key_out, eps)
        return query_out, key_out


class _Composition:
    """The two operations one after the other, on the backends that they have: autograd and torch.compile find their
    gradients. Forced to "reference" it is `reference/norm_rotary.py`."""

    def supports(self, *tensors: Tensor | None) -> str | None:
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        weights: tuple[Tensor, Tensor],
        eps: float,
        angles: tuple[Tensor, Tensor],
        key_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        query, key = rotary(rms_norm(query, weights[0], eps), rms_norm(key, weights[1], eps), *angles)
        return query, key if key_out is None else key_out.copy_(key)


_norm_rotary = _backends.Operation(
    "norm_rotary", {**{name: _Native(name) for name in CPU}, "reference": _Composition()}
)
