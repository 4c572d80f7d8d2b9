"""Pictures that several prompts of a batch show: found, encoded once, and told apart from the others."""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor


def distinct(pixels: Tensor, grid_thw: Tensor, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pictures (or videos) that differ, and which of their tokens stand for all.

    Args:
        pixels: (P, patch_dim), picture after picture.
        grid_thw: (pictures, 3) patches in time, height and width.
        merge: side of the square of patches that becomes one token.

    Returns:
        pixels and grid_thw without repetitions, and index (V,): token v of all pictures is token index[v] of these.
    """
    patches, grids = grid_thw.prod(-1).tolist(), [tuple(grid) for grid in grid_thw.tolist()]
    sizes = Counter(grids)  # only pictures of one size can be equal
    parts = pixels.split(patches) if sum(patches) == len(pixels) else ()
    numbers: dict[object, int] = {}
    which: list[int] = []
    kept: list[int] = []
    for number, (part, grid) in enumerate(zip(parts, grids)):
        key: object = number
        if sizes[grid] > 1:
            content = part.detach().cpu().contiguous().view(torch.uint8).numpy()
            key = grid, hashlib.sha256(content).digest()
        if key not in numbers:
            numbers[key] = len(kept)
            kept.append(number)
        which.append(numbers[key])
    if len(kept) == len(grid_thw) or not parts:
        return pixels, grid_thw, torch.arange(len(pixels) // merge**2)
    tokens = [count // merge**2 for count in patches]
    starts = torch.tensor([0, *(tokens[number] for number in kept)]).cumsum(0).tolist()
    index = [torch.arange(starts[place], starts[place] + tokens[number]) for number, place in enumerate(which)]
    return torch.cat([parts[number] for number in kept]), grid_thw[kept], torch.cat(index)
