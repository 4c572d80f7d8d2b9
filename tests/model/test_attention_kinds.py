"""Every layer's attention by name: a cache gives what the whole text gives, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from tiny import images, padded, prompt, tiny_config, tiny_model

from qvl_kernels import attention, quantize_kv
from qvl_model import KVCache, Qwen3VL
from qvl_model.attention import Fused, Linear, SlidingWindow, Step, parse
from qvl_model.weights import save_pretrained

CONFIG = tiny_config()
WINDOW, SINKS = "sparse:sliding_window=5", "sparse:sliding_window=5,sinks=3"
LINEAR, ELU = "linear:features=32", "linear:elu"
KINDS = [WINDOW, SINKS, LINEAR, ELU, ["fused", SINKS, ELU]]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def model_of(attention, **options):
    """The tiny model's weights under another attention."""
    weights = tiny_model(CONFIG).state_dict()
    model = Qwen3VL(CONFIG, attention=attention, **options).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_a_prompt_in_chunks_gives_the_whole_prompts_logits(attention, chunk):
    model = model_of(attention)
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
        torch.testing.assert_close(joined[row, :length], whole[row, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_ragged_rows_go_on_as_each_does_alone(attention):
    model = model_of(attention)
    rows = [prompt(11), prompt(2, seed=1), prompt(4, seed=2)]
    ids, mask = padded(rows, "right")
    cache = model.new_cache(3, 32)
    model(ids, attention_mask=mask, cache=cache)
    steps = torch.randint(1, 90, (3, 9))
    together = [model(steps[:, i : i + 1], cache=cache).logits for i in range(9)]
    for row, tokens in enumerate(rows):
        alone = model(torch.tensor([[*tokens, *steps[row].tolist()]])).logits[:, -9:]
        joined = torch.cat([step[row : row + 1] for step in together], 1)
        torch.testing.assert_close(joined, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_rows_can_leave_and_be_repeated(attention):
    model = model_of(attention)
    ids, mask = padded([prompt(9), prompt(3, seed=1), prompt(6, seed=2)], "right")
    caches = [model.new_cache(3, 16) for _ in range(2)]
    for each in caches:
        model(ids, attention_mask=mask, cache=each)
    cache, kept = caches
    token, order = torch.tensor([[7], [8], [9]]), torch.tensor([2, 0, 2])
    kept.select(order.tolist())
    torch.testing.assert_close(model(token[order], cache=kept).logits, model(token, cache=cache).logits[order])
    kept.reset()
    first = model(ids[order, :3], cache=kept).logits
    torch.testing.assert_close(first, model(ids[order, :3]).logits, rtol=1e-4, atol=1e-4)


def test_a_window_that_covers_the_text_is_softmax_attention():
    ids = torch.tensor([prompt(30)])
    expected = model_of("fused")(ids).logits
    torch.testing.assert_close(model_of("sparse:sliding_window=30")(ids).logits, expected, rtol=1e-4, atol=1e-4)
    other = model_of("sparse:sliding_window=29")(ids).logits
    torch.testing.assert_close(other[:, :29], expected[:, :29], rtol=1e-4, atol=1e-4)
    assert (other[:, 29] - expected[:, 29]).abs().max() > 1e-3, "the last token does not see the first"


def test_window_and_sinks_are_those_of_a_mask():
    query, key, value = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    ours = parse(SINKS).text(0, query, key, value, Step((query, query), None, None))
    far = torch.arange(20)[:, None] - torch.arange(20)
    mask = (far >= 0) & ((far < 5) | (torch.arange(20) < 3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_window_and_a_state_stay_small():
    text = CONFIG.text
    for name, tokens in ((SINKS, 8), (WINDOW, 5)):
        sizes = [KVCache(text, 2, capacity, attention=name).nbytes for capacity in (50, 5000)]
        assert sizes == [2 * text.num_hidden_layers * 2 * text.num_key_value_heads * tokens * text.head_dim * 4] * 2
    model = model_of(LINEAR)
    cache = model.new_cache(1, 400)
    model(torch.tensor([prompt(4)]), cache=cache)
    first = cache.nbytes
    model(torch.tensor([prompt(300)]), cache=cache)
    assert 0 < cache.nbytes == first


def test_an_int8_cache_holds_what_quantize_kv_says():
    text, kind = CONFIG.text, parse("fused")
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    cache = KVCache(text, 2, 12, torch.int8)
    steps = []
    for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
        step = Step((query, query), cache, cache.begin(part.stop - part.start))
        steps.append(kind.text(1, query[:, :, part], key[:, :, part], value[:, :, part], step))
        cache.advance(torch.tensor([part.stop - part.start] * 2))
    rounded = [(x * scale[..., None]) for x, scale in map(quantize_kv, (key, value))]
    # Few queries are rounded to 15 bits: a score is off by |q|_max |k|_1 / 65534, an output by twice that |v|.
    score = query.abs().max() / 4 * rounded[0].abs().sum(-1).max() / 65534
    bound = (2 * score * value.abs().max()).item() + 1e-6
    torch.testing.assert_close(torch.cat(steps, 2), attention(query, *rounded, causal=True), rtol=0, atol=bound)
    elements = 2 * text.num_hidden_layers * 2 * text.num_key_value_heads * 12
    assert cache.nbytes == elements * (text.head_dim + 4)


def test_a_model_runs_on_an_int8_cache():
    model = tiny_model(CONFIG)
    ids = torch.tensor([prompt(24)])
    exact, rounded = (model(ids, cache=model.new_cache(1, 24, dtype)).logits for dtype in (None, torch.int8))
    error = (exact - rounded).norm() / exact.norm()
    assert 0 < error < 3 / 127, "a few roundings of half a step of 127"


def test_going_back_is_refused_where_it_is_forgotten():
    cases = ((WINDOW, "a window of 5 keys has dropped"), (LINEAR, "the state of linear attention"))
    for name, message in cases:
        model = model_of(name)
        cache = model.new_cache(1, 32)
        model(torch.tensor([prompt(12)]), cache=cache)
        cache.truncate(torch.tensor([12]))
        with pytest.raises(ValueError, match=message):
            cache.truncate(torch.tensor([7]))
    model = model_of(SINKS)
    cache = model.new_cache(1, 32)
    model(torch.tensor([prompt(8)]), cache=cache)
    cache.truncate(torch.tensor([6]))
    again = model(torch.tensor([prompt(8)[6:]]), cache=cache).logits
    torch.testing.assert_close(again, model(torch.tensor([prompt(8)])).logits[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", KINDS, ids=str)
def test_generation_follows_the_whole_texts_logits(attention):
    model = model_of(attention)
    ids = torch.tensor([prompt(6)])
    out = model.generate(ids, max_new_tokens=12, progress=False)
    assert torch.equal(model(out[:, :-1]).logits[:, 5:].argmax(-1), out[:, 6:])


@pytest.mark.parametrize("kind", ["sparse:sliding_window=400", LINEAR, ELU, ["fused", ELU, "fused"]], ids=str)
def test_vision_blocks_have_kinds_too(kind):
    model = model_of("fused", vision_attention=kind)
    pixels, grids = images(CONFIG, [(1, 4, 6), (2, 4, 4), (1, 2, 2)])
    together, _ = model.model.visual(pixels, grids)
    frames = [(1, 4, 6), (1, 4, 4), (1, 4, 4), (1, 2, 2)]
    starts = [0, 24, 40, 56, 60]
    alone = [
        model.model.visual(pixels[start:stop], torch.tensor([frame]))[0]
        for frame, start, stop in zip(frames, starts, starts[1:])
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    fused, _ = model_of("fused").model.visual(pixels, grids)
    near = (together - fused).abs().max() < 1e-3
    assert near == (kind == "sparse:sliding_window=400")


def test_training_reaches_every_parameter():
    model = model_of([SINKS, LINEAR, ELU], vision_attention=["sparse:sliding_window=7", LINEAR, ELU]).train()
    model.set_gradient_checkpointing()
    pixels, grids = images(CONFIG, [(1, 4, 6)])
    with torch.enable_grad():
        ids = torch.tensor([prompt(2, ("image", 1, 4, 6), 9)])
        model(ids, pixel_values=pixels, image_grid_thw=grids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_checkpoint_remembers_its_attention(tmp_path):
    model = model_of(["fused", LINEAR, SINKS], vision_attention=ELU)
    save_pretrained(model, tmp_path)
    again = Qwen3VL.from_pretrained(tmp_path)
    assert again.attention == model.attention
    assert again.vision_attention == (ELU,) * 3
    ids = torch.tensor([prompt(9)])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert Qwen3VL.from_pretrained(tmp_path, attention="fused").attention == ("fused",) * 3
    save_pretrained(tiny_model(CONFIG), tmp_path)
    assert "qvl_attention" not in (tmp_path / "config.json").read_text(), "a released model's file stays as it is"


def test_names_are_parsed():
    assert parse("fused") == Fused()
    assert parse("linear") == Linear()
    assert parse("linear:features=64,seed=3") == Linear(64, 3)
    assert parse(SINKS) == SlidingWindow(5, 3)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flash", "attention must be one of fused, linear"),
        ("sparse", "attention must be one of fused, linear"),
        ("sparse:sliding=3", "attention must be one of fused, linear"),
        ("sparse:sliding_window", "window must be a whole number above 0"),
        ("sparse:sliding_window=0", "window must be a whole number above 0"),
        ("sparse:sliding_window=4,sink=3", "'sparse:sliding_window=4,sink=3': unknown option sink"),
        ("sparse:sliding_window=x", "sliding_window must be a whole number, got 'x'"),
        ("linear:features=0", "features must be a whole number above 0"),
        (["fused", "linear"], "attention must be one name or 3 names, got 2"),
    ],
    ids=str,
)
def test_unknown_names_are_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        Qwen3VL(CONFIG, attention=attention)


def test_a_windowed_layer_needs_the_models_dtype():
    with pytest.raises(ValueError, match="an int8 cache needs 'fused'"):
        KVCache(CONFIG.text, 1, 8, torch.int8, attention=WINDOW)
