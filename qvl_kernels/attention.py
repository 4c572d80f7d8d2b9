"""Softmax attention over (B, H, L, D) tensors: contract, checks, choice of the backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks
from ._attention import Options, softmax_attention
from .reference.append_kv import quantize


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    precision: str = "highest",
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
        key: (B, Hkv, Lk, D); Hq is a multiple of Hkv, query head h reads key head h // (Hq / Hkv). In query's dtype,
            or bfloat16 or float16 for a float32 query: a cache of half the size, widened in registers.
        value: (B, Hkv, Lk, Dv) in key's dtype.
        causal: hide later keys.
        scale: factor of the scores; None is 1 / sqrt(D).
        window: (left, right) keys around a query's own position; a negative side is unlimited.
        mask: broadcastable to (B, Hq, Lq, Lk); bool (True = attend) or floating (added to the scaled scores).
        key_lengths: (B,) integers, the valid keys of each row of a ragged cache; values are clamped to [0, Lk].
        key_scale: (B, Hkv, Lk) float32 where key and value are int8 (`quantize_kv`): the keys are key * key_scale.
        value_scale: likewise for value; both or none.
        precision: as of `torch.set_float32_matmul_precision`. "medium" lets what is multiplied be rounded where the CPU
            then multiplies faster, with more than 16 query rows for each key head: to bfloat16 with AMX, to integers
            with AVX2, or AVX-512 and VNNI; elsewhere, and for gradients, it is "highest".

    Returns:
        (B, Hq, Lq, Dv) in query's dtype. A query that sees no key gives zeros, and zero gradients.

    With int8 keys and up to 16 query rows for each of its heads the CPU kernels round a query q' = scale q to 15 bits,
    |error of a score| <= max|q'| |k|_1 / 65534: a 256th of what the rounding of the keys may do for a query and key of
    even size. An output then moves by at most (exp(2 error) - 1) max|v|. The weights of the values, p value_scale, are
    rounded to 15 bits of the largest among 64 keys: an output moves by at most 64 / 65534 of 128 max(value_scale), a
    quarter of what the rounding of the values may do.

    As integers for "medium", queries and keys go up to n = sqrt(2^31 / D), 4095 for D = 128, a scale for each row; with
    q' = scale q, |error of a score| <= (max|q'| |k|_1 + max|k| |q'|_1) / 2n and the product of both errors. Of 64 keys
    at a time, weights become integers up to 16384 for the largest, values up to 2047 for the largest of their column,
    and an output moves by at most (64 / 32766 + 1 / 4094) max|v| more. On normal numbers that is 0.04 % of the output,
    bfloat16's error is 0.35 %. A value that is not finite makes its column NaN for all that see one of its 64 keys.
    Rows that see fewer than 256 keys on average are not rounded.

    With AMX queries, keys, values and the values' weights are multiplied as bfloat16, each rounded by 2^-9 at most, and
    summed in float32: for "medium", and for bfloat16 queries of more than a few rows, where only the weights (and int8
    keys and values times their scales) have to be rounded. |error of a score| <= (2^-8 + 2^-18) |q'| . |k|, e at most
    for a query, and an output moves by at most (exp(2 e) - 1 + 2^-8 + 2^-12) max|v|. A value that is not finite may
    show in its column of rows that see another of its 32 keys; numbers below 2^-126 count as zero. For the gradients of
    bfloat16 tensors the weights and the scores' gradients are rounded likewise.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Vaswani et al., Attention is all you need, 2017, eq. 1; grouped heads: Ainslie et al., GQA, 2023, section
    2.2.

    >>> q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    >>> attention(q, k, v, causal=True).shape
    torch.Size([1, 4, 3, 8])
    """
    plain = mask is key_lengths is key_scale is value_scale is window is None and precision == "highest"
    if plain and (first := softmax_attention.preferred()):
        out = first.plain(query, key, value, causal, scale)
        if out is not None:
            return out
    op = "attention"
    rounded = _checks.precision(op, precision) == "medium"
    if key_scale is None and value_scale is None:
        key, value = _check_floating(query, key, value)
    else:
        _check_int8(query, key, value, key_scale, value_scale)
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
    options = Options(scale, causal, left, right, rounded, mask, key_lengths, None, None, key_scale, value_scale)
    return softmax_attention.choose(query, key, value, mask).run(query, key, value, options)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values for a cache of a quarter of float32's size: q = round(x / s) with s = max|x| / 127 over the last
    dimension.

    Args:
        x: (B, H, L, D), floating.

    Returns:
        q, (B, H, L, D) int8, and s, (B, H, L) float32: one scale for each token and head, so that a cache grows without
        a second look at what it holds. |x - q s| <= s / 2. A row of zeros has s = 0.

    Raises:
        TypeError: x is not floating.

    >>> q, s = quantize_kv(torch.tensor([[[[1.0, -2.0, 0.5]]]]))
    >>> q.tolist(), round(s.item(), 4)
    ([[[[64, -127, 32]]]], 0.0157)
    """
    _checks.floating("quantize_kv", x=x)
    return quantize(x)


def _check_floating(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value, of 16 bits as they are only where no gradient is asked for."""
    halves = torch.bfloat16, torch.float16
    mixed = isinstance(query, Tensor) and query.dtype == torch.float32
    if not (mixed and isinstance(key, Tensor) and key.dtype in halves):
        _checks.floating("attention", query=query, key=key, value=value)
        return key, value
    _checks.floating("attention", key=key, value=value)
    if key.device != query.device:
        raise ValueError(f"attention: key must be on query's device {query.device}, got {key.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return key.float(), value.float()
    return key, value


def _check_int8(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None
) -> None:
    op = "attention"
    _checks.floating(op, query=query)
    for name, tensor, dtype in (
        ("key", key, torch.int8),
        ("value", value, torch.int8),
        ("key_scale", key_scale, torch.float32),
        ("value_scale", value_scale, torch.float32),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: with int8 keys and values {name} must be {dtype}, got {got}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {tensor.device}")
        if dtype == torch.float32:
            _checks.shape(op, name, tensor, "(B, Hkv, Lk)", tuple(key.shape[:3]))


def _check_mask(mask: Tensor, scores: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask must be bool or floating, got {mask.dtype}")
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(have not in (1, want) for have, want in zip(sizes, scores)):
        raise ValueError(f"attention: mask must broadcast to (B, Hq, Lq, Lk) = {scores}, got {tuple(mask.shape)}")
