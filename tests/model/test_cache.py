"""The cache: chunks, ragged rows, selection and truncation give what the whole prompt gives; what does not fit is
refused."""

from __future__ import annotations

import pytest
import torch
from tiny import images, padded, prompt, tiny_config, tiny_model

from qvl_model import KVCache

CONFIG = tiny_config()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_a_prompt_in_chunks_gives_the_whole_prompts_logits(chunk):
    model = tiny_model(CONFIG)
    rows = [prompt(2, ("image", 1, 4, 6), 9), prompt(4, seed=3), prompt(1, ("image", 1, 2, 2), 3, seed=5)]
    ids, mask = padded(rows, "left")
    pixels, grids = images(CONFIG, [(1, 4, 6), (1, 2, 2)])
    inputs = model.embed_inputs(ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids)
    whole = model.forward_embeds(inputs).logits
    cache = model.new_cache(3, ids.shape[1] + chunk)
    parts = [
        model.forward_embeds(inputs.slice(start, start + chunk), cache=cache).logits
        for start in range(0, ids.shape[1], chunk)
    ]
    joined = torch.cat(parts, 1)
    for row, length in enumerate(inputs.lengths.tolist()):
        torch.testing.assert_close(joined[row, :length], whole[row, :length])
    assert cache.lengths.tolist() == inputs.lengths.tolist()


def test_ragged_rows_go_on_as_each_does_alone():
    model = tiny_model(CONFIG)
    rows = [prompt(7), prompt(2, seed=1), prompt(4, seed=2)]
    ids, mask = padded(rows, "right")
    cache = model.new_cache(3, 16)
    model(ids, attention_mask=mask, cache=cache)
    steps = torch.randint(1, 90, (3, 5))
    together = [model(steps[:, i : i + 1], cache=cache).logits for i in range(5)]
    for row, tokens in enumerate(rows):
        alone = model(torch.tensor([[*tokens, *steps[row].tolist()]])).logits[:, -5:]
        torch.testing.assert_close(torch.cat([step[row : row + 1] for step in together], 1), alone)


def test_a_second_turn_with_an_image_stands_behind_the_first():
    model = tiny_model(CONFIG)
    first, second = prompt(3, ("image", 1, 4, 4), 2), prompt(1, ("image", 1, 2, 6), 4, seed=1)
    pixels, grids = images(CONFIG, [(1, 4, 4), (1, 2, 6)])
    whole = model(torch.tensor([first + second]), pixel_values=pixels, image_grid_thw=grids).logits
    cache = model.new_cache(1, 64)
    model(torch.tensor([first]), pixel_values=pixels[:16], image_grid_thw=grids[:1], cache=cache)
    later = model(torch.tensor([second]), pixel_values=pixels[16:], image_grid_thw=grids[1:], cache=cache).logits
    torch.testing.assert_close(later, whole[:, len(first) :])


def test_given_positions_go_on_behind_a_cache():
    model = tiny_model(CONFIG)
    ids = torch.tensor([prompt(3, ("image", 1, 4, 4), 6)])
    pixels, grids = images(CONFIG, [(1, 4, 4)])
    inputs = model.embed_inputs(ids, pixel_values=pixels, image_grid_thw=grids)
    whole = model.forward_embeds(inputs).logits
    cache = model.new_cache(1, 32)
    model(ids[:, :-4], pixel_values=pixels, image_grid_thw=grids, cache=cache)
    given = model(ids[:, -4:-2], position_ids=inputs.position_ids[:, :, -4:-2], cache=cache).logits
    computed = model(ids[:, -2:], cache=cache).logits
    torch.testing.assert_close(torch.cat((given, computed), 1), whole[:, -4:])


def test_each_row_has_its_own_room_for_positions():
    model = tiny_model(tiny_config(text={"max_position_embeddings": 12}))
    cache = model.new_cache(2, 32)
    ids, mask = padded([prompt(10), prompt(2, seed=1)], "right")
    model(ids, attention_mask=mask, cache=cache)
    more, more_mask = padded([[5], [6] * 8], "right")
    model(more, attention_mask=more_mask, cache=cache)
    assert cache.lengths.tolist() == [11, 10]
    with pytest.raises(ValueError, match="the prompt has 13 tokens, the model has 12 positions"):
        model(torch.ones(2, 2, dtype=torch.long), cache=cache)


def test_an_image_of_one_token_is_an_image_also_behind_a_cache():
    model = tiny_model(CONFIG)
    pixels, grids = images(CONFIG, [(1, 2, 2)])
    ids = torch.tensor([[*prompt(4), CONFIG.image_token_id]])
    whole = model(ids, pixel_values=pixels, image_grid_thw=grids).logits
    cache = model.new_cache(1, 8)
    model(ids[:, :-1], cache=cache)
    last = model(ids[:, -1:], pixel_values=pixels, image_grid_thw=grids, cache=cache).logits
    torch.testing.assert_close(last, whole[:, -1:])


def test_rows_can_leave_and_be_repeated():
    model = tiny_model(CONFIG)
    ids, mask = padded([prompt(5), prompt(3, seed=1), prompt(1, ("image", 1, 4, 6), 2, seed=2)], "right")
    pixels, grids = images(CONFIG, [(1, 4, 6)])  # so the third row's positions lag behind its length
    caches = [model.new_cache(3, 16) for _ in range(2)]
    for each in caches:
        model(ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids, cache=each)
    cache, kept = caches
    token = torch.tensor([[7], [8], [9]])
    kept.select([2, 0, 2])
    assert kept.lengths.tolist() == [11, 5, 11]
    assert kept.rope_deltas.tolist() == [-3, 0, -3]
    order = torch.tensor([2, 0, 2])
    torch.testing.assert_close(model(token[order], cache=kept).logits, model(token, cache=cache).logits[order])


def test_a_shared_prompt_can_be_used_again():
    model = tiny_model(CONFIG)
    cache = model.new_cache(1, 16)
    ids = torch.tensor([prompt(6)])
    model(ids, cache=cache)
    first = model(torch.tensor([[5, 6]]), cache=cache).logits
    cache.truncate(torch.tensor([6]))
    torch.testing.assert_close(model(torch.tensor([[5, 6]]), cache=cache).logits, first)
    with pytest.raises(ValueError, match=r"cannot truncate lengths \[8\] to \[9\]"):
        cache.truncate(torch.tensor([9]))
    cache.reset()
    assert cache.lengths.tolist() == [0]


def test_a_generated_placeholder_is_text():
    model = tiny_model(CONFIG)
    cache = model.new_cache(1, 8)
    model(torch.tensor([[1, 2]]), cache=cache)
    model(torch.tensor([[CONFIG.image_token_id]]), cache=cache)
    assert cache.lengths.tolist() == [3]


@pytest.mark.parametrize(("capacity", "tokens"), [(4, 5), (8, 9)])
def test_what_does_not_fit_is_refused_with_both_numbers(capacity, tokens):
    model = tiny_model(CONFIG)
    cache = model.new_cache(1, capacity)
    with pytest.raises(ValueError, match=f"the cache has room for {capacity} tokens, {tokens} are needed"):
        model(torch.ones(1, tokens, dtype=torch.long), cache=cache)
    assert cache.lengths.tolist() == [0], "a refused step leaves nothing behind"


def test_another_batch_is_refused():
    model = tiny_model(CONFIG)
    with pytest.raises(ValueError, match="the cache has 2 rows, the input has 1"):
        model(torch.tensor([[1, 2]]), cache=model.new_cache(2, 8))


def test_memory_is_what_the_docstring_says():
    cache = KVCache(CONFIG.text, 2, 10, torch.bfloat16)
    text = CONFIG.text
    assert cache.nbytes == 2 * text.num_hidden_layers * 2 * text.num_key_value_heads * 10 * text.head_dim * 2
