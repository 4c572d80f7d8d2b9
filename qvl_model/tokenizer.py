"""Text to token ids and back, through a checkpoint's ``tokenizer.json`` (Hugging Face ``tokenizers``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"
# Qwen's own, where a checkpoint says nothing about its end and padding.
_DEFAULT_EOS_TOKENS = ("<|im_end|>", "<|endoftext|>")
_DEFAULT_PAD_TOKEN = "<|endoftext|>"


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in ``path``; {} where an optional file is missing. Errors name the file."""
    if not path.is_file():
        if required:
            raise FileNotFoundError(f"{path}: no such file")
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


class Tokenizer:
    """A checkpoint's tokenizer with its special ids.

    ``eos_token_ids``: generation stops at any of these: ``generation_config.json``'s, then ``tokenizer_config.json``'s
    ``eos_token``. ``pad_token_id``: ``tokenizer_config.json``'s ``pad_token``, then ``generation_config.json``'s. Where
    a checkpoint has neither: ``<|im_end|>``, ``<|endoftext|>``.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.config = dict(config or {})
        generation_config = generation_config or {}
        self.image_token_id = self.token_id(IMAGE_TOKEN)
        self.video_token_id = self.token_id(VIDEO_TOKEN)
        self.vision_start_token_id = self.token_id(VISION_START_TOKEN)
        self.vision_end_token_id = self.token_id(VISION_END_TOKEN)
        self.eos_token_ids = self._eos_ids(generation_config)
        self.pad_token_id = self._pad_id(generation_config)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where there, ``tokenizer_config.json`` and ``generation_config.json``."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        # Truncation and padding that were saved by accident would silently shorten prompts.
        backend.no_truncation()
        backend.no_padding()
        config, generation = (read_json(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))
        try:
            return cls(backend, config, generation)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and, unless there is one, ``generation_config.json``."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": self.backend.id_to_token(self.eos_token_ids[0]),
            "pad_token": self.backend.id_to_token(self.pad_token_id),
            **self.config,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        generation = folder / "generation_config.json"
        if not generation.exists():
            values = {"eos_token_id": self.eos_token_ids, "pad_token_id": self.pad_token_id}
            generation.write_text(json.dumps(values, indent=2) + "\n")

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of a token given by its exact text. Raises ValueError where there is none."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = True) -> str:
        """Text of a row of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)

    def special_tokens(self) -> dict[str, str]:
        """``eos_token``, ``pad_token``, ... as ``tokenizer_config.json`` has them: variables of a chat template."""
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        return {name: text for name in names if (text := _token_text(self.config.get(name))) is not None}

    def _eos_ids(self, generation_config: dict[str, Any]) -> list[int]:
        ids = generation_config.get("eos_token_id")
        ids = [] if ids is None else list(ids) if isinstance(ids, list) else [ids]
        if (text := _token_text(self.config.get("eos_token"))) is not None:
            ids.append(self.token_id(text))
        if not ids:
            ids = [found for token in _DEFAULT_EOS_TOKENS if (found := self.backend.token_to_id(token)) is not None]
        if not ids:
            raise ValueError("no end-of-text token: generation_config.json and tokenizer_config.json name none")
        return list(dict.fromkeys(ids))

    def _pad_id(self, generation_config: dict[str, Any]) -> int:
        if (text := _token_text(self.config.get("pad_token"))) is not None:
            return self.token_id(text)
        if (found := generation_config.get("pad_token_id")) is not None:
            return found
        found = self.backend.token_to_id(_DEFAULT_PAD_TOKEN)
        return self.eos_token_ids[0] if found is None else found


def _token_text(value: Any) -> str | None:
    """``tokenizer_config.json`` holds a token as its text or as an object with ``content``."""
    return value.get("content") if isinstance(value, dict) else value


class StreamDecoder:
    """Text from ids that arrive one by one; the pieces joined equal ``decode`` of all ids.

    A character may be spread over several tokens. U+FFFD at the end of the text is held back, being what an unfinished
    character decodes to. Only the ids since the last two clean ends are decoded again: what a token looks like can
    depend on the one before it (a leading space), not on earlier ones.

        >>> stream = processor.stream_decoder()                                    # doctest: +SKIP
        >>> "".join([stream.put(i) for i in ids] + [stream.end()]) == processor.decode(ids)  # doctest: +SKIP
        True
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        self._sent = 0  # characters of the pending ids' text that are out already

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` completes; often one word, sometimes empty."""
        self._pending.append(int(token_id))
        text = self._pending_text()
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}")
        piece, self._sent = complete[self._sent :], len(complete)
        if text and complete == text:
            self._context, self._pending, self._sent = self._pending, [], 0
        return piece

    def put_all(self, token_ids: Iterable[int]) -> str:
        """``put`` for several ids at once."""
        return "".join([self.put(token_id) for token_id in token_ids])

    def end(self) -> str:
        """What is still held back, and a fresh start."""
        piece = self._pending_text()[self._sent :]
        self._context, self._pending, self._sent = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special_tokens)
        return self._tokenizer.decode(self._context + self._pending, self._skip_special_tokens)[len(before) :]
