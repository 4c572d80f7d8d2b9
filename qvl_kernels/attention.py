"""Softmax attention over (B, H, L, D) tensors: contract, checks, choice of the backend."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from . import _backends, _checks, _library
from .reference import attention as reference

# The reference holds one block of scores at a time; gradients need them all anyway.
_REFERENCE_SCORE_BYTES = 64 << 20


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
    window = _checks.window(op, window)
    if mask is not None:
        _check_mask(mask, (batch, heads_q, len_q, key.shape[2]))
    if key_lengths is not None:
        _checks.shape(op, "key_lengths", key_lengths, "(B,)", (batch,))
        if key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
            raise TypeError(f"{op}: key_lengths must be integers, got {key_lengths.dtype}")
    if scale is None:
        scale = 1 / math.sqrt(dim) if dim else 1.0
    run = _attention.choose(query, key, value).forward
    return run(query, key, value, scale, causal, window, mask, key_lengths)


def _check_mask(mask: Tensor, scores: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask must be bool or floating, got {mask.dtype}")
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(have not in (1, want) for have, want in zip(sizes, scores)):
        raise ValueError(f"attention: mask must broadcast to (B, Hq, Lq, Lk) = {scores}, got {tuple(mask.shape)}")


def _run_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int] | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor:
    batch, heads, len_q, _ = query.shape
    len_k = key.shape[2]
    rows = max(1, _REFERENCE_SCORE_BYTES // max(1, 4 * batch * heads * len_k))
    visible = reference.visible_keys(len_q, len_k, causal, window, key_lengths, query.device)
    if rows >= len_q:
        return reference.forward(query, key, value, scale, visible, mask)
    blocks = []
    for start in range(0, len_q, rows):
        part = slice(start, start + rows)
        blocks.append(
            reference.forward(
                query[:, :, part],
                key,
                value,
                scale,
                None if visible is None else visible[:, :, part],
                mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., part, :],
            )
        )
    return torch.cat(blocks, dim=2)


class Native:
    """The CPU kernel, forward only so far. Its buffers are kept from call to call, about 0.5 MB a thread."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._memory = threading.local()

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if query.device.type != "cpu":
            return f"query is on {query.device}"
        if max(query.shape[-1], value.shape[-1]) > 256:
            return "the head dimension is above 256"
        if _library.needs_dispatcher(query, key, value):
            return "the call needs gradients or is being traced, and the kernel has no backward and no registration yet"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        causal: bool,
        window: tuple[int, int] | None,
        mask: Tensor | None,
        key_lengths: Tensor | None,
    ) -> Tensor:
        batch, heads, len_q, _ = query.shape
        if mask is not None:
            if mask.dtype != torch.bool:
                mask = mask.to(torch.promote_types(query.dtype, torch.float32))
            mask = mask.expand(batch, heads, len_q, key.shape[2])
        # In memory (B, L, H, D): what follows attention in a model is transpose(1, 2).reshape, which is then free.
        out = query.new_empty(batch, len_q, heads, value.shape[-1]).transpose(1, 2)
        lengths = None if key_lengths is None else key_lengths.long()
        self.call(query, key, value, out, mask, lengths, None, None, scale, causal, window)
        return out

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        offsets_q: Tensor | None,
        offsets_k: Tensor | None,
        scale: float,
        causal: bool,
        window: tuple[int, int] | None,
    ) -> None:
        """Fills `out` (B, Hq, Lq, Dv); with offsets B is 1 and L runs over packed segments."""
        module = _backends.module(self.backend, "attention")
        query, key, value = (
            x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in (query, key, value)
        )
        scratch = self._scratch(module.attention_scratch_bytes(query, key, value, offsets_q is not None))
        sides = (-1, -1) if window is None else window
        module.attention(
            query, key, value, out, None, mask, key_lengths, offsets_q, offsets_k, scratch, scale, causal, sides
        )

    def _scratch(self, nbytes: int) -> Tensor:
        buffer = getattr(self._memory, "buffer", None)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._memory.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return buffer


NATIVE = {backend: Native(backend) for backend in ("cpu_avx512", "cpu_avx2")}


class _Reference:
    """Plain PyTorch, one block of scores at a time where no gradient is needed."""

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        return None

    forward = staticmethod(_run_reference)


_attention = _backends.Operation("attention", {**NATIVE, "reference": _Reference()})
