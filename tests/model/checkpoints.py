"""Whole tiny checkpoints on disk, in the released format: random weights, a real tokenizer, everything `chat` needs."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from tiny_tokenizer import build_tokenizer, write_checkpoint_files

from qvl_model import Qwen3VL, Qwen3VLConfig


def config_for_tokenizer(*, tied: bool = True) -> Qwen3VLConfig:
    """A tiny configuration with the vocabulary and special ids of the tiny tokenizer, and patches of 16 pixels."""
    tokenizer = build_tokenizer()
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {f"{name.split('_pad')[0]}_token_id": tokenizer.token_to_id(f"<|{name}|>") for name in names}
    sizes = {"vocab_size": tokenizer.get_vocab_size()}
    return replace(tiny_config(tied=tied, text=sizes, vision={"patch_size": 16}), **ids)


def write_checkpoint(
    folder: Path, *, tied: bool = True, shards: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Qwen3VL:
    """Fills `folder` as a release would be, images limited to a few tokens; returns the model that was written."""
    write_checkpoint_files(folder, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    config = replace(config_for_tokenizer(tied=tied), dtype=str(dtype).removeprefix("torch."))
    model = tiny_model(config, seed).to(dtype)
    config.to_json(folder / "config.json")
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return model
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    shard_of = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        part = {name: tensors[name] for name in tensors if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def rewrite_header(file: Path, change: Any) -> None:
    """Replaces the JSON header of a safetensors file by `change(header)`; the data stay as they are."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
