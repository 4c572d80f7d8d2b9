"""The gated activation of a SwiGLU block: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks
from .reference import swiglu as reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate sigmoid(gate) up, element by element.

    Args:
        gate: any shape; float32, bfloat16, float16 or float64.
        up: gate's shape and dtype.

    Returns:
        gate's shape and dtype; the arithmetic is in float32 or wider and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Shazeer, GLU variants improve Transformer, 2020, eq. 5.

    >>> swiglu(torch.zeros(2, 3), torch.ones(2, 3)).sum().item()
    0.0
    """
    _checks.floating("swiglu", gate=gate, up=up)
    _checks.shape("swiglu", "up", up, "gate's", tuple(gate.shape))
    return _swiglu.choose().forward(gate, up)


_swiglu = _backends.Operation("swiglu", {"reference": _backends.Reference(reference.forward)})
