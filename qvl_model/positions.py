"""Where every token and every patch stands: the position ids of M-RoPE, the 2-D positions of patches, and their
angles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Qwen3VLConfig, TextConfig, VisionConfig


def _segments(grid_thw: Tensor | None) -> list[tuple[int, int]]:
    """(rows, columns) of each vision segment of a prompt: an image is one, a video is one per temporal patch, since a
    timestamp in text stands before each."""
    return [] if grid_thw is None else [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]


def position_ids(
    config: Qwen3VLConfig,
    input_ids: Tensor,
    lengths: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The (time, height, width) position of every token, and what to add to a length to get the next one.

    Text counts up in all three. The tokens of an image that starts at position s stand at (s, s + row, s + column) of
    its merged grid, and the text behind it goes on at s + max(rows, columns)::

        tokens   a  b  [2 x 3 image     ]  c
        time     0  1  2  2  2  2  2  2    5
        height   0  1  2  2  2  3  3  3    5
        width    0  1  2  3  4  2  3  4    5

    Args:
        input_ids: (B, L); row b has its tokens in the first `lengths[b]` places.
        lengths: (B,).
        image_grid_thw: (images, 3) patches in time, height and width, in the order of the prompt.
        video_grid_thw: (videos, 3) likewise.

    Returns:
        ids (3, B, L), zero beyond a row's length, and deltas (B,): the token after n tokens stands at n + delta.

    Raises:
        ValueError: the placeholders of a row do not match the grids; the message has both numbers.

    Source: Bai et al., Qwen2.5-VL, 2025, section 2.1.3; Qwen3-VL's timestamps in place of absolute time.
    """
    segments = {
        config.image_token_id: iter(_segments(image_grid_thw)),
        config.video_token_id: iter(_segments(video_grid_thw)),
    }
    ids = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    deltas = []
    for row, (tokens, length) in enumerate(zip(input_ids.tolist(), lengths.tolist())):
        try:
            parts = list(_row_positions(tokens[:length], segments, config.vision.spatial_merge_size))
        except ValueError as error:
            raise ValueError(f"row {row} of input_ids {error}") from None
        if parts:
            ids[:, row, :length] = torch.cat(parts, dim=1)
        deltas.append(int(ids[:, row, :length].max()) + 1 - length if length else 0)
    return ids.to(input_ids.device), torch.tensor(deltas, device=input_ids.device)


def _row_positions(tokens: list[int], segments: dict[int, Iterator], merge: int) -> Iterator[Tensor]:
    at = start = 0
    while at < len(tokens):
        if tokens[at] in segments:
            try:
                patch_rows, patch_columns = next(segments[tokens[at]])
            except StopIteration:
                raise ValueError("has more image or video placeholders than there are images and videos") from None
            rows, columns = patch_rows // merge, patch_columns // merge
            run = tokens[at : at + rows * columns]
            if run.count(tokens[at]) != rows * columns:
                raise ValueError(
                    f"has {run.count(tokens[at])} placeholders at token {at} for an image of {rows * columns}"
                )
            index = torch.arange(rows * columns)
            yield torch.stack((torch.zeros_like(index), index // columns, index % columns)) + start
            at, start = at + rows * columns, start + max(rows, columns)
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] in segments), len(tokens))
            yield (torch.arange(end - at) + start).expand(3, -1)
            at, start = end, start + end - at


def text_rope(config: TextConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the interleaved M-RoPE angles, (B, 1, L, D) float32, for `rotary`.

    Frequency i of the D / 2 turns by time, height or width according to its place; with section [a, b, c]::

        THWTHWTHW ... TTTT    (H at 1, 4, 7, ... below 3 b;  W at 2, 5, 8, ... below 3 c;  T elsewhere)

    Args:
        ids: (3, B, L) positions.

    Source: Bai et al., Qwen3-VL technical report, 2025, section 2 (interleaved M-RoPE).
    """
    half = config.head_dim // 2
    place = torch.arange(half, device=ids.device)
    axis = torch.zeros_like(place)
    for which in (1, 2):
        axis[(place % 3 == which) & (place < 3 * config.mrope_section[which])] = which
    angles = ids.float()[axis].permute(1, 2, 0) * rope_frequencies(config, ids.device)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rope_frequencies(config: TextConfig, device: torch.device | None = None) -> Tensor:
    """theta^(-2 i / D) for i in [0, D / 2): the angle of a text token at position p is p times that."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return 1.0 / config.rope_theta**exponent


def patch_positions(grid_thw: Tensor, merge: int) -> Tensor:
    """(row, column) of every patch, (patches, 2), in the order of the pixel values: blocks of merge x merge patches.

    For a grid of 4 x 4 patches and merge 2 the patches come as::

         0  1 |  4  5
         2  3 |  6  7
        ------+------
         8  9 | 12 13
        10 11 | 14 15
    """
    positions = []
    for frames, rows, columns in grid_thw.tolist():
        row = torch.arange(rows).view(-1, merge, 1, 1).transpose(1, 2).expand(-1, columns // merge, merge, merge)
        column = torch.arange(columns).view(1, -1, 1, merge).expand(rows // merge, -1, merge, merge)
        positions.append(torch.stack((row.flatten(), column.flatten()), dim=-1).repeat(frames, 1))
    return torch.cat(positions).to(grid_thw.device)


def patch_rope(config: VisionConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the 2-D rotary angles of patches, (patches, 1, D) float32: D / 4 frequencies each for row and
    column."""
    quarter = torch.arange(0, config.head_dim // 2, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / 10000.0 ** (quarter / (config.head_dim // 2))
    angles = (positions[:, :, None].float() * frequency).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def interpolation(config: VisionConfig, grid_thw: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The four learned positions around every patch and their bilinear weights, (patches, 4) each.

    The corners of an image's grid lie on the corners of the learned grid.
    """
    side = round(config.num_position_embeddings**0.5)
    patches = grid_thw.prod(-1)
    sizes = grid_thw[:, 1:].repeat_interleave(patches, dim=0)
    at = positions.float() * (side - 1) / (sizes - 1).clamp(min=1)
    low = at.floor()
    far = at - low
    low = low.long()
    high = (low + 1).clamp(max=side - 1)
    rows = torch.stack((low[:, 0], high[:, 0]), dim=1)
    columns = torch.stack((low[:, 1], high[:, 1]), dim=1)
    row_weights = torch.stack((1 - far[:, 0], far[:, 0]), dim=1)
    column_weights = torch.stack((1 - far[:, 1], far[:, 1]), dim=1)
    index = rows[:, :, None] * side + columns[:, None, :]
    return index.flatten(1), (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
