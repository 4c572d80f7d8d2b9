"""The model on packed matrices (`qvl_kernels.PackedLinear`): activations in float32, weights in as few bytes as their
format allows, products that read the same input as one.

    released names                               packed and joined
    self_attn.q_proj, k_proj, v_proj             self_attn.qkv_proj
    mlp.gate_proj, up_proj                       mlp.gate_up_proj

"int4" keeps the head and the vision encoder in "int8": a few percent of the bytes that a token reads, and the first to
lose accuracy. The embedding table stays as it is stored: of it a step reads one row a token.

Prompts and pictures have the factors of a product rounded, to 12 bits or to the width of the weights, where the CPU
then multiplies faster (`packed_linear(precision="medium")`): less than bfloat16 models of other libraries round, which
keep everything between the layers in it too. Tokens that follow, one row at a time, do with "int4" alone: 8 bits of x,
0.6 % of a product whose weights are off by 7 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qvl_kernels import PackedLinear, pack_linear

from .attention import Fused
from .layers import SwiGLU
from .model import Qwen3VL
from .text import TextAttention
from .vision import VisionAttention

FORMATS = ("bf16", "int8", "int4")
_JOINED = {
    TextAttention: ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    SwiGLU: ("gate_up_proj", ("gate_proj", "up_proj")),
}


@dataclass(frozen=True)
class Site:
    """A place of the model where `parts`, matrices with one input, become the packed layer `name`."""

    parent: nn.Module
    parent_path: str
    name: str
    parts: tuple[str, ...]
    format: str

    @property
    def path(self) -> str:
        return f"{self.parent_path}.{self.name}".lstrip(".")

    def sources(self) -> list[str]:
        """The released names of the parts."""
        return [f"{self.parent_path}.{part}".lstrip(".") for part in self.parts]

    def linears(self) -> list[nn.Linear]:
        return [getattr(self.parent, part) for part in self.parts]

    def put(self, layer: PackedLinear) -> None:
        for part in self.parts:
            delattr(self.parent, part)
        setattr(self.parent, self.name, layer)


def pack_model(model: Qwen3VL, weights: str) -> Qwen3VL:
    """The matrices of a loaded model as "int8", "int4" or "bf16", one after the other, so that at no time more than one
    is there twice; everything else but the embedding table becomes float32. The model can be run and can pass
    gradients on, its matrices cannot be trained."""
    for site in sites(model, weights, joined=True):
        linears = site.linears()
        bias = joined([linear.bias for linear in linears])
        weight = joined([linear.weight for linear in linears])
        assert weight is not None
        site.put(PackedLinear(pack_linear(weight, bias, format=site.format)))
    _widen_the_rest(model)
    model.tie_weights()
    model.config = replace(model.config, weights=weights)
    return model


def expect_packed(model: Qwen3VL, weights: str, *, joined: bool, stored: torch.dtype) -> None:
    """Makes a model on the meta device ask a checkpoint for packed matrices; with `joined`, under the joined names.
    `stored` is the dtype of the embedding table."""
    for site in sites(model, weights, joined):
        linears = site.linears()
        site.put(
            PackedLinear.empty(
                linears[0].in_features,
                sum(linear.out_features for linear in linears),
                format=site.format,
                bias=linears[0].bias is not None,
                device="meta",
            )
        )
    _widen_the_rest(model)
    model.model.language_model.embed_tokens.to(stored)
    model.tie_weights()


def set_precision(model: nn.Module, precision: str) -> None:
    """ "highest" or "medium" of `packed_linear`, in every packed layer, and of `attention` in a model that has any."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in packed:
        layer.precision = precision
    for module in model.modules() if packed else ():
        if isinstance(module, (TextAttention, VisionAttention)) and isinstance(module.kind, Fused):
            module.kind = replace(module.kind, precision=precision)


def sites(model: Qwen3VL, weights: str, joined: bool) -> Iterator[Site]:
    """Every matrix of the model, in the order in which modules are listed."""
    for path, module in list(model.named_modules()):
        format = "int8" if weights == "int4" and not path.startswith("model.language_model") else weights
        name, parts = _JOINED.get(type(module), ("", ())) if joined else ("", ())
        if name:
            yield Site(module, path, name, parts, format)
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear and child not in parts:
                yield Site(module, path, child, (child,), format)


def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One behind the other, along the outputs; None of None."""
    there = [tensor.detach() for tensor in tensors if tensor is not None]
    return None if not there else torch.cat(there) if len(there) > 1 else there[0]


def _widen_the_rest(model: Qwen3VL) -> None:
    table = model.model.language_model.embed_tokens
    for module in model.modules():
        if not isinstance(module, PackedLinear) and module is not table:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    setattr(module, name, nn.Parameter(parameter.detach().float(), parameter.requires_grad))
