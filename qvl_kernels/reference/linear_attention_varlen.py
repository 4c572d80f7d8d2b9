"""Linear attention over packed segments in plain PyTorch: `linear_attention` segment by segment."""

import torch
from torch import Tensor

from . import linear_attention
from .attention_varlen import segments
from .linear_attention import State


def forward(
    phi_q: Tensor,
    keys: tuple[Tensor, Tensor],
    value: Tensor,
    causal: bool,
    state: State,
    offsets: tuple[list[int], list[int]],
) -> Tensor:
    """out[s] of every segment s; (1, H, T, D), segment s is [offsets[s], offsets[s + 1]). `state` is an empty one."""
    phi_k, shift = keys
    outs = [phi_q.new_empty(*phi_q.shape[:2], 0, value.shape[-1])]
    for i, j in segments(*offsets):
        chunk = (phi_k[:, :, j], shift[:, :, j]), value[:, :, j]
        outs.append(linear_attention.forward(phi_q[:, :, i], *chunk, causal, state)[0])
    return torch.cat(outs, 2)
