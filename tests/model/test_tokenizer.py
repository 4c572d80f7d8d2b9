"""Token ids to text, all at once and as they come; which ids are special."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tokenizer, write_checkpoint_files
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from qvl_model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint_files(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@given(ids=st.lists(st.integers(0, len(build_tokenizer().get_vocab()) - 1), max_size=30), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_stream_of_any_ids_equals_decode(ids, skip):
    tokenizer = Tokenizer(build_tokenizer())
    stream = tokenizer.stream_decoder(skip)
    pieces = [stream.put(token_id) for token_id in ids]
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids, skip)
    assert stream.end() == ""


def test_stream_emits_text_as_soon_as_it_is_complete(tokenizer):
    words = "naïve 你好 🙂 text"
    stream, ids, emitted, held = tokenizer.stream_decoder(), tokenizer.encode(words), "", 0
    for count, token_id in enumerate(ids, 1):
        emitted += stream.put(token_id)
        text = tokenizer.decode(ids[:count])
        assert emitted == text.rstrip("\N{REPLACEMENT CHARACTER}")
        held += emitted != text
    assert emitted == words
    assert held >= 3  # the emoji alone takes four tokens


def test_stream_keeps_the_spaces_between_words():
    """A decoder of SentencePiece's kind drops the space before the first word of what it is given."""
    words = ["▁a", "▁dog", "s", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
    words += ["<|image_pad|>", "<|video_pad|>"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace()
    stream = Tokenizer(backend).stream_decoder()
    assert [stream.put(i) for i in (0, 1, 2, 1, 0)] == ["a", " dog", "s", " dog", " a"]


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_oracle(skip, folder, tokenizer):
    words = "<|im_start|>user\n<think> naïve 你好 </think> <tool_call><|im_end|> text<|endoftext|>"
    ids = tokenizer.encode(words)
    oracle = AutoTokenizer.from_pretrained(folder)
    assert ids == oracle(words)["input_ids"]
    assert tokenizer.decode(torch.tensor(ids), skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_special_ids(folder, tokenizer):
    oracle = AutoTokenizer.from_pretrained(folder)
    for name in ("image_pad", "video_pad"):
        expected = oracle.convert_tokens_to_ids(f"<|{name}|>")
        assert getattr(tokenizer, f"{name.removesuffix('_pad')}_token_id") == expected
    assert tokenizer.pad_token_id == oracle.pad_token_id
    assert tokenizer.eos_token_ids == [oracle.eos_token_id, oracle.convert_tokens_to_ids("<|endoftext|>")]
    assert len(tokenizer) == len(oracle)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "pad"),
    [
        ({}, {}, ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),
        ({"eos_token": {"content": "<|im_end|>"}}, {}, ["<|im_end|>"], "<|endoftext|>"),
        (
            {"eos_token": "<|im_end|>"},
            {"eos_token_id": "<|endoftext|>"},
            ["<|endoftext|>", "<|im_end|>"],
            "<|endoftext|>",
        ),
        (
            {"pad_token": "<|vision_pad|>"},
            {"pad_token_id": "<|im_end|>"},
            ["<|im_end|>", "<|endoftext|>"],
            "<|vision_pad|>",
        ),
        ({}, {"pad_token_id": "<|im_end|>"}, ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    ],
)
def test_where_eos_and_pad_come_from(config, generation, eos, pad):
    backend = build_tokenizer()
    generation = {name: backend.token_to_id(token) for name, token in generation.items()}
    tokenizer = Tokenizer(backend, config, generation)
    assert [backend.id_to_token(i) for i in tokenizer.eos_token_ids] == eos
    assert backend.id_to_token(tokenizer.pad_token_id) == pad
