"""RMSNorm in Triton. One program holds a row in registers, so that x, and the residual, are read once.

Bytes a row of C elements of s bytes: 2 C s forward (4 C s with a residual), 3 C s backward (4 C s with a gradient of
h).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Columns of the weight gradient that one program adds up: a 128-byte line of float32 for each of 4 warps.
_COLUMNS = 128


@triton.jit
def _forward(
    x,
    residual,
    weight,
    y,
    hidden,
    rstd,
    x_stride,
    residual_stride,
    eps,
    channels,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    h = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(hidden.dtype.element_ty)
        tl.store(hidden + row * channels + column, rounded, mask=inside)
        h = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / channels + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * channels + column, (h * scale * w).to(y.dtype.element_ty), mask=inside)
    if HAS_RSTD:
        tl.store(rstd + row, scale)


@triton.jit
def _backward(
    grad_y,
    grad_hidden,
    hidden,
    weight,
    rstd,
    grad_x,
    partial,
    grad_y_stride,
    grad_hidden_stride,
    hidden_stride,
    rows,
    chunks,
    channels,
    HAS_GRAD_HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows * chunk // chunks, rows * (chunk + 1) // chunks):
        scale = tl.load(rstd + row)
        normed = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
        g = tl.load(grad_y + row * grad_y_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad_weight += g * normed
        mean = tl.sum(g * w * normed, axis=0) / channels
        dx = scale * (g * w - normed * mean)
        if HAS_GRAD_HIDDEN:
            dx += tl.load(grad_hidden + row * grad_hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * channels + column, dx.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + chunk * channels + column, grad_weight, mask=inside)


@triton.jit
def _sum_chunks(partial, grad_weight, chunks, channels, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        total += tl.load(partial + chunk * channels + column, mask=inside, other=0.0)
    tl.store(grad_weight + column, total.to(grad_weight.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    hidden: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    """Fills y, and hidden and rstd where given. Signature and meaning as in the compiled modules."""
    channels = weight.shape[0]
    if y.numel() == 0:
        return
    x = x.reshape(-1, channels)
    residual = None if residual is None else residual.reshape(-1, channels)
    _forward[(x.shape[0],)](
        x,
        residual,
        weight,
        y,
        hidden,
        rstd,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        channels,
        HAS_RESIDUAL=residual is not None,
        HAS_RSTD=rstd is not None,
        BLOCK=triton.next_power_of_2(channels),
    )


def rms_norm_backward(
    grad_y: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    partial: Tensor,
) -> None:
    """Fills grad_x, grad_weight and the scratch `partial` (chunks, C). Signature and meaning as in the compiled
    modules."""
    channels, chunks = weight.shape[0], partial.shape[0]
    if channels == 0:
        return
    grad_y, hidden = grad_y.reshape(-1, channels), hidden.reshape(-1, channels)
    grad_hidden = None if grad_hidden is None else grad_hidden.reshape(-1, channels)
    _backward[(chunks,)](
        grad_y,
        grad_hidden,
        hidden,
        weight,
        rstd,
        grad_x,
        partial,
        grad_y.stride(0),
        0 if grad_hidden is None else grad_hidden.stride(0),
        hidden.stride(0),
        hidden.shape[0],
        chunks,
        channels,
        HAS_GRAD_HIDDEN=grad_hidden is not None,
        BLOCK=triton.next_power_of_2(channels),
    )
    _sum_chunks[(triton.cdiv(channels, _COLUMNS),)](partial, grad_weight, chunks, channels, BLOCK=_COLUMNS)
