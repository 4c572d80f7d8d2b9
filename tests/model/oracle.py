"""``transformers``' Qwen3-VL processor over the files of a folder, without torchvision.

Image side: its Pillow processor, untouched. Video side: its ``Qwen3VLVideoProcessor``, whose module imports without
torchvision but calls four of torchvision's functions; those get stand-ins here, in the terms that torchvision itself
uses for uint8 frames on a CPU (``interpolate`` with antialiasing; subtract, then divide). Sampling, sizes, padding,
patches, timestamps and placeholder text are all its own code.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import image_processing_backends, video_processing_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor


def _resize(image: torch.Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> torch.Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    flat = image.reshape(-1, *image.shape[-3:])
    out = torch.nn.functional.interpolate(
        flat, size=list(size), mode=interpolation, align_corners=False, antialias=antialias
    )
    return out.reshape(*image.shape[:-2], *size)


def _normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return image.sub(mean).div_(std)


TORCHVISION = SimpleNamespace(
    grayscale_to_rgb=lambda video: video,
    resize=_resize,
    normalize=_normalize,
    InterpolationMode=SimpleNamespace(BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos"),
)


def image_oracle(folder: Path) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def processor_oracle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Qwen3VLProcessor:
    """The whole processor; valid while ``monkeypatch`` is."""
    for module in (image_processing_backends, video_processing_utils):
        monkeypatch.setattr(module, "tvF", TORCHVISION, raising=False)
    monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", {3: "bicubic"}, raising=False)
    # It looks its parts' classes up among those that torchvision would have made available.
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *args: None)
    video_module = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    return Qwen3VLProcessor(
        image_processor=image_oracle(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        video_processor=video_module.Qwen3VLVideoProcessor.from_pretrained(folder),
    )
