"""Prompts and conversations with their media to tensors; reading and writing a checkpoint's small files."""

from __future__ import annotations

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from oracle import processor_oracle
from PIL import Image
from tiny_tokenizer import build_tokenizer, write_checkpoint_files

from qvl_model.preprocess import ImagePreprocessor, PatchConfig
from qvl_model.processor import PROCESSOR_FILES, Processor
from qvl_model.tokenizer import Tokenizer
from qvl_model.video import SamplingConfig, VideoPreprocessor

IMG = "<|vision_start|><|image_pad|><|vision_end|>"
VID = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint_files(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder)


@pytest.fixture
def oracle(folder, monkeypatch):
    return processor_oracle(folder, monkeypatch)


def picture(width=70, height=50, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 40, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_oracle(side, processor, oracle):
    prompts = ["Hello", f"{IMG}What is this? {IMG}", f"A longer prompt, {VID} with a video and {IMG}"]
    images, videos = [picture(seed=seed) for seed in range(3)], [clip()]
    wanted = oracle(text=prompts, images=images, videos=videos, padding=True, padding_side=side, return_tensors="pt")
    batch = processor(prompts, images, videos, padding_side=side)
    for key, tensor in batch.items():
        assert torch.equal(tensor, wanted[key]), key
    nested = processor(prompts, [[], images[:2], images[2:]], videos, padding_side=side)
    assert torch.equal(nested.pixel_values, batch.pixel_values)


def test_two_conversations_are_padded_together(processor):
    first = [{"role": "user", "content": [IMAGE, text("What is it?")]}]
    second = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    batch = processor.encode_chat([first, second], [picture()])
    alone = [processor.encode_chat(first, [picture()]), processor.encode_chat(second)]
    assert batch.attention_mask.sum(1).tolist() == [row.input_ids.shape[1] for row in alone]
    for row, mask, single in zip(batch.input_ids, batch.attention_mask, alone):
        assert torch.equal(row[mask.bool()], single.input_ids[0])
        assert (row[~mask.bool()] == processor.pad_token_id).all()


def test_media_in_messages_and_beside_them(processor, tmp_path):
    path = tmp_path / "p.png"
    picture(seed=1).save(path)
    content = [
        {"type": "image", "image": picture(seed=0)},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image"},
        {"type": "image", "path": path},
        text("Which?"),
    ]
    batch = processor.encode_chat([{"role": "user", "content": content}], images=[picture(seed=2)])
    flat = processor(f"{IMG}{IMG}{IMG}{IMG}", [picture(seed=seed) for seed in (0, 1, 2, 1)])
    assert torch.equal(batch.pixel_values, flat.pixel_values)


def test_batch_has_only_what_there_is(processor):
    batch = processor("Hello", images=[])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.pixel_values is None
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    with pytest.raises(AttributeError, match="Batch has no colour"):
        _ = batch.colour
    assert batch.to("meta").input_ids.device.type == "meta"


def test_single_image_needs_no_list(processor):
    assert torch.equal(processor(IMG, picture()).pixel_values, processor(IMG, [picture()]).pixel_values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(""), "processor: prompt 0 is empty"),
        (lambda p: p(["a", " \n"]), "processor: prompt 1 is empty"),
        (lambda p: p([]), "processor: no prompt given"),
        (lambda p: p("a", padding_side="top"), 'processor: padding_side must be "left" or "right", got \'top\''),
        (
            lambda p: p([f"{IMG}?", f"{IMG}{IMG}"], [picture()] * 2),
            "processor: the prompts have 3 image placeholders (<|image_pad|>), but 2 were given",
        ),
        (lambda p: p("a", picture()), "processor: the prompts have 0 image placeholders (<|image_pad|>), but 1 were"),
        (lambda p: p(VID), "processor: the prompts have 1 video placeholders (<|video_pad|>), but 0 were given"),
        (
            lambda p: p.encode_chat([{"role": "user", "content": [IMAGE, IMAGE]}], [picture()]),
            "encode_chat: the messages have 2 image placeholders without image, but 1 were given",
        ),
        (lambda p: p.encode_chat([]), "encode_chat: messages is empty"),
        (lambda p: p.encode_chat([[]]), "messages must be a non-empty list"),
        (lambda p: p.apply_chat_template("Hello"), "messages must be a non-empty list"),
        (
            lambda p: p.apply_chat_template(["Hello"]),
            "messages[0]: expected {'role': ..., 'content': ...}, got 'Hello'",
        ),
        (
            lambda p: p.apply_chat_template([{"role": "User", "content": "Hello"}]),
            "messages[0]: role must be one of system, user, assistant, tool; got 'User'",
        ),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]),
            "messages[1]: a system message must be the first",
        ),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": " "}]),
            "messages[0]: the user's content is empty",
        ),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": [text("")]}]),
            "messages[0]: the user's content is empty",
        ),
        (
            lambda p: p.apply_chat_template([{"role": "user", "content": 3}]),
            "messages[0]: content must be text or a list of parts, got int",
        ),
    ],
)
def test_misuse_is_explained(call, message, processor):
    with pytest.raises(ValueError) as caught:
        call(processor)
    assert str(caught.value).startswith(message)


def test_placeholder_in_the_users_words_is_counted(processor):
    with pytest.raises(ValueError, match="2 image placeholders"):
        processor.encode_chat([{"role": "user", "content": [IMAGE, text("what is <|image_pad|>?")]}], [picture()])


def other_numbers() -> Processor:
    patches = PatchConfig(8, 3, 3, 1000, 90_000, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    sampling = SamplingConfig(fps=6.0, min_frames=3, max_frames=7)
    return Processor(
        Tokenizer(build_tokenizer()), ImagePreprocessor(patches), VideoPreprocessor(patches, sampling), "{{ messages }}"
    )


@pytest.mark.parametrize("numbers", ["released", "other"])
def test_saved_files_give_the_same_processor_here_and_there(numbers, tmp_path, processor, monkeypatch):
    original = processor if numbers == "released" else other_numbers()
    original.save_pretrained(tmp_path / "saved")
    again = Processor.from_pretrained(tmp_path / "saved")
    oracle = processor_oracle(tmp_path / "saved", monkeypatch)
    assert again.chat_template == original.chat_template
    assert again.eos_token_ids == original.eos_token_ids
    assert again.image_preprocessor.config == original.image_preprocessor.config
    assert again.video_preprocessor.config == original.video_preprocessor.config
    assert again.video_preprocessor.sampling == original.video_preprocessor.sampling
    prompt, images, videos = f"{IMG}{VID}Hello{VID}", [picture()], [clip(40), clip(5)]
    wanted = oracle(text=[prompt], images=images, videos=videos, return_tensors="pt")
    for one in (original, again):
        for key, tensor in one(prompt, images, videos).items():
            assert torch.equal(tensor, wanted[key]), key


def test_files_as_newer_transformers_nest_them(tmp_path):
    folder = write_checkpoint_files(tmp_path)
    nested = {
        f"{kind}_processor": json.loads((folder / name).read_text())
        for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json"))
    }
    nested["image_processor"]["size"]["longest_edge"] = 70_000
    nested["video_processor"]["size"]["longest_edge"] = 80_000
    (folder / "processor_config.json").write_text(json.dumps(nested))
    (folder / "preprocessor_config.json").unlink()
    processor = Processor.from_pretrained(folder)
    assert processor.image_preprocessor.config.max_pixels == 70_000
    assert processor.video_preprocessor.config.max_pixels == 80_000


def test_bounds_replace_the_checkpoints(folder):
    config = Processor.from_pretrained(folder, min_pixels=1024, max_pixels=4096).image_preprocessor.config
    assert (config.min_pixels, config.max_pixels) == (1024, 4096)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("tokenizer.json", None, FileNotFoundError, "no such file"),
        ("tokenizer.json", "{}", ValueError, "not a tokenizer ("),
        ("preprocessor_config.json", None, FileNotFoundError, "no such file"),
        ("preprocessor_config.json", "{", ValueError, "not valid JSON ("),
        ("preprocessor_config.json", "[]", ValueError, "expected a JSON object, got list"),
        ("preprocessor_config.json", '{"patch_size": -1}', ValueError, "patch_size must be a positive integer"),
        ("config.json", '{"image_token_id": 3}', ValueError, "image_token_id = 3, but tokenizer.json has "),
        ("chat_template.jinja", "a\n{% if %}", ValueError, "the chat template has an error in line 2 ("),
        ("chat_template.json", "a", ValueError, "not valid JSON ("),
    ],
)
def test_bad_file_is_named(name, content, error, message, tmp_path):
    path = write_checkpoint_files(tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(error) as caught:
        Processor.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_tokenizer_without_placeholders_is_named(tmp_path):
    path = write_checkpoint_files(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|image_pad|>", "<|picture|>"))
    with pytest.raises(ValueError) as caught:
        Processor.from_pretrained(tmp_path)
    assert str(caught.value) == f"{path}: the tokenizer has no token <|image_pad|>"


def test_saved_truncation_does_not_shorten_prompts(tmp_path):
    folder = write_checkpoint_files(tmp_path)
    backend = build_tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert (
        Processor.from_pretrained(folder).tokenizer.encode("Hello there you")
        == build_tokenizer().encode("Hello there you").ids
    )


def test_folder_or_hub(monkeypatch, folder, tmp_path):
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, allow_patterns: calls.append((repo, allow_patterns)) or folder,
    )
    assert Processor.from_pretrained("owner/name").pad_token_id is not None
    assert calls == [("owner/name", list(PROCESSOR_FILES))]

    def offline(repo, allow_patterns):
        raise OSError("We have no connection to the Hub.\nMore advice.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        Processor.from_pretrained("owner/name")
    assert str(caught.value) == (
        "owner/name: no such folder here, nor on the model hub (We have no connection to the Hub.)"
    )
    with pytest.raises(FileNotFoundError, match=r"gone: no such folder, and not a hub id \(owner/name\)"):
        Processor.from_pretrained(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected the folder of a checkpoint, got a file"):
        Processor.from_pretrained(folder / "tokenizer.json")
