"""Small random models, their inputs, and the same model in transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qvl_model import Qwen3VL, Qwen3VLConfig
from qvl_model.config import TextConfig, VisionConfig

IMAGE, VIDEO, START, END = 90, 91, 92, 93

TEXT = TextConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    rope_theta=1e4,
    mrope_section=(4, 2, 2),
)
VISION = VisionConfig(
    depth=3,
    hidden_size=32,
    intermediate_size=40,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    num_position_embeddings=36,
    deepstack_visual_indexes=(0, 2),
)


def tiny_config(*, tied: bool = False, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None):
    """A configuration of a few thousand parameters, with changes to its text and vision parts."""
    return Qwen3VLConfig(
        replace(TEXT, **(text or {})), replace(VISION, **(vision or {})), IMAGE, VIDEO, START, END, tied, "float32"
    )


def tiny_model(config: Qwen3VLConfig | None = None, seed: int = 0) -> Qwen3VL:
    """A model with random weights of a size that makes its logits differ: norms and biases too."""
    torch.manual_seed(seed)
    model = Qwen3VL(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:  # with large embeddings a tied model repeats its input for ever
                parameter.normal_(std=0.05 if "embed_tokens" in name else 0.3)
    return model


def oracle(model: Qwen3VL) -> torch.nn.Module:
    """transformers' model with the same weights."""
    from transformers import Qwen3VLConfig as TheirConfig
    from transformers import Qwen3VLForConditionalGeneration

    theirs = Qwen3VLForConditionalGeneration._from_config(TheirConfig(**model.config.to_dict()), dtype=model.dtype)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def images(config: Qwen3VLConfig, grids: list[tuple[int, int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pixel values and grids (time, height, width in patches) of images or videos."""
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    return torch.randn(patches, config.vision.patch_dim, generator=generator), torch.tensor(grids)


def prompt(*parts: int | tuple[str, int, int, int], merge: int = 2, seed: int = 0) -> list[int]:
    """Token ids: a number stands for so many random text tokens, ("image" or "video", t, h, w) for the tokens of a
    grid."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, IMAGE, (part,), generator=generator).tolist()
            continue
        kind, t, h, w = part
        token = {"image": IMAGE, "video": VIDEO}[kind]
        for _ in range(t):  # every temporal patch of a video is a segment, a timestamp before it
            stamp = [] if kind == "image" else torch.randint(1, IMAGE, (2,), generator=generator).tolist()
            ids += [*stamp, START, *([token] * (h // merge * (w // merge))), END]
    return ids


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of unequal rows, padded with 0 on the left or on the right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask
