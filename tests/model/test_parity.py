"""The same logits, tokens, gradients and parameter names as transformers, from the same random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import IMAGE, VIDEO, images, oracle, padded, prompt, tiny_config, tiny_model


@dataclass
class Case:
    """A configuration and a batch: `rows` of prompt parts, padded on `side`."""

    rows: list[tuple]
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    side: str = "right"

    def config(self):
        return tiny_config(tied=self.tied, text=self.text, vision=self.vision)

    def inputs(self, config) -> dict[str, Any]:
        merge = config.vision.spatial_merge_size
        ids, mask = padded([prompt(*row, merge=merge, seed=i) for i, row in enumerate(self.rows)], self.side)
        inputs = {"input_ids": ids, "attention_mask": mask}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            grids = [part[1:] for row in self.rows for part in row if not isinstance(part, int) and part[0] == kind]
            if grids:
                inputs[pixels], inputs[grid] = images(config, grids)
        return inputs


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 1}
CASES = {
    "text": Case([(7,)]),
    "one token": Case([(1,)]),
    "tied": Case([(9,)], tied=True),
    "no grouping": Case([(9,)], text={"num_attention_heads": 2}),
    "one key head": Case([(9,)], text=HEADS),
    "wide heads": Case([(9,)], text={"head_dim": 32, "mrope_section": (6, 5, 5)}),
    "all time": Case([(4, ("image", 1, 4, 4), 3)], text={"mrope_section": (8, 0, 0)}),
    "unequal sections": Case([(4, ("image", 1, 4, 6), 3)], text={"mrope_section": (5, 1, 2)}),
    "attention bias": Case([(9,)], text={"attention_bias": True}),
    "image": Case([(3, ("image", 1, 4, 6), 4)]),
    "image first and last": Case([(("image", 1, 4, 4),)]),
    "odd image": Case([(2, ("image", 1, 2, 14), 3)]),
    "larger than the learned grid": Case([(2, ("image", 1, 18, 10), 3)]),
    "smallest image": Case([(2, ("image", 1, 2, 2), 3)]),
    "two images": Case([(2, ("image", 1, 4, 6), 3, ("image", 1, 6, 2), 2)]),
    "video": Case([(2, ("video", 3, 4, 4), 3)]),
    "image and video": Case([(2, ("video", 2, 4, 4), 3, ("image", 1, 2, 4), 2, ("video", 1, 2, 2), 1)]),
    "no deepstack": Case([(3, ("image", 1, 4, 4), 2)], vision={"deepstack_visual_indexes": ()}),
    "deepstack everywhere": Case([(3, ("image", 1, 4, 4), 2)], vision={"deepstack_visual_indexes": (0, 1, 2)}),
    "deepstack late": Case([(3, ("image", 1, 4, 4), 2)], vision={"deepstack_visual_indexes": (2,)}),
    "deepstack out of order": Case([(3, ("image", 1, 4, 4), 2)], vision={"deepstack_visual_indexes": (2, 0)}),
    "no merging": Case([(3, ("image", 1, 3, 5), 2)], vision={"spatial_merge_size": 1}),
    "merging of 3": Case([(3, ("image", 1, 6, 9), 2)], vision={"spatial_merge_size": 3, "temporal_patch_size": 1}),
    "vision heads of 12": Case([(3, ("image", 1, 4, 4), 2)], vision={"hidden_size": 24}),
    "one learned position": Case([(3, ("image", 1, 4, 4), 2)], vision={"num_position_embeddings": 1}),
    "deeper and wider": Case(
        [(3, ("image", 1, 4, 4), 2)],
        text={"num_hidden_layers": 6, "hidden_size": 64},
        vision={
            "depth": 5,
            "out_hidden_size": 64,
            "hidden_size": 64,
            "num_heads": 4,
            "deepstack_visual_indexes": (1, 3, 4),
        },
    ),
    "batch padded left": Case([(3,), (9,), (6,)], side="left"),
    "batch padded right": Case([(3,), (9,), (6,)]),
    "images padded left": Case(
        [(2, ("image", 1, 4, 6), 3), (5,), (1, ("image", 1, 2, 2), 2, ("image", 1, 4, 4), 4)], side="left"
    ),
    "images padded right": Case([(2, ("image", 1, 4, 6), 3), (5,), (1, ("video", 2, 2, 4), 4)], tied=True),
}


def their_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """transformers also wants to be told which tokens are images and videos, as its processor does."""
    ids = inputs["input_ids"]
    return {**inputs, "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", CASES)
def test_logits_without_and_with_a_cache(name):
    case = CASES[name]
    config = case.config()
    model = tiny_model(config)
    inputs = case.inputs(config)
    mask = inputs["attention_mask"].bool()
    theirs = oracle(model)(**their_inputs(inputs)).logits
    assert relative_error(model(**inputs).logits[mask], theirs[mask]) <= 1e-5
    cache = model.new_cache(*inputs["input_ids"].shape)
    cached = model(**inputs, cache=cache)
    assert relative_error(cached.logits[mask], theirs[mask]) <= 1e-5
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize(
    "name", ["text", "tied", "image", "two images", "video", "images padded left", "batch padded left"]
)
def test_greedy_tokens_are_identical_over_64_steps(name):
    case = CASES[name]
    config = case.config()
    model = tiny_model(config, seed=1)
    inputs = case.inputs(config)
    theirs = oracle(model).generate(
        **their_inputs(inputs), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, -64:]
    cache = model.new_cache(inputs["input_ids"].shape[0], inputs["input_ids"].shape[1] + 64)
    prepared = model.embed_inputs(**inputs)
    token = model.forward_embeds(prepared, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    ours = [token]
    for _ in range(63):
        token = model(token, cache=cache).logits[:, -1].argmax(-1, keepdim=True)
        ours.append(token)
    assert torch.equal(torch.cat(ours, 1), theirs)
    assert len(theirs.unique()) > 3, "a model that says one thing for ever would prove little"


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_keys_and_shapes_are_identical(tied):
    model = tiny_model(tiny_config(tied=tied))
    ours, theirs = model.state_dict(), oracle(model).state_dict()
    assert set(ours) == set(theirs)
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}


def test_gradients_are_those_of_transformers():
    case = CASES["two images"]
    config = case.config()
    model = tiny_model(config)
    theirs = oracle(model)
    inputs = case.inputs(config)
    with torch.enable_grad():
        model(**inputs).logits.square().mean().backward()
        theirs(**their_inputs(inputs)).logits.square().mean().backward()
    others = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, others[name].grad) <= 1e-4, name


def test_gradient_checkpointing_changes_nothing():
    case = CASES["two images"]
    config = case.config()
    inputs = case.inputs(config)
    grads = []
    for enabled in (False, True):
        model = tiny_model(config).train()
        model.set_gradient_checkpointing(enabled)
        with torch.enable_grad():
            model(**inputs).logits.square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_bfloat16_stays_near_float32():
    case = CASES["image"]
    config = case.config()
    inputs = case.inputs(config)
    model = tiny_model(config)
    exact = model(**inputs).logits
    half = oracle(model.to(torch.bfloat16))(**their_inputs(inputs)).logits
    assert relative_error(model(**inputs).logits.float(), exact) <= 2 * relative_error(half.float(), exact) + 2**-8
