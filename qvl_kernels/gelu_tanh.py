"""GELU in its tanh approximation: contract, checks, choice of the backend."""

from __future__ import annotations

from torch import Tensor

from . import _backends, _checks, _library
from ._native import CPU, Native
from ._tensors import empty_rows, unit_stride
from .reference import gelu_tanh as reference


def gelu_tanh(x: Tensor) -> Tensor:
    """y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.

    Returns:
        x's shape and dtype; the arithmetic is in float32 or wider and rounded once.

    Raises:
        TypeError: x is not a floating tensor.

    Source: Hendrycks and Gimpel, Gaussian error linear units, 2016, section 2.

    >>> gelu_tanh(torch.zeros(3)).tolist()
    [0.0, 0.0, 0.0]
    """
    if (quick := _gelu_tanh.quick()) is not None and _library.is_plain(x):
        try:
            return quick.run_unchecked(x)
        except (TypeError, ValueError):
            pass
    _checks.floating("gelu_tanh", x=x)
    return _gelu_tanh.choose(x).forward(x)


class _Native(Native):
    def forward(self, x: Tensor) -> Tensor:
        return self.run_unchecked(unit_stride(x))

    def run_unchecked(self, x: Tensor) -> Tensor:
        y = empty_rows(x)
        self.module.gelu_tanh(x, y)
        return y


_gelu_tanh = _backends.Operation(
    "gelu_tanh", {**{name: _Native(name) for name in CPU}, "reference": _backends.Reference(reference.forward)}
)
