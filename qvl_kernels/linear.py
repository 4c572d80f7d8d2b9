"""Linear layers on packed weights: contract, checks, choice of the backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import _backends, _checks
from .reference import linear as reference

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the layout that `packed_linear` reads.

    Attributes:
        weight: (out_features, in_features) in the format's storage type.
        bias: (out_features,) float32, or None.
        format: the name given to `pack_linear`.
    """

    weight: Tensor
    bias: Tensor | None
    format: str

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, format: str) -> PackedWeight:
    """Converts W and b once, so that every product afterwards reads as few bytes as the format allows.

    Args:
        weight: (out_features, in_features), float32, bfloat16, float16 or float64.
        bias: (out_features,), or None.
        format: "fp32" (4 bytes a weight) or "bf16" (2 bytes, rounded to nearest even; lossless for a bfloat16
            checkpoint).

    Returns:
        The packed weight. It shares memory with `weight` where nothing had to be converted.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or the format is unknown; the message names it.

    >>> pack_linear(torch.randn(3, 4), format="bf16").weight.dtype
    torch.bfloat16
    """
    op = "pack_linear"
    _checks.floating(op, weight=weight)
    _checks.shape(op, "weight", weight, "(out_features, in_features)", (None, None))
    if bias is not None:
        _checks.floating(op, bias=bias)
        _checks.shape(op, "bias", bias, "(out_features,)", (weight.shape[0],))
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")
    return PackedWeight(
        weight.detach().to(FORMATS[format]).contiguous(),
        None if bias is None else bias.detach().to(torch.float32),
        format,
    )


def packed_linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """y = x W^T + b. Gradients flow to x; the packed weight is a constant.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        packed: from `pack_linear`.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        TypeError, ValueError: x has the wrong dtype, device or last dimension; the message says so.

    >>> packed_linear(torch.randn(2, 4), pack_linear(torch.randn(3, 4), format="fp32")).shape
    torch.Size([2, 3])
    """
    op = "packed_linear"
    _checks.floating(op, x=x)
    if _checks.channels(op, "x", x) != packed.in_features:
        raise ValueError(f"{op}: x's last dimension must be in_features = {packed.in_features}, got {tuple(x.shape)}")
    if x.device != packed.weight.device:
        raise ValueError(f"{op}: x must be on the weight's device {packed.weight.device}, got {x.device}")
    return _packed_linear.choose().forward(x, packed.weight, packed.bias)


class PackedLinear(nn.Module):
    """`nn.Linear` on a packed weight: y = x W^T + b, for inference and for training what lies below it.

    The weight and the bias are buffers, so that `state_dict`, `to(device)` and saving see them, and no optimiser does.

    >>> PackedLinear.from_linear(nn.Linear(4, 3), format="bf16")(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.format = packed.format
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.register_buffer("weight", packed.weight)
        self.register_buffer("bias", packed.bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, format: str) -> PackedLinear:
        """Packs the weights of an existing layer; errors as in `pack_linear`."""
        return cls(pack_linear(linear.weight, linear.bias, format=format))

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, PackedWeight(self.weight, self.bias, self.format))

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, format={self.format!r}"


_packed_linear = _backends.Operation("packed_linear", {"reference": _backends.Reference(reference.forward)})
