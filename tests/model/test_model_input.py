"""Inputs that the model refuses, with the numbers in the message; embeddings; the full-size preset."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE, images, padded, prompt, tiny_config, tiny_model

from qvl_model import Qwen3VL, Qwen3VLConfig

CONFIG = tiny_config()
PIXELS, GRID = images(CONFIG, [(1, 4, 4)])
IDS = torch.tensor([prompt(2, ("image", 1, 4, 4), 3)])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, r"at least one token, got \(1, 0\)"),
        (torch.tensor([1, 2]), {}, r"input_ids must have shape \(B, L\)"),
        (torch.tensor([[96]]), {}, r"input_ids must lie in \[0, 96\), got 96 to 96"),
        (torch.tensor([[-1, 3]]), {}, "got -1 to 3"),
        (IDS, {}, "input_ids has 4 image placeholders, but no image is given"),
        (
            IDS,
            dict(zip(("pixel_values", "image_grid_thw"), images(CONFIG, [(1, 4, 6)]))),
            "4 image placeholders, but .* 6 features",
        ),
        (torch.tensor([[1, IMAGE, 2]]), {"pixel_values": PIXELS, "image_grid_thw": GRID}, "has 1 image placeholders"),
        (torch.tensor([[1, 2]]), {"pixel_values": PIXELS, "image_grid_thw": GRID}, "has 0 image placeholders, but"),
        (IDS, {"pixel_values": PIXELS}, "pixel values and image_grid_thw must be given together"),
        (IDS, {"pixel_values": PIXELS[:9], "image_grid_thw": GRID}, r"pixel_values must have shape \(16, 96\)"),
        (
            IDS,
            {"pixel_values": PIXELS, "image_grid_thw": GRID * torch.tensor([1, 2, 1])},
            "pixel_values must have shape",
        ),
        (IDS[:, :4], {"attention_mask": torch.zeros(1, 4)}, "attention_mask hides every token of row 0"),
        (IDS[:, :4], {"attention_mask": torch.ones(1, 3)}, r"attention_mask must have shape \(1, 4\), got \(1, 3\)"),
        (IDS[:, :4], {"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask must have shape \(1, 4\), got"),
        (IDS[:, :2], {"position_ids": torch.zeros(1, 2)}, r"position_ids must have shape \(3, 1, 2\), got \(1, 2\)"),
        (IDS[:, :2].float(), {}, "input_ids must be int64 or int32, got torch.float32"),
        (IDS[:, :2], {"logits_to_keep": -1}, r"logits_to_keep must be 0 \(all\) or more, got -1"),
        (IDS[:, :4], {"attention_mask": torch.zeros(2, 4)}, r"attention_mask must have shape \(1, 4\), got \(2, 4\)"),
        (torch.ones(1, 513, dtype=torch.long), {}, "the prompt has 513 tokens, the model has 512 positions"),
    ],
)
def test_bad_input_is_named(ids, options, message):
    with pytest.raises(ValueError, match=message), torch.no_grad():
        tiny_model(CONFIG)(ids, **options)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[1, 3, 4]], "must be multiples of 2 patches"),
        ([1, 4, 3], r"must be positive integers of shape \(images, 3\), got \[1, 4, 3\]"),
        ([[1, 0, 4]], "must be positive integers"),
        ([[1.0, 4.0, 4.0]], "must be positive integers"),
    ],
)
def test_grids_that_are_none_are_refused(grid, message):
    with pytest.raises(ValueError, match=message), torch.no_grad():
        tiny_model(CONFIG).model.visual(PIXELS[:12], torch.tensor(grid))


def test_the_error_names_the_row_whose_grids_are_swapped():
    pixels, grids = images(CONFIG, [(1, 4, 4), (1, 2, 4), (1, 4, 4)])
    ids, mask = padded([prompt(1, ("image", 1, 4, 4)), prompt(1, ("image", 1, 4, 4), 1, ("image", 1, 2, 4))], "left")
    with pytest.raises(ValueError, match="row 1 of input_ids has 2 placeholders at token 4 for an image of 4"):
        tiny_model(CONFIG)(ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids)


@pytest.mark.parametrize("keep", [1, 3, 8, 99])
def test_only_the_logits_asked_for_are_computed(keep):
    model = tiny_model(CONFIG)
    ids, mask = padded([prompt(8), prompt(5, seed=1)], "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=keep).logits, whole[:, -keep:])
        last = model.forward_embeds(model.embed_inputs(ids, attention_mask=mask), logits_to_keep=min(keep, 5)).logits
    torch.testing.assert_close(last, whole[:, -min(keep, 5) :])


def test_given_positions_are_used_as_they_are():
    model = tiny_model(CONFIG)
    media = {"pixel_values": PIXELS, "image_grid_thw": GRID}
    positions = model.embed_inputs(IDS, **media).position_ids
    with torch.no_grad():
        whole = model(IDS, **media).logits
        torch.testing.assert_close(model(IDS, **media, position_ids=positions).logits, whole)
        moved = model(IDS, **media, position_ids=positions * 3).logits
        assert (moved - whole).abs().max() > 1e-2
        ids, mask = padded([IDS[0].tolist(), [0] * (IDS.shape[1] + 2)], "left")
        padded_positions = torch.nn.functional.pad(positions, (2, 0), value=99).repeat(1, 2, 1)
        inputs = model.embed_inputs(ids, attention_mask=mask, position_ids=padded_positions, **media)
    assert torch.equal(inputs.position_ids[:, 0, : IDS.shape[1]], positions[:, 0])
    assert inputs.rope_deltas[0] == int(positions.max()) + 1 - IDS.shape[1]


def test_a_cache_counts_towards_the_positions():
    model = tiny_model(CONFIG)
    cache = model.new_cache(1, 600)
    with torch.no_grad():
        model(torch.ones(1, 512, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="the prompt has 513 tokens"):
            model(torch.tensor([[1]]), cache=cache)


def test_embeddings_are_unit_vectors_of_the_last_token():
    model = tiny_model(CONFIG)
    ids, mask = padded([prompt(5), prompt(3, seed=1)], "left")
    with torch.no_grad():
        together = model.embed(ids, attention_mask=mask)
        alone = torch.cat([model.embed(torch.tensor([row])) for row in (prompt(5), prompt(3, seed=1))])
        hidden = model(torch.tensor([prompt(5)])).hidden[:, -1]
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(together[:1], hidden / hidden.norm())


def test_a_model_on_the_meta_device_costs_no_memory():
    with torch.device("meta"):
        model = Qwen3VL(Qwen3VLConfig.qwen3_vl_2b(), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in model.parameters())


def available_memory() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


@pytest.mark.skipif(available_memory() < 9 << 30, reason="needs 9 GB of free memory")
def test_the_full_capacity_preset_runs_at_full_size():
    config = Qwen3VLConfig.full_capacity_2b()
    model = Qwen3VL(config, dtype=torch.bfloat16).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_597_311_488
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, config.vision.patch_dim)
    ids = torch.tensor(
        [[11, config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 12]]
    )
    cache = model.new_cache(1, 16)
    with torch.inference_mode():
        logits = model(ids, pixel_values=pixels, image_grid_thw=grid, cache=cache).logits
        assert logits.shape == (1, 8, config.text.vocab_size)
        for _ in range(2):
            token = logits[:, -1:].argmax(-1)
            logits = model(token, cache=cache).logits
    assert logits.isfinite().all()
    assert cache.lengths.tolist() == [10]
