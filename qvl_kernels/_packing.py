"""The formats of packed weights: which bytes, and how they are found.

Every format is row-major, one row per output: rows can be concatenated (Q, K and V; gate and up), sliced for several
machines, mapped from a file, and read by every instruction set. M = 1 streams the rows as they lie; for many rows of x
the kernels turn a tile of weights into the order of their registers, which costs a few percent of the product.

    format  weight                      scale, minimum                bits a weight   W[n, k]
    fp32    float32 (N, K)                                            32              weight
    bf16    bfloat16 (N, K)                                           16              weight
    int8    int8 (N, P)                 bfloat16 (N, P / 128)         8.125           scale weight
    int4    uint8 (N, P / 2)            bfloat16 (N, P / 32), twice   5               scale q + minimum, q = 0 ... 15

N = out_features, K = in_features, P = K rounded up to a multiple of 128, so that no kernel has a tail along K; what is
added is zero (q = 0 in "int4") and meets zeros of x. A block of 64 int4 weights is 32 bytes; byte i holds weight i in
its low and weight 32 + i in its high half: the low halves are one group, the high halves the next.

Groups of 128 for "int8": a scale in bfloat16 then costs 1.6 % of the bytes; for normal weights groups of 64 would
lower the error by a tenth, groups of 256 raise it by as much. A bfloat16 scale loses nothing that matters, because the
weights are rounded to multiples of the scale as it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("fp32", "bf16", "int8", "int4")
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
PADDED_TO = 128
GROUP = {"int8": 128, "int4": 32}

# Rows are quantised in pieces of about this many weights, so that a piece and its temporaries stay in the caches.
_CHUNK = 1 << 18
# int4: the range of a group is divided into this many steps, and the best result is kept.
_STEPS = (14.0, 14.6, 15.4, 16.0)


def padded(in_features: int) -> int:
    """The weights in a row of a quantised format."""
    return (in_features + PADDED_TO - 1) // PADDED_TO * PADDED_TO


def shapes(out_features: int, in_features: int, format: str) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of "weight", "scale" and "minimum" where the format has them."""
    if format not in GROUP:
        return {"weight": ((out_features, in_features), STORED[format])}
    width = padded(in_features)
    of_groups = (out_features, width // GROUP[format]), torch.bfloat16
    if format == "int8":
        return {"weight": ((out_features, width), torch.int8), "scale": of_groups}
    return {"weight": ((out_features, width // 2), torch.uint8), "scale": of_groups, "minimum": of_groups}


def quantize(weight: Tensor, format: str) -> dict[str, Tensor]:
    """(N, K) to the tensors of `shapes`, piece by piece."""
    rows, in_features = weight.shape
    made = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in shapes(rows, in_features, format).items()
    }
    step = max(1, _CHUNK // max(1, padded(in_features)))
    for start in range(0, rows, step):
        piece = torch.zeros(min(step, rows - start), padded(in_features), device=weight.device)
        piece[:, :in_features] = weight[start : start + step]
        groups = piece.unflatten(1, (piece.shape[1] // GROUP[format], GROUP[format]))
        for name, part in (_int8(groups) if format == "int8" else _int4(groups, in_features)).items():
            made[name][start : start + step] = part
    return made


def _int8(groups: Tensor) -> dict[str, Tensor]:
    scale = (groups.abs().amax(-1) / 127).bfloat16()
    quants = (groups * _inverse(scale).unsqueeze(-1)).round_().clamp_(-127, 127)
    return {"weight": quants.to(torch.int8).flatten(1), "scale": scale}


def _int4(groups: Tensor, in_features: int) -> dict[str, Tensor]:
    """The group's range in 15 steps, which is rounding to nearest, and in a few more and fewer steps that clip or
    widen it; after each of these scale and minimum are those of least squares for the quants found. Whichever has the
    smallest squared error stays, group by group.

    Source: Lloyd, Least squares quantization in PCM, 1982: assignment and regression in turn.
    """
    rest = in_features % GROUP["int4"]
    last = in_features // GROUP["int4"]
    if rest:  # zeros that fill up a group must not widen its range
        groups[:, last, rest:] = groups[:, last, :rest].mean(-1, keepdim=True)
    low, high = torch.aminmax(groups, dim=-1)
    mean = groups.mean(-1)
    scale, minimum = ((high - low) / 15).bfloat16(), low.bfloat16()
    quants = _assign(groups, scale, minimum)
    best = _error(groups, quants, scale, minimum)
    centred = groups - mean.unsqueeze(-1)
    for steps in _STEPS:
        width = (high - low) / steps
        found = _assign(groups, width, (high + low) / 2 - 7.5 * width)
        new_scale, new_minimum = _regress(centred, mean, found)
        found = _assign(groups, new_scale, new_minimum)
        error = _error(groups, found, new_scale, new_minimum)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, new_scale, scale), torch.where(better, new_minimum, minimum)
        quants = torch.where(better.unsqueeze(-1), found, quants)
    if rest:
        quants[:, last, rest:] = 0
    pairs = quants.to(torch.uint8).unflatten(1, (quants.shape[1] // 2, 2))
    return {"weight": (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1), "scale": scale, "minimum": minimum}


def _inverse(scale: Tensor) -> Tensor:
    wide = scale.float()
    return torch.where(wide == 0, 0.0, 1 / wide)


def _assign(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    shifted = groups - minimum.float().unsqueeze(-1)
    return shifted.mul_(_inverse(scale).unsqueeze(-1)).round_().clamp_(0, 15)


def _regress(centred: Tensor, mean: Tensor, quants: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of least squares, rounded: first the scale, then the minimum that fits the rounded one."""
    centre = quants.mean(-1)
    spread = quants - centre.unsqueeze(-1)
    along, across = (spread * centred).sum(-1), spread.square().sum(-1)
    scale = torch.where(across == 0, 0.0, along / across).bfloat16()
    return scale, (mean - scale.float() * centre).bfloat16()


def _error(groups: Tensor, quants: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    made = torch.addcmul(minimum.float().unsqueeze(-1), quants, scale.float().unsqueeze(-1))
    return made.sub_(groups).square_().sum(-1)
