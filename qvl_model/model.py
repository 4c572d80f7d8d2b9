"""Qwen3-VL: images, videos and text to logits. Parameter names are the released checkpoint's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvl_kernels import PackedLinear

from . import fusion as fusions
from .attention import Kind, Part, Step, kinds_of_layers, names_of_layers
from .cache import KVCache
from .config import Qwen3VLConfig
from .inputs import Inputs, left_aligned
from .media import distinct
from .memory import unmap_read_pages
from .planning import CACHES, Plan
from .positions import position_ids as compute_position_ids
from .positions import text_rope
from .text import TextModel
from .vision import VisionModel

_VIDEOS = 1 << 40  # the first number of a video's token; those of images are below


@dataclass(frozen=True)
class ModelOutput:
    """Attributes:
    logits: (B, L or logits_to_keep, vocabulary).
    hidden: (B, L, C) the normalised hidden states they were made of.
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class _Seen:
    """The visual tokens of a batch: features (V, C), DeepStack features, and numbers (V,) that equal ones share."""

    features: Tensor
    deepstack: tuple[Tensor, ...]
    identity: Tensor


class _Backbone(nn.Module):
    """`model.` of the released names."""

    def __init__(self, config: Qwen3VLConfig, text: Sequence[Kind], vision: Sequence[Kind]) -> None:
        super().__init__()
        self.visual = VisionModel(config.vision, vision)
        self.language_model = TextModel(config.text, text)


class Qwen3VL(nn.Module):
    """The complete model.

    Args:
        config: its numbers.
        attention: one name of `qvl_model.attention` for all text layers, or one for each; None is what config says.
        vision_attention: likewise for the vision blocks.
        fusion: "deepstack".
        dtype: of the parameters; None is torch's default.

    The parameters are random (normal, 0.02) unless the model is built under `torch.device("meta")`; `from_pretrained`
    loads a checkpoint.

    >>> model = Qwen3VL(Qwen3VLConfig.digits())
    >>> model(torch.tensor([[1, 2, 7]])).logits.shape
    torch.Size([1, 3, 512])

    Source: Bai et al., Qwen3-VL technical report, 2025.
    """

    processor_source: str | None = None  # the folder it was loaded from, where `chat` finds the tokenizer
    plan: Plan | None = None  # what `from_pretrained` chose for the memory there is
    paged = False  # a part of the weights comes from the disk for every token

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        attention: str | Sequence[str] | None = None,
        vision_attention: str | Sequence[str] | None = None,
        fusion: str = "deepstack",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = names_of_layers(attention or config.attention, config.text.num_hidden_layers)
        self.vision_attention = names_of_layers(vision_attention or config.vision_attention, config.vision.depth)
        config = replace(config, attention=_told(self.attention), vision_attention=_told(self.vision_attention))
        self.config = config
        self.fusion = fusions.check_kind(fusion)
        device = torch.get_default_device()
        with torch.device("meta"):
            self.model = _Backbone(config, kinds_of_layers(self.attention), kinds_of_layers(self.vision_attention))
            self.lm_head: nn.Linear | PackedLinear = nn.Linear(
                config.text.hidden_size, config.text.vocab_size, bias=False
            )
            self.to(dtype or torch.get_default_dtype())
        if device.type != "meta":
            self.to_empty(device=device)
        self.tie_weights()
        if device.type != "meta":
            self._initialise()

    @property
    def head_is_table(self) -> bool:
        """Whether the head's matrix is the embedding table; a quantised head has its own numbers."""
        table, head = self.model.language_model.embed_tokens.weight, self.lm_head
        same = isinstance(head, nn.Linear) or (head.format == "bf16" and table.dtype == torch.bfloat16)
        return self.config.tie_word_embeddings and same

    def tie_weights(self) -> None:
        """Makes a tied head the embedding matrix itself; after either was replaced, do it again."""
        table = self.model.language_model.embed_tokens.weight
        if self.head_is_table:
            self.lm_head.weight = table if isinstance(self.lm_head, nn.Linear) else table.detach()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.model.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt computed at a time, where nobody asks for another number."""
        return 1024 if self.plan is None else self.plan.prefill_chunk

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """In training, keep only the inputs of every block and compute it again in the backward pass."""
        self.model.visual.gradient_checkpointing = enabled
        self.model.language_model.gradient_checkpointing = enabled

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """A cache on the model's device; `dtype` is by default the plan's, or that of the embedding table, which is
        what the checkpoint was stored in; int8 takes one byte an element and is for "fused" attention."""
        if dtype is None and self.plan is not None and set(self.attention) == {"fused"}:
            dtype = CACHES[self.plan.cache]
        dtype = dtype or self.model.language_model.embed_tokens.weight.dtype
        return KVCache(self.config.text, batch, capacity, dtype, self.device, self.attention)

    def embed_inputs(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Inputs:
        """Token ids, images and videos to `Inputs`; a step that continues a cache stands behind what the cache has.

        Args:
            input_ids: (B, L) with one placeholder per merged visual token.
            attention_mask: (B, L), zero at padding on either side; of a longer one, a cache's, the last L columns
                count.
            pixel_values, pixel_values_videos: (patches, patch_dim) of all images and all videos.
            image_grid_thw, video_grid_thw: (images, 3), (videos, 3) patches in time, height, width.
            position_ids: (3, B, L) absolute positions, used as they are; or None to compute them.
            cache: the cache that will be continued.

        Raises:
            ValueError: shapes or placeholder counts do not match, or an id is outside the vocabulary; the message has
                the numbers.
        """
        self._check_ids(input_ids)
        if cache is not None and cache.batch != input_ids.shape[0]:
            raise ValueError(f"the cache has {cache.batch} rows, the input has {input_ids.shape[0]}")
        for pixels, grid, name in (
            (pixel_values, image_grid_thw, "image_grid_thw"),
            (pixel_values_videos, video_grid_thw, "video_grid_thw"),
        ):
            if (pixels is None) != (grid is None):
                raise ValueError(f"pixel values and {name} must be given together")
        input_ids, position_ids, lengths, order = left_aligned(input_ids, attention_mask, position_ids)
        embeds = self.model.language_model.embed_tokens(input_ids).to(self.dtype)
        if input_ids.numel() >= 64 and not embeds.requires_grad and not self.head_is_table:
            unmap_read_pages(self.model.language_model.embed_tokens.weight)
        no_media = pixel_values is None and pixel_values_videos is None
        if no_media and cache is not None and input_ids.shape[1] == 1 and cache.lengths.all():
            # A token just generated is text, even if the model chose a placeholder.
            placeholder_ids = torch.full_like(input_ids, -1)
        else:
            inside = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            placeholder_ids = input_ids.where(inside, -1)
        image_mask = placeholder_ids == self.config.image_token_id
        video_mask = placeholder_ids == self.config.video_token_id
        identity = input_ids.clone() if len(input_ids) > 1 and cache is None and position_ids is None else None
        image = self._see(image_mask, pixel_values, image_grid_thw, "image")
        video = self._see(video_mask, pixel_values_videos, video_grid_thw, "video")
        for where, seen, what in ((image_mask, image, "image"), (video_mask, video, "video")):
            if seen is not None:
                embeds = fusions.place(embeds, where, seen.features, what)
                if identity is not None:
                    identity[where] = -1 - seen.identity
        if position_ids is None:
            position_ids, deltas = compute_position_ids(
                self.config, placeholder_ids, lengths, image_grid_thw, video_grid_thw
            )
            if cache is not None:
                deltas = deltas + cache.rope_deltas.to(deltas.device)
                position_ids = position_ids + (cache.lengths + cache.rope_deltas).to(deltas.device)[:, None]
        else:
            padding = torch.arange(input_ids.shape[1], device=lengths.device) >= lengths[:, None]
            deltas = position_ids.amax(0).masked_fill(padding, 0).amax(1) + 1 - lengths
            if cache is not None:
                deltas = deltas - cache.lengths.to(deltas.device)
        deepstack = fusions.merge(
            image_mask, image.deepstack if image else (), video_mask, video.deepstack if video else ()
        )
        return Inputs(embeds, position_ids, deltas, lengths, deepstack, order, identity)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids must have shape (B, L) with at least one token, got {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
        if input_ids.device.type == "cpu":
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.config.text.vocab_size:
                raise ValueError(f"input_ids must lie in [0, {self.config.text.vocab_size}), got {low} to {high}")

    def _see(self, where: Tensor, pixels: Tensor | None, grid: Tensor | None, what: str) -> _Seen | None:
        if pixels is None or grid is None:
            if where.any():
                raise ValueError(f"input_ids has {int(where.sum())} {what} placeholders, but no {what} is given")
            return None
        pixels, grid, index = distinct(pixels, grid, self.config.vision.spatial_merge_size)
        index = index.to(pixels.device)
        features, deepstack = self.model.visual(pixels, grid)
        if len(index) != len(features):
            features, deepstack = features[index], tuple(part[index] for part in deepstack)
        return _Seen(features, deepstack, index + (_VIDEOS if what == "video" else 0))

    def forward_embeds(self, inputs: Inputs, *, cache: KVCache | None = None, logits_to_keep: int = 0) -> ModelOutput:
        """Logits of every place, or of the last `logits_to_keep` tokens of every row, (B, logits_to_keep, V).

        A row of fewer tokens than that repeats its first.

        Raises:
            ValueError: the cache is too small, or a row would be longer than the model's positions.
        """
        keep = _number_kept(logits_to_keep, inputs.embeds.shape[1])
        hidden = self.hidden_states(inputs, cache)
        if logits_to_keep:
            places = torch.arange(keep, 0, -1, device=inputs.lengths.device)
            last = (inputs.lengths[:, None] - places).clamp(min=0)
            kept = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))
            return ModelOutput(self.lm_head(kept), hidden)
        return ModelOutput(self.lm_head(hidden), hidden)

    def hidden_states(self, inputs: Inputs, cache: KVCache | None = None) -> Tensor:
        """(B, L, C) normalised hidden states, what the head turns into logits. Errors as in `forward_embeds`."""
        tokens = inputs.embeds.shape[1]
        lengths = inputs.lengths if cache is None else inputs.lengths.cpu() + cache.lengths
        longest = int(lengths.max())
        limit = self.config.text.max_position_embeddings
        if longest > limit:
            raise ValueError(f"the prompt has {longest} tokens, the model has {limit} positions")
        key_lengths = None if cache is None else cache.begin(tokens)
        counts = None if bool((inputs.lengths == tokens).all()) else inputs.lengths
        step = Step(text_rope(self.config.text, inputs.position_ids), cache, key_lengths, counts)
        hidden = self.model.language_model(inputs.embeds, step, inputs.deepstack)
        if cache is not None:
            cache.advance(inputs.lengths)
            cache.rope_deltas = inputs.rope_deltas.cpu()
        return hidden

    def hidden_of_parts(self, inputs: Inputs, parts: Sequence[Part]) -> Tensor:
        """(1, T, C) hidden states of packed tokens, each part of them appended to its own cache."""
        for part in parts:
            part.cache.begin(part.stop - part.start)
        step = Step(text_rope(self.config.text, inputs.position_ids), None, None, None, parts)
        hidden = self.model.language_model(inputs.embeds, step, inputs.deepstack)
        for part in parts:
            part.cache.advance(torch.tensor([part.stop - part.start]))
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Logits (B, L, V) of every token, in the order of `input_ids`, or (B, logits_to_keep, V) of the last columns.

        Arguments as in `embed_inputs`, which are those that a processor makes. Without gradients and with a cache, the
        next call may go on with the next tokens alone. What stands at padding is not defined.

        Raises:
            ValueError: as in `embed_inputs` and `hidden_states`.
        """
        keep = _number_kept(logits_to_keep, input_ids.shape[-1])
        inputs = self.embed_inputs(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            position_ids=position_ids,
            cache=cache,
        )
        hidden = self.hidden_states(inputs, cache)
        if inputs.order is not None:
            back = inputs.order.argsort(dim=1)
            hidden = hidden.gather(1, back[:, :, None].expand_as(hidden))
        return ModelOutput(self.lm_head(hidden[:, -keep:]), hidden)

    def embed(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """(B, C) unit vectors: the hidden state of each row's last token, normalised; arguments as in
        `embed_inputs`."""
        prepared = self.embed_inputs(input_ids, **inputs)
        hidden = self.hidden_states(prepared)
        last = (prepared.lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return F.normalize(hidden.gather(1, last)[:, 0].float(), dim=-1)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **options: Any) -> Qwen3VL:
        """A checkpoint from a local folder or the hub; see `qvl_model.weights.load_pretrained` for the options."""
        from .weights import load_pretrained

        return load_pretrained(cls, path_or_repo, **options)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """(B, L + new) token ids; see `qvl_model.generation.generate` for the options."""
        from .generation import generate

        return generate(self, input_ids, **options)

    def chat(
        self, messages: Sequence[Any], images: Any = None, videos: Any = None, **options: Any
    ) -> str | Iterator[str]:
        """The answer to a conversation; see `qvl_model.generation.chat` for the options."""
        from .generation import chat

        return chat(self, messages, images, videos, **options)


def _told(names: tuple[str, ...]) -> tuple[str, ...]:
    """What a configuration says of them: nothing where all are fused."""
    return () if set(names) == {"fused"} else names


def _number_kept(logits_to_keep: int, tokens: int) -> int:
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be 0 (all) or more, got {logits_to_keep}")
    return min(logits_to_keep, tokens) or tokens
