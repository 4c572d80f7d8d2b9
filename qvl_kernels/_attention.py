"""What attention, attention_varlen and scaled_dot_product_attention share: the implementations of softmax attention,
and their registration with torch.library.

Packed segments are one row of a batch, (1, H, T, D), with offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _library
from ._tensors import Scratch, compute_dtype, unit_stride
from .reference import attention as reference
from .reference import attention_varlen as varlen_reference

# The reference holds one block of scores at a time; gradients need them all anyway.
_REFERENCE_SCORE_BYTES = 64 << 20


class Options(NamedTuple):
    """A call's arguments beside query, key and value, in the order of `qvl::attention`'s schema."""

    scale: float
    causal: bool = False
    left: int = -1
    right: int = -1
    rounded: bool = False
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    offsets_q: Tensor | None = None
    offsets_k: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


class Reference:
    """Plain PyTorch: autograd, torch.compile and functorch look through it."""

    def supports(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> str | None:
        return None

    def plain(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor | None:
        return None

    def run(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        return self.forward(query, key, value, options)[0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, options: Options, save_lse: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, one block of scores at a time where they are many."""
        scale, causal, left, right, _, mask, lengths, offsets_q, offsets_k, key_scale, value_scale = options
        if key_scale is not None and value_scale is not None:
            wide = compute_dtype(query.dtype)
            out, lse = self.forward(
                query.to(wide),
                key.to(wide) * key_scale.unsqueeze(-1),
                value.to(wide) * value_scale.unsqueeze(-1),
                options._replace(key_scale=None, value_scale=None),
            )
            return out.to(query.dtype), lse
        key, value = key.to(query.dtype), value.to(query.dtype)
        if offsets_q is not None and offsets_k is not None:
            offsets = offsets_q.tolist(), offsets_k.tolist()
            return varlen_reference.forward(query, key, value, *offsets, scale, causal, left, right)
        batch, heads, len_q, _ = query.shape
        len_k = key.shape[2]
        rows = max(1, _REFERENCE_SCORE_BYTES // max(1, 4 * batch * heads * len_k))
        visible = reference.visible_keys(len_q, len_k, causal, left, right, lengths, query.device)
        if rows >= len_q:
            return reference.forward(query, key, value, scale, visible, mask)
        blocks = []
        for start in range(0, len_q, rows):
            part = slice(start, start + rows)
            seen = None if visible is None else visible[:, :, part]
            added = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., part, :]
            blocks.append(reference.forward(query[:, :, part], key, value, scale, seen, added))
        outs, lses = zip(*blocks)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, causal, left, right, _, mask, lengths, offsets_q, offsets_k, *_ = options
        saved = grad, query, key, value, out, lse
        if offsets_q is not None and offsets_k is not None:
            return varlen_reference.backward(*saved, offsets_q.tolist(), offsets_k.tolist(), scale, causal, left, right)
        sizes = query.shape[2], key.shape[2]
        visible = reference.visible_keys(*sizes, causal, left, right, lengths, query.device)
        return reference.backward(*saved, scale, visible, mask)


class Native:
    """The CPU kernels. Their scratch memory is kept from call to call, 0.5 to 1.3 MB a thread."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._memory = Scratch()

    def supports(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> str | None:
        if query.device.type != "cpu":
            return f"query is on {query.device}"
        if max(query.shape[-1], value.shape[-1]) > 256:
            return "the head dimension is above 256"
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            return "mask needs a gradient"
        if key.dtype == torch.int8:
            if query.dtype == torch.float64:
                return "query is float64 and key is int8"
            if query.requires_grad and torch.is_grad_enabled():
                return "query needs a gradient and key is int8"
        if not torch.compiler.is_compiling() and _library.is_transformed():
            return "a functorch transform or forward-mode differentiation looks at the call"
        return None

    def plain(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor | None:
        """A call without options, eager and without gradients, checked by the binding alone: a short sequence is
        computed in 20 us, and all the checks take 10. None where anything is unusual."""
        if _library.needs_dispatcher(query, key, value) or query.ndim != 4 or value.ndim != 4:
            return None
        batch, heads, length, dim = query.shape
        channels = value.shape[3]
        if scale is None:
            scale = dim**-0.5 if dim else 1.0
        strides = length * heads * channels, channels, heads * channels, 1  # as in _rows_like
        out = query.new_empty_strided((batch, heads, length, channels), strides)
        kernel = _backends.module(self.backend, "attention").attention_plain
        return None if self._memory.run(kernel, query, key, value, out, last=(causal, scale)) < 0 else out

    def run(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        if _library.needs_dispatcher(query, key, value):
            return torch.ops.qvl.attention(query, key, value, *options)[0]
        return self.forward(query, key, value, options, False)[0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, options: Options, save_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, where asked for, the log-sum-exp."""
        module = _backends.module(self.backend, "attention")
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        out = _rows_like(query, value.shape[-1], query.dtype)
        lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype)) if save_lse else None
        self._call(module.attention, query, key, options, query, key, value, out, lse)
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        module = _backends.module(self.backend, "attention")
        dtype = query.dtype
        grad, query, key, value, out = (unit_stride(x) for x in (grad, query, key, value, out))
        grads = tuple(_rows_like(x, x.shape[-1], lse.dtype).zero_() for x in (query, key, value))
        saved = query, key, value, out, lse.contiguous()
        self._call(module.attention_backward, query, key, options, grad, *grads, *saved)
        grad_query, grad_key, grad_value = (x.to(dtype) for x in grads)
        return grad_query, grad_key, grad_value

    def _call(self, kernel: Callable[..., int], query: Tensor, key: Tensor, options: Options, *tensors: Any) -> None:
        mask, lengths = options.mask, options.key_lengths
        if mask is not None:
            if mask.dtype != torch.bool:
                mask = mask.to(compute_dtype(query.dtype))
            options = options._replace(mask=mask.expand(*query.shape[:3], key.shape[2]))
        if lengths is not None:
            options = options._replace(key_lengths=lengths.long())
        self._memory.run(kernel, *tensors, last=(options,))


def _rows_like(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Empty (B, H, L, channels), in memory (B, L, H, channels): what follows attention in a model is
    transpose(1, 2).reshape, which is then free."""
    batch, heads, length, _ = x.shape
    strides = length * heads * channels, channels, heads * channels, 1
    return torch.empty_strided((batch, heads, length, channels), strides, dtype=dtype, device=x.device)


NATIVE = {backend: Native(backend) for backend in ("cpu_avx512", "cpu_avx2")}
softmax_attention = _backends.Operation("attention", {**NATIVE, "reference": Reference()})


def _laid_out(x: Tensor) -> Tensor:
    return _rows_like(x, x.shape[-1], x.dtype).copy_(x)


def _run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    implementation = softmax_attention.choose(query, key, value)
    out, lse = implementation.forward(query, key, value, Options(*options))
    return (out, lse) if isinstance(implementation, Native) else (_laid_out(out), lse.contiguous())


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out = _rows_like(query, value.shape[-1], query.dtype)
    return out, query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    implementation = softmax_attention.choose(query, key, value)
    grads = implementation.backward(grad, query, key, value, out, lse, Options(*options))
    return grads if isinstance(implementation, Native) else tuple(_laid_out(x) for x in grads)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(_rows_like(x, x.shape[-1], x.dtype) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[8:])
    ctx.options = inputs[3:8]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Options._fields)
    if grad is None:
        return None, None, None, *nothing
    saved = ctx.saved_tensors  # once: under activation checkpointing each look recomputes
    grads = torch.ops.qvl.attention_backward(grad, *saved[:5], *ctx.options, *saved[5:])
    return *grads, *nothing


_OPTIONS = (
    "float scale, bool causal, int left, int right, bool rounded, Tensor? mask, Tensor? key_lengths, Tensor? offsets_q,"
    " Tensor? offsets_k, Tensor? key_scale, Tensor? value_scale"
)
_library.define(
    f"attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor out, Tensor lse)", _run, _fake
)
_library.define(
    f"attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _run_backward,
    _fake_backward,
)
_library.differentiate("attention", _differentiate, _save)
