"""cache[b, h, lengths[b] + l] = x[b, h, l] in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    for x, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        quantised = (x, None) if scale is None else quantize(x)
        for row, start in enumerate(lengths.tolist()):
            count = max(0, min(x.shape[2], cache.shape[2] - start))
            for new, memory in zip(quantised, (cache, scale)):
                if new is not None and memory is not None:
                    memory[row, :, start : start + count] = new[row, :, :count].to(memory.dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """q = round(x / s) as int8 with s = max|x| / 127 over the last dimension, in float32."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return torch.round(wide / torch.where(scale > 0, scale, 1.0)).to(torch.int8), scale.squeeze(-1)
