"""Attention over the blocks of a SparsePattern: contract, checks, choice of the backend, registration."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _checks, _library
from ._attention import _fake, _fake_backward, _laid_out, _rows_like
from ._tensors import Scratch, compute_dtype, unit_stride
from .reference import sparse_attention as reference
from .sparse_pattern import SparsePattern


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """out = softmax(scale q k^T) v over the keys that `pattern` shows to a query; blocks that it does not list cost
    nothing. Equal to `attention(query, key, value, mask=pattern.to_dense(), causal=causal, scale=scale)`.

    Args:
        query: (B, Hq, Lq, D). float32, bfloat16, float16 or float64; any strides.
        key: (B, Hkv, Lk, D); Hq is a multiple of Hkv, query head h reads key head h // (Hq / Hkv).
        value: (B, Hkv, Lk, Dv).
        pattern: of Lq queries and Lk keys, for one head or for all Hq.
        causal: hide later keys too: query i stands at Lk - Lq + i (bottom-right aligned).
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (B, Hq, Lq, Dv) in query's dtype. A query that sees no key gives zeros, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Child et al., Generating long sequences with sparse transformers, 2019, section 5.5; online softmax by
    blocks: Dao et al., FlashAttention, 2022, section 3.3.

    >>> q, k, v = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    >>> pattern = SparsePattern.sliding_window(300, 300, window=64, sinks=4)
    >>> sparse_attention(q, k, v, pattern).shape
    torch.Size([1, 4, 300, 8])
    """
    op = "sparse_attention"
    _checks.floating(op, query=query, key=key, value=value)
    _checks.shape(op, "query", query, "(B, Hq, Lq, D)", (None, None, None, None))
    batch, heads, len_q, dim = query.shape
    _checks.shape(op, "key", key, "(B, Hkv, Lk, D)", (batch, None, None, dim))
    _checks.shape(op, "value", value, "(B, Hkv, Lk, Dv)", (batch, key.shape[1], key.shape[2], None))
    _checks.head_groups(op, heads, key.shape[1])
    if not isinstance(pattern, SparsePattern):
        raise TypeError(f"{op}: pattern must be a SparsePattern, got {type(pattern).__name__}")
    if (pattern.len_q, pattern.len_k) != (len_q, key.shape[2]):
        raise ValueError(
            f"{op}: pattern must be of (Lq, Lk) = ({len_q}, {key.shape[2]}), got ({pattern.len_q}, {pattern.len_k})"
        )
    if pattern.heads not in (1, heads):
        raise ValueError(f"{op}: pattern must have 1 head or query's {heads}, got {pattern.heads}")
    if scale is None:
        scale = 1 / math.sqrt(dim) if dim else 1.0
    group = heads // key.shape[1]
    shared = pattern.heads == 1 or pattern.same_heads % group == 0
    blocks = Blocks(*pattern.lists, pattern.block, shared, scale, causal)
    return _operation.choose(query, key, value).run(query, key, value, blocks)


class Blocks(NamedTuple):
    """A call's arguments beside query, key and value, in the order of `qvl::sparse_attention`'s schema: the fields of
    `BlockLists`, and whether the heads of a group have the same lists."""

    full_offsets: Tensor
    full: Tensor
    partial_offsets: Tensor
    partial: Tensor
    masks: Tensor
    bits: Tensor
    block: int
    shared: bool
    scale: float
    causal: bool

    def dense(self, query: Tensor, key: Tensor) -> Tensor:
        lists = [x.to(query.device) for x in (*self[:5], self.bits)]
        return reference.dense(lists, self.block, query.shape[2], key.shape[2])


class Reference:
    """Plain PyTorch under the dense mask."""

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        return None

    def run(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Tensor:
        return self.forward(query, key, value, blocks)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
        return reference.forward(query, key, value, blocks.dense(query, key), blocks.scale, blocks.causal)

    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], blocks: Blocks) -> tuple[Tensor, ...]:
        mask = blocks.dense(*saved[:2])
        return reference.backward(grad, *saved, mask=mask, scale=blocks.scale, causal=blocks.causal)


class Native:
    """The CPU kernels. Packed keys, and for gradients packed queries, of the heads at work are scratch memory; it is
    kept from call to call up to a limit."""

    _KEPT_BYTES = 64 << 20

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._memory = Scratch()

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if query.device.type != "cpu":
            return f"query is on {query.device}"
        if max(query.shape[-1], value.shape[-1]) > 256:
            return "the head dimension is above 256"
        if not torch.compiler.is_compiling() and _library.is_transformed():
            return "a functorch transform or forward-mode differentiation looks at the call"
        return None

    def run(self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Tensor:
        if _library.needs_dispatcher(query, key, value):
            return torch.ops.qvl.sparse_attention(query, key, value, *blocks)[0]
        return self.forward(query, key, value, blocks, False)[0]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, save_lse: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, where asked for, the log-sum-exp."""
        module = _backends.module(self.backend, "sparse_attention")
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        out = _rows_like(query, value.shape[-1], query.dtype)
        lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype)) if save_lse else None
        tensors = query, key, value, out, lse
        self._memory.run(module.sparse_attention, *tensors, last=(blocks,), kept=self._KEPT_BYTES)
        return out, lse

    def backward(self, grad: Tensor, saved: tuple[Tensor, ...], blocks: Blocks) -> tuple[Tensor, ...]:
        module = _backends.module(self.backend, "sparse_attention")
        grad, query, key, value, out = (unit_stride(x) for x in (grad, *saved[:4]))
        grads = tuple(_rows_like(x, x.shape[-1], x.dtype) for x in (query, key, value))
        tensors = grad, *grads, query, key, value, out, saved[4].contiguous()
        self._memory.run(module.sparse_attention_backward, *tensors, last=(blocks,), kept=self._KEPT_BYTES)
        return grads


_NATIVE = {backend: Native(backend) for backend in ("cpu_avx512", "cpu_avx2")}
_operation = _backends.Operation("sparse_attention", {**_NATIVE, "reference": Reference()})


def _run(query: Tensor, key: Tensor, value: Tensor, *blocks: Any) -> tuple[Tensor, Tensor]:
    implementation = _operation.choose(query, key, value)
    out, lse = implementation.forward(query, key, value, Blocks(*blocks))
    return (out, lse) if isinstance(implementation, Native) else (_laid_out(out), lse.contiguous())


def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *blocks: Any
) -> tuple[Tensor, ...]:
    implementation = _operation.choose(query, key, value)
    grads = implementation.backward(grad, (query, key, value, out, lse), Blocks(*blocks))
    return grads if isinstance(implementation, Native) else tuple(_laid_out(x) for x in grads)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Blocks._fields)
    if grad is None:
        return None, None, None, *nothing
    saved = ctx.saved_tensors  # once: under activation checkpointing each look recomputes
    return *torch.ops.qvl.sparse_attention_backward(grad, *saved, *ctx.options), *nothing


_BLOCKS = (
    "Tensor full_offsets, Tensor full, Tensor partial_offsets, Tensor partial, Tensor masks, Tensor bits, int block,"
    " bool shared, float scale, bool causal"
)
_library.define(
    f"sparse_attention(Tensor query, Tensor key, Tensor value, {_BLOCKS}) -> (Tensor out, Tensor lse)", _run, _fake
)
_library.define(
    f"sparse_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_BLOCKS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _run_backward,
    _fake_backward,
)
_library.differentiate("sparse_attention", _differentiate, _save)
