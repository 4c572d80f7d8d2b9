"""A small real tokenizer of Qwen's kind, and the small files of a checkpoint around it.

Byte-level BPE with Qwen's splitting rule, NFC and special tokens, trained on the fly (a few milliseconds): 256 bytes,
some merges, then the special tokens in the released order.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = (
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    + [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
    + ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
)
# In the vocabulary as single tokens, but text all the same: decoding keeps them.
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
TEXT = (
    "system user assistant You are a helpful assistant. What colour is the digit in the picture? How many digits are "
    "there, and which is the largest? Describe this video. The seconds of the video: 0.5 seconds, 1.5 seconds. "
    "Übergrößenträger naïve café — 你好，世界！ 图片里有什么？ Привет, мир. "
)


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL])
    return tokenizer.to_str()


def build_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


def write_checkpoint_files(folder: Path, **preprocessor: Any) -> Path:
    """What a released Qwen3-VL folder has beside its weights and ``config.json``, with the released numbers.
    ``preprocessor`` replaces entries of ``preprocessor_config.json``. Returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": [end, pad], "pad_token_id": pad, "bos_token_id": pad},
        "preprocessor_config.json": {
            **common,
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **preprocessor,
        },
        "video_preprocessor_config.json": {
            **common,
            "size": {"shortest_edge": 4096, "longest_edge": 25165824},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return folder
