"""New keys and values into a cache: contract, checks, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU, Native
from ._tensors import unit_stride
from .reference import append_kv as reference


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """cache[b, h, lengths[b] + l] = x[b, h, l] for x in (key, value), in place, converted to the cache's dtype.

    Args:
        key: (B, Hkv, L, D), float32, bfloat16, float16 or float64, any strides.
        value: (B, Hkv, L, Dv) in key's dtype.
        key_cache, value_cache: (B, Hkv, capacity, D), (B, Hkv, capacity, Dv), of one dtype: floating (float64 only for
            float64), or int8, quantised as `quantize_kv` does; last stride 1.
        lengths: (B,) int64, the tokens that each row has already. A token at capacity or beyond is not written.
        key_scale, value_scale: (B, Hkv, capacity) float32, where the caches are int8; both or none.

    Returns:
        None.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Kwon et al., PagedAttention, 2023, section 4.2 (the cache's write as one kernel); here rows are contiguous.

    >>> key, cache = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    >>> append_kv(key, key, cache, cache.clone(), torch.tensor([2]))
    >>> cache.sum(-1).tolist()
    [[[0.0, 0.0, 4.0]]]
    """
    operands = key, value, key_cache, value_cache, lengths, key_scale, value_scale
    if (quick := _append_kv.quick()) is not None and _library.is_plain(*operands):
        try:
            quick.run_unchecked(*operands)
            return
        except (TypeError, ValueError):
            pass
    op = "append_kv"
    _checks.floating(op, key=key, value=value)
    _checks.shape(op, "key", key, "(B, Hkv, L, D)", (None, None, None, None))
    batch, heads, tokens, dim = key.shape
    _checks.shape(op, "value", value, "(B, Hkv, L, Dv)", (batch, heads, tokens, None))
    _checks.shape(op, "key_cache", key_cache, "(B, Hkv, capacity, D)", (batch, heads, None, dim))
    capacity = key_cache.shape[2]
    _checks.shape(op, "value_cache", value_cache, "(B, Hkv, capacity, Dv)", (batch, heads, capacity, value.shape[3]))
    _checks.shape(op, "lengths", lengths, "(B,)", (batch,))
    if lengths.dtype != torch.int64:
        raise TypeError(f"{op}: lengths must be int64, got {lengths.dtype}")
    _check_dtypes(key, key_cache, value_cache)
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (scale is not None) != (key_cache.dtype == torch.int8):
            raise ValueError(f"{op}: int8 caches need key_scale and value_scale, others have none")
        if scale is not None:
            _checks.shape(op, name, scale, "(B, Hkv, capacity)", (batch, heads, capacity))
            if scale.dtype != torch.float32:
                raise TypeError(f"{op}: {name} must be float32, got {scale.dtype}")
    _append_kv.choose(*operands).forward(*operands)


def _check_dtypes(key: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    if key.dtype == torch.float64:
        allowed = (torch.float64,)  # type: ignore[assignment]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dtype not in allowed or cache.dtype != key_cache.dtype:
            raise TypeError(f"append_kv: {name} must be one of {allowed} for {key.dtype} keys, got {cache.dtype}")
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise ValueError(f"append_kv: {name}'s last stride must be 1, got strides {cache.stride()}")
        if cache.device != key.device:
            raise ValueError(f"append_kv: {name} must be on key's device {key.device}, got {cache.device}")


class _Native(Native):
    def forward(self, key: Tensor, value: Tensor, *rest: Tensor | None) -> None:
        key_cache, value_cache, lengths, *scales = rest
        assert lengths is not None
        self.run_unchecked(unit_stride(key), unit_stride(value), key_cache, value_cache, lengths.contiguous(), *scales)

    def run_unchecked(self, *operands: Tensor | None) -> None:
        self.module.append_kv(*operands)


_append_kv = _backends.Operation(
    "append_kv", {**{name: _Native(name) for name in CPU}, "reference": _backends.Reference(reference.forward)}
)
