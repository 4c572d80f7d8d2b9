"""Registration with torch.library (namespace `qvl`), and the question whether a call needs the dispatcher at all.

`torch.compile`, export, autograd, tensor subclasses and dispatch modes see an operation through the dispatcher, which
costs 2 us and more. Eager code that needs no gradient calls the kernel directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("qvl", "DEF")
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers `qvl::<schema>`: `run` on the CPU and on CUDA, `fake` for shapes alone (meta tensors,
    torch.compile)."""
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"qvl::{name}", fake, lib=_LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Registers the gradient of `qvl::<name>`: `save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs."""
    torch.library.register_autograd(f"qvl::{name}", backward, setup_context=save, lib=_LIBRARY)


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether anything but plain eager arithmetic without gradients looks at this call."""
    if torch.compiler.is_compiling():
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or (grad and tensor.requires_grad) or tensor.is_meta:
            return True
    return torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


def is_plain(*tensors: object) -> bool:
    """Whether nothing but plain eager arithmetic without gradients looks at these tensors (or None): the opposite of
    `needs_dispatcher` in fewer steps. Tensors on any device, "meta" too, are plain."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is torch.nn.Parameter:
            if grad and tensor.requires_grad:  # type: ignore[attr-defined]
                return False
        elif tensor is not None:
            return False
    return torch._C._len_torch_dispatch_stack() == 0 and not is_transformed()


def is_transformed() -> bool:
    """Whether a functorch transform (vmap, grad, jvp) or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
