"""The chat template: its text, and how any template is found and rendered.

``transformers`` ships no Qwen3-VL template, so two things are compared: what our template writes, with text written out
by hand after the released format; and how a template is rendered and tokenised, with ``transformers`` over the same
template file.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from oracle import processor_oracle
from PIL import Image
from tiny_tokenizer import write_checkpoint_files

from qvl_model.conversation import OWN_CHAT_TEMPLATE
from qvl_model.processor import Processor

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"size": "größe <1>"}}}
IMAGE = {"type": "image"}
VIDEO = {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


IMG = "<|vision_start|><|image_pad|><|vision_end|>"
VID = "<|vision_start|><|video_pad|><|vision_end|>"

# name: (messages, keywords, text)
CONVERSATIONS = {
    "plain": (
        [{"role": "user", "content": "Hello"}],
        {},
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "no_generation_prompt": (
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, 你好"}],
        {"add_generation_prompt": False},
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi, 你好<|im_end|>\n",
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Naïve café?\n"}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Naïve café?\n<|im_end|>\n<|im_start|>assistant\n",
    ),
    "system_parts": (
        [{"role": "system", "content": [text("Be "), text("brief.")]}, {"role": "user", "content": [text("Hello")]}],
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    ),
    "image": (
        [{"role": "user", "content": [IMAGE, text("What is it?")]}],
        {},
        f"<|im_start|>user\n{IMG}What is it?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "image_after_text": (
        [{"role": "user", "content": [text("What is it? "), IMAGE]}],
        {},
        f"<|im_start|>user\nWhat is it? {IMG}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "two_images": (
        [{"role": "user", "content": [IMAGE, text(" or "), IMAGE, text("?")]}],
        {},
        f"<|im_start|>user\n{IMG} or {IMG}?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "numbered": (
        [
            {"role": "user", "content": [IMAGE, IMAGE, VIDEO, text("Compare.")]},
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": [IMAGE, VIDEO, text("And these?")]},
        ],
        {"add_vision_id": True},
        f"<|im_start|>user\nPicture 1: {IMG}Picture 2: {IMG}Video 1: {VID}Compare.<|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>\n"
        f"<|im_start|>user\nPicture 3: {IMG}Video 2: {VID}And these?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "video": (
        [{"role": "user", "content": [VIDEO, text("Describe this video.")]}],
        {},
        f"<|im_start|>user\n{VID}Describe this video.<|im_end|>\n<|im_start|>assistant\n",
    ),
    "several_turns": (
        [
            {"role": "user", "content": [IMAGE, text("One?")]},
            {"role": "assistant", "content": [text("Yes.")]},
            {"role": "user", "content": "And two?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": [text("Why?"), IMAGE]},
        ],
        {},
        f"<|im_start|>user\n{IMG}One?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nAnd two?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        f"<|im_start|>user\nWhy?{IMG}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "tools": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look."}],
        {"tools": [TOOL]},
        "<|im_start|>system\nBe brief.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "look", "parameters": {"size": "größe <1>"}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nLook.<|im_end|>\n<|im_start|>assistant\n",
    ),
    "tool_calls": (
        [
            {"role": "user", "content": "Look."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "look", "arguments": {"at": "ä"}}},
                    {"name": "look", "arguments": '{"at": 2}'},
                ],
            },
            {"role": "tool", "content": "nothing"},
            {"role": "tool", "content": [IMAGE, text("seen")]},
            {"role": "assistant", "content": "A dog.", "tool_calls": []},
        ],
        {"add_generation_prompt": False},
        "<|im_start|>user\nLook.<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "look", "arguments": {"at": "ä"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"at": 2}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
        f"<tool_response>\nnothing\n</tool_response>\n<tool_response>\n{IMG}seen\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n",
    ),
}


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


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_is_the_released_format(name, processor):
    messages, keywords, expected = CONVERSATIONS[name]
    assert processor.apply_chat_template(messages, **keywords) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_ids_equal_oracle(name, processor, oracle):
    messages, keywords, expected = CONVERSATIONS[name]
    source = OWN_CHAT_TEMPLATE.read_text(encoding="utf-8")
    keywords = {"add_generation_prompt": True, **keywords}
    assert oracle.apply_chat_template(messages, chat_template=source, **keywords) == expected
    images = [picture(seed=seed) for seed in range(expected.count("<|image_pad|>"))]
    videos = [clip(seed=seed) for seed in range(expected.count("<|video_pad|>"))]
    wanted = oracle(text=[expected], images=images or None, videos=videos or None, return_tensors="pt")
    batch = processor.encode_chat(messages, images, videos, **keywords)
    assert set(batch) == set(wanted) - {"mm_token_type_ids"}
    for key, tensor in batch.items():
        assert torch.equal(tensor, wanted[key]), key


def test_tool_calls_without_content(processor):
    messages, keywords, expected = CONVERSATIONS["tool_calls"]
    calls = {**messages[1], "content": None}
    assert processor.apply_chat_template([messages[0], calls, *messages[2:]], **keywords) == expected
    assert calls["content"] is None


def test_template_is_rendered_as_the_oracle_renders_it(folder, tmp_path, oracle):
    source = (
        "{%- for m in messages %}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {{ m.role }}: {{ m | tojson }} {{ eos_token }}{{ extra }}\n  {# note #}\n{% endfor %}\n"
    )
    folder = write_checkpoint_files(tmp_path)
    (folder / "chat_template.jinja").write_text(source)
    messages = [
        {"role": "user", "content": "<ä>"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    got = Processor.from_pretrained(folder).apply_chat_template(messages, extra="!")
    assert got == oracle.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, extra="!")
    assert "<ä>" in got


def test_template_is_found_in_each_place(tmp_path):
    folder = write_checkpoint_files(tmp_path)
    messages = CONVERSATIONS["plain"][0]

    def rendered():
        return Processor.from_pretrained(folder).apply_chat_template(messages)

    assert rendered() == CONVERSATIONS["plain"][2]
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "tokenizer list"}]
    config_file.write_text(json.dumps({**config, "chat_template": templates}))
    assert rendered() == "tokenizer list"
    config_file.write_text(json.dumps({**config, "chat_template": "tokenizer"}))
    assert rendered() == "tokenizer"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ messages.x.y }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"],
)
def test_template_that_refuses(source, tmp_path):
    folder = write_checkpoint_files(tmp_path)
    (folder / "chat_template.jinja").write_text(source)
    processor = Processor.from_pretrained(folder)
    with pytest.raises(ValueError, match="apply_chat_template: the chat template refused the messages"):
        processor.apply_chat_template(CONVERSATIONS["plain"][0])
