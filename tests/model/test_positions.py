"""M-RoPE positions against transformers and against the drawing in the docstring; patch order; interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import IMAGE, TEXT, VIDEO, oracle, padded, prompt, tiny_config, tiny_model

from qvl_model.positions import interpolation, patch_positions, position_ids, text_rope

CONFIG = tiny_config()


def test_the_drawing_in_the_docstring():
    ids = torch.tensor([[1, 2, *[IMAGE] * 6, 3]])
    positions, delta = position_ids(CONFIG, ids, torch.tensor([9]), torch.tensor([[1, 4, 6]]))
    assert positions[:, 0].tolist() == [[0, 1, *[2] * 6, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert delta.tolist() == [6 - 9]


@pytest.mark.parametrize(
    "rows",
    [
        [(5,)],
        [(2, ("image", 1, 4, 6), 3)],
        [(("image", 1, 2, 8), ("image", 1, 8, 2), 1)],
        [(2, ("video", 3, 4, 4), 2, ("image", 1, 4, 2), 2, ("video", 1, 2, 6), 1)],
        [(2, ("image", 1, 4, 6), 3), (1,), (4, ("image", 1, 2, 2), 1, ("video", 2, 4, 4))],
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_and_deltas_are_those_of_transformers(rows, side):
    grids = {
        kind: [part[1:] for row in rows for part in row if not isinstance(part, int) and part[0] == kind]
        for kind in ("image", "video")
    }
    image, video = (torch.tensor(grids[kind]) if grids[kind] else None for kind in ("image", "video"))
    ids, mask = padded([prompt(*row) for row in rows], side)
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    theirs, deltas = oracle(tiny_model(CONFIG)).model.get_rope_index(ids, kinds, image, video, mask)
    aligned, _ = padded([prompt(*row) for row in rows], "right")
    ours, delta = position_ids(CONFIG, aligned, mask.sum(1), image, video)
    for row, length in enumerate(mask.sum(1).tolist()):
        assert torch.equal(ours[:, row, :length], theirs[:, row, mask[row].bool()])
    assert delta.tolist() == deltas.flatten().tolist()


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        ([[1, IMAGE, 2]], [[1, 4, 4]], "input_ids has 1 placeholders at token 1 for an image of 4"),
        ([[IMAGE, 2, IMAGE]], [[1, 2, 2]], "more image or video placeholders than there are images"),
    ],
)
def test_placeholders_that_do_not_match(ids, grid, message):
    ids = torch.tensor(ids)
    with pytest.raises(ValueError, match=message):
        position_ids(CONFIG, ids, torch.tensor([ids.shape[1]]), torch.tensor(grid))


def test_frequencies_are_interleaved_over_time_height_and_width():
    ids = torch.tensor([100.0, 200.0, 300.0]).view(3, 1, 1)
    cos, _ = text_rope(TEXT, ids)  # section [4, 2, 2]: T H W T H W T T
    frequency = TEXT.rope_theta ** (-torch.arange(0, 16, 2) / 16)
    axis = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    expected = torch.cos(ids.flatten()[axis] * frequency).repeat(2)
    torch.testing.assert_close(cos.flatten(), expected)


def test_patches_come_in_blocks():
    rows = patch_positions(torch.tensor([[1, 4, 4]]), 2)
    numbers = (rows[:, 0] * 4 + rows[:, 1]).tolist()
    assert numbers == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(
        patch_positions(torch.tensor([[3, 2, 2]]), 2), patch_positions(torch.tensor([[1, 2, 2]]), 2).repeat(3, 1)
    )


@pytest.mark.parametrize("grid", [(1, 6, 6), (1, 2, 10), (2, 18, 4), (1, 2, 2)])
def test_positions_are_interpolated_as_torch_does(grid):
    vision = CONFIG.vision
    table = torch.randn(6, 6, 8)
    grids = torch.tensor([grid])
    positions = patch_positions(grids, 2)
    index, weight = interpolation(vision, grids, positions)
    ours = (table.view(36, 8)[index] * weight[..., None]).sum(1)
    picture = F.interpolate(table.permute(2, 0, 1)[None], grid[1:], mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(ours, picture[:, positions[:, 0], positions[:, 1]].T)
