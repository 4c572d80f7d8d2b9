"""What linear_attention and linear_attention_varlen share: the implementations, and their registration with
torch.library.

Packed segments are one row of a batch, (1, H, T, D), with offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _library
from ._tensors import Scratch, compute_dtype, unit_stride
from .reference import linear_attention as reference
from .reference import linear_attention_varlen as varlen_reference

State = tuple[Tensor, Tensor, Tensor]
KINDS = ("favor", "elu", "features")
_KEPT_BYTES = 32 << 20


class Options(NamedTuple):
    """A call's arguments beside query, key and value, in the order of `qvl::linear_attention`'s schema. `kind` is an
    index of KINDS; with "features" query and key are features already."""

    projection: Tensor | None
    kind: int
    causal: bool
    key_mask: Tensor | None = None
    S: Tensor | None = None
    z: Tensor | None = None
    top: Tensor | None = None
    return_state: bool = False
    offsets_q: Tensor | None = None
    offsets_k: Tensor | None = None


def _num_features(query: Tensor, options: Options) -> int:
    return query.shape[-1] if options.projection is None else options.projection.shape[0]


class Reference:
    """Plain PyTorch: autograd, torch.compile and functorch look through it."""

    def supports(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> str | None:
        return None

    def run(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, State]:
        """Output, and the state after all keys (with packed segments: the empty one)."""
        kind, mask = KINDS[options.kind], options.key_mask
        phi_q, _ = reference.features(query, kind, options.projection)
        phi_k, shift = reference.features(key, kind, options.projection)
        value = value.to(phi_k.dtype)
        if mask is not None:
            hidden = ~mask[:, None, :, None]
            phi_k, value = phi_k.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
            shift = shift.masked_fill(hidden.squeeze(-1), -torch.inf)
        if options.S is not None and options.z is not None and options.top is not None:
            state = options.S, options.z, options.top
        else:
            sizes = *key.shape[:2], phi_k.shape[-1]
            state = (
                phi_k.new_zeros(*sizes, value.shape[-1]),
                phi_k.new_zeros(sizes),
                phi_k.new_full(sizes[:2], -torch.inf),
            )
        if options.offsets_q is None or options.offsets_k is None:
            out, state = reference.forward(phi_q, (phi_k, shift), value, options.causal, state)
        else:
            offsets = options.offsets_q.tolist(), options.offsets_k.tolist()
            out = varlen_reference.forward(phi_q, (phi_k, shift), value, options.causal, state, offsets)
        return out.to(query.dtype), state


class Native:
    """The CPU kernels. Their scratch memory is kept from call to call unless it is much (long sequences: a state for
    every 768 keys)."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._memory = Scratch()

    def supports(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> str | None:
        if query.device.type != "cpu":
            return f"query is on {query.device}"
        if (options.projection is not None and query.shape[-1] > 256) or value.shape[-1] > 256:
            return "the head dimension is above 256"
        if not 1 <= _num_features(query, options) <= 2048:
            return "the number of features is not in 1 to 2048"
        if (options.S is not None or options.return_state) and torch.is_grad_enabled():
            tensors = query, key, value, options.S, options.z
            if any(tensor is not None and tensor.requires_grad for tensor in tensors):
                return "a gradient passes through the state"
        if not torch.compiler.is_compiling() and _library.is_transformed():
            return "a functorch transform or forward-mode differentiation looks at the call"
        return None

    def run(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, State]:
        if _library.needs_dispatcher(query, key, value, options.S):
            out, _, *state = torch.ops.qvl.linear_attention(query, key, value, *options)
            return out, tuple(state)
        out, _, state = self.forward(query, key, value, options, save=False)
        return out, state

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, options: Options, save: bool = True
    ) -> tuple[Tensor, Tensor | None, State]:
        """Output; what the gradients need: each row's denominator and the power of two it is relative to; the state,
        empty tensors where it is not asked for."""
        wide = compute_dtype(query.dtype)
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        out = _rows_of(query, value.shape[-1])
        normalizer = query.new_empty((2, *query.shape[:3]), dtype=wide) if save else None
        state = _empty_state(query, key, value, options)
        outputs = out, normalizer, *(state if options.return_state else (None, None, None))
        self._call("linear_attention", options, wide, query, key, value, *outputs)
        return out, normalizer, state

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, query, key, value, out = (unit_stride(x) for x in (grad, query, key, value, out))
        grads = _rows_of(query, query.shape[-1]), _rows_of(key, key.shape[-1]), _rows_of(value, value.shape[-1])
        saved = query, key, value, out, normalizer.contiguous()
        self._call("linear_attention_backward", options, normalizer.dtype, grad, *grads, *saved)
        return grads

    def _call(self, name: str, options: Options, wide: torch.dtype, *tensors: Any) -> None:
        kernel: Callable[..., int] = getattr(_backends.module(self.backend, "linear_attention"), name)
        if options.projection is not None:
            options = options._replace(projection=options.projection.to(wide).contiguous())
        if options.S is not None and options.z is not None and options.top is not None:
            S, z, top = options.S.contiguous(), options.z.contiguous(), options.top.contiguous()
            options = options._replace(S=S, z=z, top=top)
        self._memory.run(kernel, *tensors, last=(options,), kept=_KEPT_BYTES)


def _rows_of(x: Tensor, channels: int) -> Tensor:
    """Empty (B, H, L, channels), in memory (B, L, H, channels): what follows in a model is transpose(1, 2).reshape."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, channels).transpose(1, 2)


def _empty_state(query: Tensor, key: Tensor, value: Tensor, options: Options) -> State:
    wide = compute_dtype(query.dtype)
    if not options.return_state:
        nothing = [query.new_empty(0, dtype=wide) for _ in range(3)]
        return nothing[0], nothing[1], nothing[2]
    sizes = *key.shape[:2], _num_features(query, options)
    shapes = (*sizes, value.shape[-1]), sizes, sizes[:2]
    S, z, top = (query.new_empty(shape, dtype=wide) for shape in shapes)
    return S, z, top


NATIVE = {backend: Native(backend) for backend in ("cpu_avx512", "cpu_avx2")}
linear = _backends.Operation("linear_attention", {**NATIVE, "reference": Reference()})


def _native(*arguments: Any) -> Native:
    """The op runs on native backends alone: the others are looked through."""
    chosen = linear.choose(*arguments)
    if not isinstance(chosen, Native):
        raise RuntimeError(f"qvl::linear_attention: only the CPU kernels are behind it: {linear.refusals(*arguments)}")
    return chosen


def _run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    call = Options(*options)
    out, normalizer, state = _native(query, key, value, call).forward(query, key, value, call)
    assert normalizer is not None
    return out, normalizer, *state


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    normalizer = query.new_empty((2, *query.shape[:3]), dtype=compute_dtype(query.dtype))
    return _rows_of(query, value.shape[-1]), normalizer, *_empty_state(query, key, value, Options(*options))


def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    call = Options(*options)
    return _native(query, key, value, call).backward(grad, query, key, value, out, normalizer, call)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normalizer: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(_rows_of(x, x.shape[-1]) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    options = Options(*inputs[3:])
    ctx.kind, ctx.causal = options.kind, options.causal
    tensors = options.projection, options.key_mask, options.offsets_q, options.offsets_k
    ctx.save_for_backward(*inputs[:3], *output[:2], *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(Options._fields)
    if grad is None:
        return None, None, None, *nothing
    *saved, projection, key_mask, offsets_q, offsets_k = ctx.saved_tensors
    options = Options(projection, ctx.kind, ctx.causal, key_mask, offsets_q=offsets_q, offsets_k=offsets_k)
    grads = torch.ops.qvl.linear_attention_backward(grad, *saved, *options)
    return *grads, *nothing


_OPTIONS = (
    "Tensor? projection, int kind, bool causal, Tensor? key_mask, Tensor? S, Tensor? z, Tensor? top,"
    " bool return_state, Tensor? offsets_q, Tensor? offsets_k"
)
_library.define(
    f"linear_attention(Tensor query, Tensor key, Tensor value, {_OPTIONS})"
    " -> (Tensor out, Tensor normalizer, Tensor next_S, Tensor next_z, Tensor next_top)",
    _run,
    _fake,
)
_library.define(
    "linear_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor normalizer,"
    f" {_OPTIONS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _run_backward,
    _fake_backward,
)
_library.differentiate("linear_attention", _differentiate, _save)
