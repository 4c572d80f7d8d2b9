"""The gated activation of a SwiGLU block: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU, Native
from ._tensors import empty_rows, unit_stride
from .reference import swiglu as reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate sigmoid(gate) up, element by element.

    Args:
        gate: any shape; float32, bfloat16, float16 or float64; any strides (a copy is made where the last one is not
            1), for example one half of a product that gives gate and up together.
        up: gate's shape and dtype.

    Returns:
        gate's shape and dtype; the arithmetic is in float32 or wider and rounded once.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    Source: Shazeer, GLU variants improve Transformer, 2020, eq. 5.

    >>> swiglu(torch.zeros(2, 3), torch.ones(2, 3)).sum().item()
    0.0
    """
    if (quick := _swiglu.quick()) is not None and _library.is_plain(gate, up):
        try:
            return quick.run_unchecked(gate, up)
        except (TypeError, ValueError):
            pass
    _checks.floating("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        _checks.shape("swiglu", "up", up, "gate's", tuple(gate.shape))
    return _swiglu.choose(gate, up).forward(gate, up)


class _Native(Native):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.run_unchecked(unit_stride(gate), unit_stride(up))

    def run_unchecked(self, gate: Tensor, up: Tensor) -> Tensor:
        y = empty_rows(gate)
        self.module.swiglu(gate, up, y)
        return y


_swiglu = _backends.Operation(
    "swiglu", {**{name: _Native(name) for name in CPU}, "reference": _backends.Reference(reference.forward)}
)
