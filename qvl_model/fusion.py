"""How visual features enter the text model: in place of the placeholders' embeddings, and DeepStack in the first
layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("deepstack",)


@dataclass(frozen=True)
class DeepStack:
    """Features of earlier vision blocks, added to the hidden states of the visual tokens behind the first text layers.

    Attributes:
        visual_mask: (B, L) bool, True at the V visual tokens.
        features: one (V, C) tensor for each of the first text layers, in the order of the visual tokens.

    Source: Meng et al., DeepStack, 2024, section 3.
    """

    visual_mask: Tensor
    features: tuple[Tensor, ...]

    def inject(self, hidden: Tensor, layer: int) -> Tensor:
        """hidden (B, L, C) with the features of text layer `layer` added; hidden itself where the layer has none."""
        if layer >= len(self.features):
            return hidden
        index = self.visual_mask.nonzero(as_tuple=True)
        return hidden.index_put(index, self.features[layer].to(hidden.dtype), accumulate=True)


def place(embeds: Tensor, where: Tensor, features: Tensor, what: str) -> Tensor:
    """embeds (B, L, C) with the rows of features (V, C) at the V True places of `where` (B, L).

    Raises:
        ValueError: the numbers of places and features differ; the message has both.
    """
    places = int(where.sum())
    if places != features.shape[0]:
        raise ValueError(
            f"input_ids has {places} {what} placeholders, but the {what}s make {features.shape[0]} features"
        )
    return embeds.index_put(where.nonzero(as_tuple=True), features.to(embeds.dtype))


def merge(
    image_mask: Tensor, image: tuple[Tensor, ...], video_mask: Tensor, video: tuple[Tensor, ...]
) -> DeepStack | None:
    """The DeepStack features of images and videos in the order of their tokens; None where there are none."""
    if not image and not video:
        return None
    visual_mask = image_mask | video_mask
    of_image = image_mask[visual_mask]
    merged = []
    for layer in range(max(len(image), len(video))):
        parts = (image or video)[layer]
        features = parts.new_empty(of_image.shape[0], parts.shape[-1])
        if image:
            features[of_image] = image[layer]
        if video:
            features[~of_image] = video[layer]
        merged.append(features)
    return DeepStack(visual_mask, tuple(merged))


def check_kind(fusion: str) -> str:
    """The name of a way to fuse.

    Raises:
        ValueError: it is unknown.
    """
    if fusion not in KINDS:
        raise ValueError(f"fusion must be one of {', '.join(KINDS)}, got {fusion!r}")
    return fusion


def slice_features(deepstack: DeepStack | None, start: int, stop: int) -> DeepStack | None:
    """The part of the tokens start to stop of every row."""
    if deepstack is None:
        return None
    inside = torch.zeros_like(deepstack.visual_mask)
    inside[:, start:stop] = True
    keep = inside[deepstack.visual_mask]
    return DeepStack(deepstack.visual_mask[:, start:stop], tuple(part[keep] for part in deepstack.features))
