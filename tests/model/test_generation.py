"""Generation: transformers' tokens, rows that do not disturb each other, and every way to stop."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from PIL import Image
from tiny import images, padded, prompt, tiny_config, tiny_model

from qvl_model import Processor, Qwen3VL
from qvl_model.generation import GenerationOptions, _prefill, answer_all, processor_of, user_message
from qvl_model.stopping import StopWatch, UntilStop

ROWS = [(3,), (2, ("image", 1, 4, 6), 3), (11,), (1, ("image", 1, 2, 2), 2, ("image", 1, 4, 4), 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, seed=3)
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> Qwen3VL:
    return Qwen3VL.from_pretrained(folder)


@pytest.fixture(scope="module")
def model() -> Qwen3VL:
    """Random weights, no checkpoint: ids in, ids out, nothing that ends a row but its length."""
    return tiny_model(seed=1)


def picture(seed: int = 0, size: tuple[int, int] = (64, 96)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def batch_of(rows: list[tuple], side: str) -> dict[str, Any]:
    config = tiny_config()
    ids, mask = padded([prompt(*row, seed=i) for i, row in enumerate(rows)], side)
    grids = [part[1:] for row in rows for part in row if not isinstance(part, int)]
    pixels, grid = images(config, grids) if grids else (None, None)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grid}


def row_alone(batch: dict[str, Any], number: int, rows: list[tuple]) -> dict[str, Any]:
    """Row `number` of `batch_of(rows, ...)` without its padding, with its own images."""
    counts = [sum(not isinstance(part, int) for part in row) for row in rows]
    first, keep = sum(counts[:number]), batch["attention_mask"][number].bool()
    alone = {"input_ids": batch["input_ids"][number, keep][None]}
    if counts[number]:
        grid = batch["image_grid_thw"]
        start, size = (int(grid[a:b].prod(1).sum()) for a, b in ((0, first), (first, first + counts[number])))
        alone["pixel_values"] = batch["pixel_values"][start : start + size]
        alone["image_grid_thw"] = grid[first : first + counts[number]]
    return alone


def new_tokens(model: Qwen3VL, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def test_64_greedy_tokens_from_the_same_files_as_transformers(folder, loaded):
    from transformers import Qwen3VLForConditionalGeneration

    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    chat = [user_message("What colour is the digit?", [picture()])]
    batch = Processor.from_pretrained(folder).encode_chat([chat, [user_message("How many?", [])]])
    kinds = (batch["input_ids"] == loaded.config.image_token_id).int()
    options = {"max_new_tokens": 64, "do_sample": False}
    expected = theirs.generate(**batch, mm_token_type_ids=kinds, **options, eos_token_id=None, pad_token_id=0)
    ours = loaded.generate(**batch, **options, ignore_eos=True)
    assert torch.equal(ours, expected)
    assert len(ours[0, -64:].unique()) > 3, "a model that says one thing for ever would prove little"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.3},  # below 1 it draws to what was said: padding must not count as said
        {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "min_p": 0.01, "seed": 5},
    ],
    ids=["greedy", "penalty", "attraction", "sampled"],
)
def test_a_row_gets_what_it_gets_alone(model, side, options):
    batch = batch_of(ROWS, side)
    together = new_tokens(model, batch, max_new_tokens=24, **options)
    for number in range(len(ROWS)):
        own = {**options, "seed": options["seed"] + number} if "seed" in options else options
        alone = new_tokens(model, row_alone(batch, number, ROWS), max_new_tokens=24, **own)
        assert torch.equal(together[number], alone[0]), number


def test_rows_that_end_early_are_padded_and_do_not_disturb_the_others(model):
    batch = batch_of(ROWS, "left")
    free = new_tokens(model, batch, max_new_tokens=24)
    stops = [int(free[0, 2]), int(free[1, 7]), int(free[3, 11])]
    stopped = new_tokens(model, batch, max_new_tokens=24, stop=stops)
    ends = []
    for row, reference in zip(stopped.tolist(), free.tolist()):
        end = next((i + 1 for i, token in enumerate(reference) if token in stops), 24)
        ends.append(end)
        assert row == (reference[:end] + [0] * 24)[: len(row)]
    assert stopped.shape[1] == max(ends)
    assert len(set(ends)) > 2, "rows must end at different times for this to test anything"


def test_rows_that_go_on_keep_their_own_draws(model):
    """Behind the end of half of the rows the others are still drawn from their own seeds and penalised for their own
    words."""
    batch = batch_of(ROWS, "left")
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 2.0, "repetition_penalty": 1.4, "seed": 9}
    free = new_tokens(model, batch, **options)
    stops = [int(free[0, 1]), int(free[1, 2])]
    stopped = new_tokens(model, batch, stop=stops, **options)
    ends = []
    for row, reference in zip(stopped.tolist(), free.tolist()):
        ends.append(next((i + 1 for i, token in enumerate(reference) if token in stops), 24))
        assert row == (reference[: ends[-1]] + [0] * 24)[: len(row)]
    assert max(ends) - sorted(ends)[1] > 5, "half of the rows must end well before the last"


@pytest.mark.parametrize("chunk", [1, 3, 8, 18, 1000])
def test_a_prompt_in_chunks_is_the_prompt_in_one(model, chunk):
    batch = batch_of(ROWS, "right")
    with torch.no_grad():
        inputs = model.embed_inputs(**batch)
        tokens = inputs.embeds.shape[1]
        whole = model.forward_embeds(inputs, logits_to_keep=1).logits[:, 0]
        cache = model.new_cache(len(ROWS), tokens)
        pieces = _prefill(model, inputs, cache, GenerationOptions(prefill_chunk=chunk))
    assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert cache.lengths.tolist() == batch["attention_mask"].sum(1).tolist()
    expected = new_tokens(model, batch, max_new_tokens=16)
    assert torch.equal(new_tokens(model, batch, max_new_tokens=16, prefill_chunk=chunk), expected)


def test_seeds(model):
    batch = batch_of([(5,), (5,)], "left")
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    first = new_tokens(model, batch, seed=1, **options)
    assert torch.equal(first, new_tokens(model, batch, seed=1, **options))
    assert not torch.equal(first, new_tokens(model, batch, seed=2, **options))
    assert not torch.equal(new_tokens(model, batch, **options), new_tokens(model, batch, **options))


def test_the_checkpoints_end_token_ends_a_row(loaded):
    ids = torch.tensor([[5, 6, 7]])
    free = loaded.generate(ids, max_new_tokens=8, ignore_eos=True)[0, 3:].tolist()
    processor = processor_of(loaded)
    kept = processor.eos_token_ids
    try:
        processor.eos_token_ids = [free[4]]
        expected = free[: free.index(free[4]) + 1]
        assert loaded.generate(ids, max_new_tokens=8)[0, 3:].tolist() == expected
        assert loaded.generate(ids, max_new_tokens=8, ignore_eos=True)[0, 3:].tolist() == free
    finally:
        processor.eos_token_ids = kept


def test_a_stop_string_that_spans_tokens(loaded):
    question = "How many digits are there?"
    options = {"max_new_tokens": 40, "ignore_eos": True}
    text = loaded.chat(question, **options)
    batch = processor_of(loaded).encode_chat([user_message(question)])
    ids = loaded.generate(**batch, **options)[0, batch["input_ids"].shape[1] :].tolist()
    pieces = [processor_of(loaded).decode([token]) for token in ids]
    at = next(
        i for i in range(5, 30) if pieces[i].isascii() and pieces[i + 1].isascii() and pieces[i] and pieces[i + 1]
    )
    stop = pieces[at][-1] + pieces[at + 1][0]  # the end of one token and the beginning of the next
    assert loaded.chat(question, stop=stop, **options) == text[: text.index(stop)]
    stopped = loaded.generate(**batch, stop=[stop], **options)[0, batch["input_ids"].shape[1] :].tolist()
    assert stopped == ids[: len(stopped)]
    assert stop in processor_of(loaded).decode(stopped)
    assert stop not in processor_of(loaded).decode(stopped[:-1])
    assert answer_all(loaded, [[user_message(question)]] * 2, stop=stop, **options) == [text[: text.index(stop)]] * 2


def test_the_beginning_of_a_stop_string_at_the_end_is_text(loaded):
    options = {"max_new_tokens": 12, "ignore_eos": True}
    text = loaded.chat("How many digits are there?", **options)
    assert loaded.chat("How many digits are there?", stop=text[-1] + "!!", **options) == text


def test_text_that_may_begin_a_stop_string_is_held_back():
    until = UntilStop(("STOP", "\n\n"))
    sent = [until.put(piece) for piece in ("a", "S", "T", "x", "\n", "b", " ST", "OP", "more")]
    assert sent == ["a", "", "", "STx", "", "\nb", " ", "", ""]
    assert until.end() == ""
    until = UntilStop(("late", "x"))
    assert until.put("axylate") == "a", "the first stop string counts"
    until = UntilStop(("STOP",))
    assert until.put("no ST") == "no "
    assert until.end() == "ST"


def test_the_tail_that_is_decoded_suffices():
    """Every token one byte of a stop string of several-byte characters."""
    stop = "你好"
    watch = StopWatch(frozenset(), (stop,), 1, lambda ids: bytes(ids).decode(errors="replace"))
    ended = [watch.ended(0, byte) for byte in "ab你".encode() + stop.encode()]
    assert ended == [False] * (len(ended) - 1) + [True]


class Recorder:
    def __init__(self, interrupt_after: int | None = None) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0
        self.interrupt_after = interrupt_after

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)
        if self.interrupt_after is not None and len(self.values) > self.interrupt_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_sees_the_prompt_then_every_step(model):
    batch, recorder = batch_of(ROWS, "left"), Recorder()
    out = model.generate(**batch, max_new_tokens=6, streamer=recorder)
    assert torch.equal(torch.cat([recorder.values[0], torch.stack(recorder.values[1:], 1)], 1), out)
    assert recorder.ended == 1
    assert [value.shape for value in recorder.values[1:]] == [(4,)] * 6


def test_transformers_streamer_fits(loaded, capsys):
    from transformers import AutoTokenizer, TextStreamer

    batch = processor_of(loaded).encode_chat([user_message("How many?")])
    streamer = TextStreamer(AutoTokenizer.from_pretrained(loaded.processor_source), skip_prompt=True)
    out = loaded.generate(**batch, max_new_tokens=9, ignore_eos=True, streamer=streamer)
    expected = processor_of(loaded).decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=False)
    assert capsys.readouterr().out == expected + "\n"


def test_ctrl_c_returns_what_there_is(model):
    batch, recorder = batch_of(ROWS, "left"), Recorder(interrupt_after=3)
    whole = model.generate(**batch, max_new_tokens=9)
    with pytest.warns(UserWarning, match="interrupted after 3 of 9 tokens"):
        part = model.generate(**batch, max_new_tokens=9, streamer=recorder)
    assert torch.equal(part, whole[:, : batch["input_ids"].shape[1] + 3])
    assert recorder.ended == 1


def test_chat_streams_what_it_returns(loaded):
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": "red"},
        user_message("And this?", [picture(1)]),
    ]
    options = {"max_new_tokens": 20, "ignore_eos": True}
    text = loaded.chat(messages, images=[picture()], **options)
    pieces = list(loaded.chat(messages, images=[picture()], stream=True, **options))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert loaded.chat(messages, images=[picture(2)], **options) != text, "the picture must matter"


def test_a_question_as_plain_text_is_a_user_message(loaded):
    options = {"max_new_tokens": 12, "ignore_eos": True}
    message = user_message("Describe.", [picture(), picture(1)])
    assert loaded.chat("Describe.", images=[picture(), picture(1)], **options) == loaded.chat([message], **options)


def test_answers_of_a_batch_are_those_of_the_questions_alone(loaded):
    chats = [
        [user_message("How many?", [picture()])],
        [user_message("Hi")],
        [user_message("Describe it", [picture(4)])],
    ]
    options = {"max_new_tokens": 15}
    assert answer_all(loaded, chats, **options) == [loaded.chat(chat, **options) for chat in chats]


def test_bfloat16_generates_with_an_image(folder):
    model = Qwen3VL.from_pretrained(folder, weights="bf16")
    assert isinstance(model.chat("Describe", images=[picture()], max_new_tokens=4, ignore_eos=True), str)
    assert model.new_cache(1, 8).dtype == torch.bfloat16
    model = Qwen3VL.from_pretrained(folder, weights="fp32").to(torch.bfloat16)  # torch's own products
    assert isinstance(model.chat("Describe", images=[picture()], max_new_tokens=4, ignore_eos=True), str)
    assert model.dtype == torch.bfloat16


def test_weights_without_a_tokenizer_generate_from_ids(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = Qwen3VL.from_pretrained(tmp_path)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape == (1, 8)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file"):
        model.chat("Hello")


def test_tokens_can_be_trained_on(model):
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)
    assert not out.is_inference()


def test_the_last_position_is_used_and_none_behind_it():
    model = tiny_model(tiny_config(text={"max_position_embeddings": 10}))
    ids = torch.tensor([prompt(8)])
    assert model.generate(ids, max_new_tokens=50).shape[1] == 8 + 3  # fed: positions 8 and 9; the third needs no key
    assert model.generate(torch.tensor([prompt(10)]), max_new_tokens=50).shape[1] == 11


def test_no_bar_where_stderr_is_no_terminal(model, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)
    assert capsys.readouterr().err == ""


def count_tokens(model, monkeypatch) -> list[int]:
    """The tokens of each pass through the text model."""
    seen: list[int] = []
    text = model.model.language_model
    original = text.forward
    monkeypatch.setattr(text, "forward", lambda x, *rest: seen.append(x.shape[0] * x.shape[1]) or original(x, *rest))
    return seen


def test_no_padding_is_computed(model, monkeypatch):
    batch = batch_of(ROWS, "left")
    seen = count_tokens(model, monkeypatch)
    new_tokens(model, batch, max_new_tokens=1)
    assert seen == [int(batch["attention_mask"].sum())]
    seen.clear()
    new_tokens(model, batch, max_new_tokens=1, prefill_chunk=10)
    assert seen == [10] * (sum(seen) // 10) + ([sum(seen) % 10] if sum(seen) % 10 else [])


@pytest.mark.parametrize("attention", ["fused", "linear:elu", "sparse:sliding_window=20,sinks=2"])
def test_rows_that_begin_alike_are_computed_once(monkeypatch, attention):
    model = Qwen3VL(tiny_config(), attention=attention).eval()
    model.load_state_dict(tiny_model(seed=1).state_dict())
    start = prompt(2, ("image", 1, 4, 6), 15)  # 25 tokens
    rows = [start + [5, 6, 7], start + [5, 8], prompt(9, seed=4), start + [9]]
    ids, mask = padded(rows, "left")
    pixels, _ = images(tiny_config(), [(1, 4, 6)])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels.repeat(3, 1),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * 3),
    }
    seen, patches = count_tokens(model, monkeypatch), []
    visual = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda x, grid: patches.append(len(x)) or visual(x, grid))
    together = new_tokens(model, batch, max_new_tokens=10)
    assert patches == [24], "one of the three equal images"
    assert seen[:2] == [25, 3 + 2 + 9 + 1]
    for number, row in enumerate(rows):
        alone = {"input_ids": torch.tensor([row])}
        if number != 2:
            alone |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])}
        assert torch.equal(together[number], new_tokens(model, alone, max_new_tokens=10)[0]), number


def test_other_pictures_are_other_beginnings(model, monkeypatch):
    row = prompt(2, ("image", 1, 4, 6), 15)
    pixels, grids = images(tiny_config(), [(1, 4, 6)] * 2)
    seen = count_tokens(model, monkeypatch)
    batch = {"input_ids": torch.tensor([row, row]), "pixel_values": pixels, "image_grid_thw": grids}
    together = new_tokens(model, batch, max_new_tokens=10)
    assert seen[0] == 2 * len(row)
    alone = {"input_ids": torch.tensor([row]), "pixel_values": pixels[24:], "image_grid_thw": grids[1:]}
    assert torch.equal(together[1], new_tokens(model, alone, max_new_tokens=10)[0])
