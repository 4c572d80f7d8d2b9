"""A packed checkpoint larger than the memory it may take: some layers stay in memory, the others come and go.

The weights are pages of a mapped file. Left alone, the system drops the pages that were not used for longest, which in
a model that is read from front to back, token after token, are always those needed next. So the first layers are kept,
as many as fit, and each of the others is asked for while the one before it computes (MADV_WILLNEED), and given back
once it has computed (MADV_PAGEOUT, which never loses what was written to a page). A token then reads from the disk only
what does not fit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .memory import advise
from .model import Qwen3VL

_WILLNEED, _PAGEOUT = 3, 21  # of linux/mman.h


def give_back(module: nn.Module) -> None:
    """The pages of a module's weights: they are read again when they are used."""
    advise(_tensors(module), _PAGEOUT)


def page(model: Qwen3VL, resident: int) -> None:
    """Lets `model`, whose weights are mapped, keep at most about `resident` bytes of them in memory.

    Vision blocks, which work once for a picture, come and go; so do the text layers behind those that fit, and the head
    if it does not.
    """
    room = resident
    visual = [*model.model.visual.blocks, *model.model.visual.deepstack_merger_list, model.model.visual.merger]
    streamed: list[nn.Module] = list(visual)
    text: list[nn.Module] = [*model.model.language_model.layers, model.lm_head]
    # What comes next is there beside what computes.
    room -= 2 * max(_nbytes(module) for module in [*visual, *text])
    for module in text:
        room -= _nbytes(module)
        if room < 0:
            streamed.append(module)
    for number, module in enumerate(streamed):
        following = streamed[(number + 1) % len(streamed)]
        if following in visual and module in text:
            following = streamed[len(visual)]  # the next token
        _come_and_go(module, following)
    model.paged = True


def _come_and_go(module: nn.Module, following: nn.Module) -> None:
    ahead = _tensors(following)

    def before(_module: nn.Module, _arguments: Any) -> None:
        advise(ahead, _WILLNEED)

    def after(_module: nn.Module, _arguments: Any, _result: Any) -> None:
        give_back(module)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict(keep_vars=True).values())


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))
