"""The vision encoder: patches of images and video frames to features for the text model.

Shapes: P patches of all images together, C hidden channels, M = P / merge^2 merged tokens, Ct channels of the text
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl_kernels import rotary

from .attention import Kind
from .config import VisionConfig
from .layers import GeluMLP, LayerNorm, embedding
from .memory import give_back_freed
from .positions import interpolation, patch_positions, patch_rope

ROWS = 1024  # patches that the layers between attentions see at a time; more is not faster
_LARGE = 512  # patches whose memory is worth giving back afterwards, and what was freed before them


def by_rows(function: Callable[..., Any], rows: int, *tensors: Tensor, over: Tensor | None = None) -> Any:
    """function(*tensors), a tensor or a tuple of them, computed for `rows` rows of all tensors at a time, so that what
    the function needs in between does not grow with the picture. Without gradients the result may take the place of
    `over`, one of the tensors that is not needed any more and has its shape and dtype."""
    if len(tensors[0]) <= rows:
        return function(*tensors)
    parts = (function(*part) for part in zip(*(tensor.split(rows) for tensor in tensors)))
    if torch.is_grad_enabled():
        found = list(parts)
        return torch.cat(found) if isinstance(found[0], Tensor) else tuple(torch.cat(one) for one in zip(*found))
    whole: tuple[Tensor, ...] = () if over is None else (over,)
    start = 0
    for part in parts:  # into the whole at once: never all parts and the whole side by side
        results = (part,) if isinstance(part, Tensor) else part
        if not whole:
            outputs = len(results[0]) * len(tensors[0]) // rows
            whole = tuple(x.new_empty(outputs, *x.shape[1:]) for x in results)
        for x, to in zip(results, whole):
            to[start : start + len(x)] = x
        start += len(results[0])
    return whole[0] if isinstance(part, Tensor) else whole


class _ConvWeight(nn.Module):
    """The weight of the released checkpoint's Conv3d, whose stride is its kernel: a matrix over flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, *kernel))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """(P, channels * time * height * width of a patch) -> (P, C), one matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = _ConvWeight(config)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches.to(self.proj.weight.dtype))


class VisionAttention(nn.Module):
    """Bidirectional attention within each frame: one call over the packed patches of all of them."""

    def __init__(self, config: VisionConfig, block: int, kind: Kind) -> None:
        super().__init__()
        self.block, self.kind = block, kind
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, C) to query, key and value, each (P, H, D)."""
        query, key, value = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        query, key = rotary(query, key, cos, sin)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        """(P, C), what `proj` is given."""
        return self.kind.vision(self.block, query, key, value, offsets).flatten(1)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Without gradients a large picture's result is written over x."""

    def __init__(self, config: VisionConfig, block: int, kind: Kind) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config, block, kind)
        self.mlp = GeluMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, offsets: Tensor, rope: tuple[Tensor, Tensor], rows: int = ROWS) -> Tensor:
        query, key, value = by_rows(self._project, rows, x, *rope)
        attended = self.attn.attend(query, key, value, offsets)
        del query, key, value
        return by_rows(self._finish, rows, x, attended, over=x)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(self.norm1(x), cos, sin)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        y, x = self.norm2(self.attn.proj(attended), x)
        return self.mlp(y, x)


class PatchMerger(nn.Module):
    """(P, C) -> (M, Ct): merge^2 neighbouring patches, which follow each other, become one token.

    The last merger normalises patches before they are merged, the DeepStack mergers normalise merged ones (`after`).
    """

    def __init__(self, config: VisionConfig, after: bool) -> None:
        super().__init__()
        self.after = after
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = LayerNorm(self.merged if after else config.hidden_size)
        self.linear_fc1 = nn.Linear(self.merged, self.merged)
        self.linear_fc2 = nn.Linear(self.merged, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.reshape(-1, self.merged)) if self.after else self.norm(x).reshape(-1, self.merged)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionModel(nn.Module):
    """Patches and their grids to merged features, and the DeepStack features of earlier blocks.

    Source: Bai et al., Qwen3-VL technical report, 2025, section 2; DeepStack: Meng et al., 2024, section 3.
    """

    def __init__(self, config: VisionConfig, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.rows = ROWS
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, block, kind) for block, kind in enumerate(kinds))
        self.merger = PatchMerger(config, after=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, after=True) for _ in config.deepstack_visual_indexes
        )

    def _embed(self, patches: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        x = self.patch_embed(patches)
        return x + (self.pos_embed(index) * weight[..., None]).sum(1).to(x.dtype)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Args:
            patches: (P, patch_dim) normalised pixels, blocks of merge x merge patches together.
            grid_thw: (images, 3) patches in time, height and width of each image or video.

        Returns:
            (M, Ct) features and, for each entry of `deepstack_visual_indexes`, (M, Ct) features of that block.

        Raises:
            ValueError: a grid is none, or the number or size of the patches does not fit the grids.
        """
        config = self.config
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point() or not (grid_thw > 0).all():
            raise ValueError(
                f"image and video grids must be positive integers of shape (images, 3), got {grid_thw.tolist()}"
            )
        expected = (int(grid_thw.prod(-1).sum()), config.patch_dim)
        if tuple(patches.shape) != expected:
            raise ValueError(
                f"pixel_values must have shape {expected} for grids {grid_thw.tolist()}, got {tuple(patches.shape)}"
            )
        if (grid_thw[:, 1:] % config.spatial_merge_size).any():
            raise ValueError(f"grids {grid_thw.tolist()} must be multiples of {config.spatial_merge_size} patches")
        large = len(patches) >= _LARGE and not torch.is_grad_enabled()
        if large:
            give_back_freed()
        positions = patch_positions(grid_thw, config.spatial_merge_size)
        index, weight = interpolation(config, grid_thw, positions)
        x = by_rows(self._embed, self.rows, patches, index, weight)
        rope = patch_rope(config, positions)
        frames = (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])
        offsets = F.pad(frames.cumsum(0), (1, 0))

        merged = max(1, self.rows // config.spatial_merge_size**2) * config.spatial_merge_size**2
        deepstack: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, offsets, rope, self.rows, use_reentrant=False)
            else:
                x = block(x, offsets, rope, self.rows)
            if number in config.deepstack_visual_indexes:
                merger = self.deepstack_merger_list[config.deepstack_visual_indexes.index(number)]
                deepstack[number] = by_rows(merger, merged, x)
        features = by_rows(self.merger, merged, x)
        if large:
            give_back_freed()
        return features, tuple(deepstack[number] for number in sorted(deepstack))
