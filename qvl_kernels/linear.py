"""Linear layers on packed weights: contract, checks, choice of the backend, registration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, _checks, _library, _packing
from ._checks import PRECISIONS
from ._packing import FORMATS
from ._tensors import Scratch, unit_stride
from .reference import linear as reference

ACTIVATIONS = (None, "gelu_tanh", "swiglu")


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the layout that `packed_linear` reads; `qvl_kernels/_packing.py` describes the bytes.

    Attributes:
        weight: one row per output, in the format's storage type.
        bias: (out_features,) float32, or None.
        format: the name given to `pack_linear`.
        in_features: the columns of W; a row of a quantised format is padded beyond them.
        scale, minimum: bfloat16, one a group of weights, where the format has them.
    """

    weight: Tensor
    bias: Tensor | None
    format: str
    in_features: int
    scale: Tensor | None = None
    minimum: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """What a product reads of it."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.minimum, self.bias) if t is not None)

    def dequantize(self) -> Tensor:
        """W, (out_features, in_features) float32: what the product means, exactly."""
        return reference.dequantize(self.weight, self.scale, self.minimum, self.in_features)


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, format: str) -> PackedWeight:
    """Converts W and b once, so that every product afterwards reads as few bytes as the format allows.

    Args:
        weight: (out_features, in_features), float32, bfloat16, float16 or float64.
        bias: (out_features,), or None.
        format: "fp32" (4 bytes a weight); "bf16" (2 bytes, rounded to nearest even; lossless for a bfloat16
            checkpoint); "int8" (8.125 bits: groups of 128 share a scale); "int4" (5 bits: groups of 32 share a scale
            and a minimum, chosen by a search for the smallest squared error of each group).

    Returns:
        The packed weight. It shares memory with `weight` where nothing had to be converted.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or the format is unknown; the message names it.

    >>> pack_linear(torch.randn(3, 4), format="bf16").weight.dtype
    torch.bfloat16
    >>> packed = pack_linear(torch.tensor([[1.0, -0.5, 0.25]]), format="int8")
    >>> packed.dequantize()
    tensor([[ 0.9999, -0.5039,  0.2520]])
    """
    op = "pack_linear"
    _checks.floating(op, weight=weight)
    _checks.shape(op, "weight", weight, "(out_features, in_features)", (None, None))
    if bias is not None:
        _checks.floating(op, bias=bias)
        _checks.shape(op, "bias", bias, "(out_features,)", (weight.shape[0],))
    _check_format(op, format)
    wide_bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    weight = weight.detach()
    if format in _packing.GROUP:
        return PackedWeight(
            bias=wide_bias, format=format, in_features=weight.shape[1], **_packing.quantize(weight, format)
        )
    stored = weight.to(_packing.STORED[format]).contiguous()
    return PackedWeight(stored, wide_bias, format, weight.shape[1])


def _check_format(op: str, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"{op}: format must be one of {', '.join(FORMATS)}, got {format!r}")


def packed_linear(
    x: Tensor,
    packed: PackedWeight,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """y = f(x W^T + b) + residual. Gradients flow to x and residual; the packed weight is a constant.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        packed: from `pack_linear`.
        activation: None, f(z) = z; "gelu_tanh", as the function of that name; "swiglu", f([gate, up]) = gate
            sigmoid(gate) up, where W holds the rows of gate and then those of up.
        residual: y's shape in x's dtype, or None.
        precision: as of `torch.set_float32_matmul_precision`. "medium" lets both factors be rounded where the CPU then
            multiplies faster: with more than 16, 32 or 64 rows, of "int4" with any number. "fp32" and "bf16": to
            integers of 12 bits and a sign, a scale for each 128 (AVX2, or AVX-512 with VNNI); "bf16" with AMX, or on
            AMD with AVX512_BF16, x to bfloat16. "int8" (VNNI, AMX) and "int4": x to 8 bits, a scale for each 128
            ("int4" and few rows: for each 32), and W of "int4" again to 8 bits with AMX, or VNNI and more than 128
            rows. "int8" without VNNI: x to 128 levels from the least to the largest of each 128. Elsewhere it is
            "highest".

    Returns:
        (..., out_features) in x's dtype, half of them with "swiglu". Sums, activation and residual are in float32 and
        rounded once. With "int8" and "int4" weights the kernels round x to 16-bit integers, a scale for each 128 of
        them: at most 1/65534 of the largest of the 128. With "int4" and more than 16 or 48 rows both factors are
        rounded, x to 1/16382 and W to 1/4094 of the largest of the 128. With "medium", where it acts: "fp32" and "bf16"
        x and W to 1/8190 of the largest of the 128, a fifth of the error of x in bfloat16, which is 1/256 of each
        number; "int8" and "int4" x to 1/254, as W of "int4" where it is rounded; "int8" without VNNI x to 1/254 of the
        difference between the largest and the least of the 128.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, device or shape; the message names it.

    >>> packed_linear(torch.randn(2, 4), pack_linear(torch.randn(3, 4), format="int8")).shape
    torch.Size([2, 3])
    >>> packed_linear(torch.randn(2, 4), pack_linear(torch.randn(6, 4), format="bf16"), activation="swiglu").shape
    torch.Size([2, 3])
    """
    operands = packed.weight, packed.scale, packed.minimum, packed.bias
    return _product(x, *operands, packed.in_features, activation, residual, precision)


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    activation: str | None,
    residual: Tensor | None,
    precision: str,
) -> Tensor:
    """`packed_linear` on the tensors themselves, which torch.compile looks through; hence nine parameters."""
    operands = weight, scale, minimum, bias
    if (quick := _packed_linear.quick()) is not None and _library.is_plain(x, residual, weight):
        try:
            return quick.run_unchecked(x, *operands, in_features, activation, residual, precision)
        except (TypeError, ValueError):
            pass
    _check(x, weight, in_features, activation, residual, precision)
    if not _library.needs_dispatcher(x, residual, weight):
        return _packed_linear.choose(x, weight).forward(x, *operands, activation, residual, precision)
    extra = activation is not None or residual is not None
    if extra and torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        product = torch.ops.qvl.packed_linear(x, *operands, None, None, precision)
        return reference.epilogue(product, activation, residual)
    return torch.ops.qvl.packed_linear(x, *operands, activation, residual, precision)


def _check(
    x: Tensor, weight: Tensor, in_features: int, activation: str | None, residual: Tensor | None, precision: str
) -> None:
    op = "packed_linear"
    _checks.floating(op, x=x, residual=residual)
    if _checks.channels(op, "x", x) != in_features:
        raise ValueError(f"{op}: x's last dimension must be in_features = {in_features}, got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{op}: x must be on the weight's device {weight.device}, got {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None, 'gelu_tanh' or 'swiglu', got {activation!r}")
    _checks.precision(op, precision)
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"{op}: swiglu needs gate and up of one size, got {weight.shape[0]} output features")
    if residual is not None:
        _checks.shape(op, "residual", residual, "y's", (*x.shape[:-1], _outputs(weight, activation)))


def _outputs(weight: Tensor, activation: str | None) -> int:
    return weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]


class PackedLinear(nn.Module):
    """`nn.Linear` on a packed weight: y = x W^T + b, for inference and for training what lies below it.

    The tensors of the packed weight are buffers, so that `state_dict`, `to(device)` and saving see them, and no
    optimiser does. `PackedLinear.empty(..., device="meta")` and `load_state_dict(state, assign=True)` build a layer on
    tensors that a file maps, with nothing copied. `precision` is that of `packed_linear`, and may be set at any time.

    >>> PackedLinear.from_linear(nn.Linear(4, 3), format="bf16")(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    minimum: Tensor | None

    def __init__(self, packed: PackedWeight, *, precision: str = "highest") -> None:
        super().__init__()
        self.format = packed.format
        self.precision = precision
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.register_buffer("weight", packed.weight)
        self.register_buffer("bias", packed.bias)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("minimum", packed.minimum)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, format: str, precision: str = "highest") -> PackedLinear:
        """Packs the weights of an existing layer; errors as in `pack_linear`."""
        return cls(pack_linear(linear.weight, linear.bias, format=format), precision=precision)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, *, format: str, bias: bool = True, device: Any = None
    ) -> PackedLinear:
        """A layer whose tensors have the format's shapes and no values yet."""
        _check_format("PackedLinear.empty", format)
        made = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in _packing.shapes(out_features, in_features, format).items()
        }
        wide_bias = torch.empty(out_features, device=device) if bias else None
        return cls(PackedWeight(bias=wide_bias, format=format, in_features=in_features, **made))

    @property
    def packed(self) -> PackedWeight:
        """The layer's tensors as `packed_linear` takes them."""
        return PackedWeight(self.weight, self.bias, self.format, self.in_features, self.scale, self.minimum)

    def forward(self, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        buffers: dict[str, Any] = self._buffers  # four times as fast as the module's attributes
        operands = buffers["weight"], buffers["scale"], buffers["minimum"], buffers["bias"]
        return _product(x, *operands, self.in_features, activation, residual, self.precision)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, format={self.format!r}"


class _Reference:
    """Plain PyTorch on the dequantised weight."""

    def supports(self, x: Tensor, weight: Tensor) -> str | None:
        return None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        minimum: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        precision: str,
    ) -> Tensor:
        dense = weight if scale is None else reference.dequantize(weight, scale, minimum, x.shape[-1])
        return reference.forward(x, dense, bias, activation, residual)

    def backward(
        self, grad: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, in_features: int
    ) -> Tensor:
        return grad @ reference.dequantize(weight, scale, minimum, in_features).to(grad.dtype)


class _Native:
    """The CPU kernels. Their scratch memory is kept from call to call."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._memory = Scratch()

    def supports(self, x: Tensor, weight: Tensor) -> str | None:
        if x.device.type != "cpu":
            return f"x is on {x.device}"
        if x.dtype == torch.float64:
            return "x is float64"
        return None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        minimum: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        precision: str,
    ) -> Tensor:
        rows = _matrix(x)
        added = None if residual is None else residual.reshape(rows.shape[0], residual.shape[-1]).contiguous()
        operands = weight.contiguous(), scale, minimum, bias
        y = self.run_unchecked(rows, *operands, rows.shape[1], activation, added, precision)
        return y.view(*x.shape[:-1], y.shape[-1])

    def run_unchecked(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        minimum: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        activation: str | None,
        residual: Tensor | None,
        precision: str,
    ) -> Tensor:
        *lead, width = x.shape
        y = x.new_empty((*lead, _outputs(weight, activation)))
        if width != in_features or (residual is not None and residual.shape != y.shape):
            raise ValueError
        last = ACTIVATIONS.index(activation), PRECISIONS.index(precision)
        self._call("packed_linear", x, weight, scale, minimum, bias, residual, y, last=last)
        return y

    def backward(
        self, grad: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, in_features: int
    ) -> Tensor:
        grad_x = grad.new_empty((*grad.shape[:-1], in_features))
        rows = _matrix(grad)
        outputs = grad_x.view(rows.shape[0], in_features)
        self._call("packed_linear_backward", rows, weight.contiguous(), scale, minimum, outputs)
        return grad_x

    def _call(self, name: str, *tensors: Tensor | None, last: tuple[int, ...] = ()) -> None:
        kernel = getattr(_backends.module(self.backend, "packed_linear"), name)
        self._memory.run(kernel, *tensors, last=last)


def _matrix(x: Tensor) -> Tensor:
    """(..., C) as (rows, C), the last stride 1."""
    return unit_stride(x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


_packed_linear = _backends.Operation(
    "packed_linear",
    {"cpu_avx512": _Native("cpu_avx512"), "cpu_avx2": _Native("cpu_avx2"), "reference": _Reference()},
)


def _run(x: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    return _packed_linear.choose(x, weight).forward(x, weight, *operands).contiguous()


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    precision: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _outputs(weight, activation)))


def _run_backward(grad: Tensor, weight: Tensor, *operands: Any) -> Tensor:
    return _packed_linear.choose(grad, weight).backward(grad, weight, *operands).contiguous()


def _fake_backward(
    grad: Tensor, weight: Tensor, scale: Tensor | None, minimum: Tensor | None, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.in_features = inputs[0].shape[-1]
    ctx.fused = inputs[5] is not None or inputs[6] is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.fused:
        raise RuntimeError("qvl::packed_linear: activation and residual have no gradient here; use packed_linear")
    return torch.ops.qvl.packed_linear_backward(grad, *ctx.saved_tensors, ctx.in_features), *(None,) * 7


_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? minimum, Tensor? bias, str? activation,"
    " Tensor? residual, str precision) -> Tensor",
    _run,
    _fake,
)
_library.define(
    "packed_linear_backward(Tensor grad, Tensor weight, Tensor? scale, Tensor? minimum, int in_features) -> Tensor",
    _run_backward,
    _fake_backward,
)
_library.differentiate("packed_linear", _differentiate, _save)
