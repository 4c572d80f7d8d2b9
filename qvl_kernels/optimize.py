"""Anyone's model on these kernels: linear layers packed, normalisations and attention replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .integrations.torch import patch_sdpa
from .linear import PackedLinear
from .rms_norm import rms_norm

Model = TypeVar("Model", bound=nn.Module)

# Modules that read the weights of their linear layers themselves instead of calling them.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Report:
    """What `optimize` did. `str()` of it is a summary for people.

    Attributes:
        changed: for each module that was replaced, what it became.
        left: for each that was looked at and left, why.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count:5} x {what}" for what, count in Counter(self.changed.values()).most_common()]
        lines += [f"{count:5} x left: {why}" for why, count in Counter(self.left.values()).most_common()]
        return "\n".join(lines) or "nothing to change"


class FusedRMSNorm(nn.Module):
    """`rms_norm` in place of another implementation, on its weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def optimize(model: Model, *, weights: str | None = None, attention: bool = True, precision: str = "highest") -> Model:
    """The model itself, changed in place: its `nn.Linear` packed, its RMSNorms and its attention on these kernels.

    Names and order of the modules stay; so does what the model computes, up to rounding and, with "int8" and "int4",
    up to what the format loses. `model.qvl_report` says what was changed and what was left, and why.

    Args:
        model: any module, for inference: packed weights are constants (gradients still flow through them).
        weights: "fp32", "bf16", "int8" or "int4" of `pack_linear`; None packs bfloat16 layers as "bf16" and leaves
            float32 ones. A layer on another device than the CPU is left.
        attention: whether `F.scaled_dot_product_attention` inside the model's forward runs ours; models of transformers
            switch to `attn_implementation="qvl"`.
        precision: of `packed_linear`: "medium" lets factors be rounded where the CPU then multiplies faster.

    Returns:
        model.

    Raises:
        ValueError: the format is unknown.

    >>> model = optimize(nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), weights="int8")
    >>> print(model.qvl_report)
        1 x PackedLinear int8
        1 x FusedRMSNorm
        1 x attention: F.scaled_dot_product_attention is ours inside forward
    """
    report = Report()
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            full = f"{path}.{name}".lstrip(".")
            made = _packed(child, module, weights, precision) if isinstance(child, nn.Linear) else _norm(child)
            if isinstance(made, nn.Module):
                setattr(module, name, made)
                report.changed[full] = made.__class__.__name__ + (
                    f" {made.format}" if isinstance(made, PackedLinear) else ""
                )
            elif made is not None:
                report.left[full] = made
    if attention:
        report.changed["attention"] = f"attention: {_attention(model)}"
    model.qvl_report = report  # type: ignore[assignment]
    return model


def _packed(linear: nn.Linear, parent: nn.Module, weights: str | None, precision: str) -> nn.Module | str:
    """The packed layer, or why there is none."""
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is more than a linear layer"
    if isinstance(parent, _READ_WEIGHTS):
        return f"{type(parent).__name__} reads its weight itself"
    if _hooked(linear):
        return "a linear layer has hooks"
    if linear.weight.device.type != "cpu":
        return f"its weight is on {linear.weight.device}"
    format = weights or ("bf16" if linear.weight.dtype == torch.bfloat16 else None)
    if format is None:
        return f"{linear.weight.dtype} weights stay unless `weights` names a format"
    return PackedLinear.from_linear(linear, format=format, precision=precision)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@torch.no_grad()
def _norm(module: nn.Module) -> nn.Module | str | None:
    """A fused norm where the module is an RMSNorm in what it computes, whatever its class: tried on random numbers."""
    if "rmsnorm" not in type(module).__name__.lower() or isinstance(module, FusedRMSNorm):
        return None
    weight, eps = getattr(module, "weight", None), _eps(module)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or eps is None:
        return f"{type(module).__name__} has no weight vector and eps"
    if _hooked(module):
        return "a norm has hooks"
    fused = FusedRMSNorm(weight, eps)
    probe = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        same = torch.allclose(module(probe).float(), fused(probe).float(), rtol=2e-2, atol=1e-5)
    except Exception as error:
        return f"{type(module).__name__} does not take one tensor ({type(error).__name__})"
    return fused if same else f"{type(module).__name__} is another function than RMSNorm"


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            value: Any = getattr(module, name)
            return torch.finfo(torch.float32).eps if value is None else float(value)
    return None


def _attention(model: nn.Module) -> str:
    switch: Any = getattr(model, "set_attn_implementation", None)
    if switch is not None:
        from .integrations.transformers import NAME, register

        register()
        switch(NAME)
        return f'attn_implementation="{NAME}"'
    forward: Callable[..., Any] = model.forward

    def patched(*arguments: Any, **options: Any) -> Any:
        with patch_sdpa():
            return forward(*arguments, **options)

    model.forward = patched
    return "F.scaled_dot_product_attention is ours inside forward"
