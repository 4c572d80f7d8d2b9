"""Conversations, images and videos to the tensors that ``Qwen3VL.forward`` takes.

    messages --chat template--> text --placeholders expanded--> token ids (B, L), left- or right-padded
    images, videos --patches--> pixel_values (N, C*T*P*P), grid_thw (n, 3)

An image is ``<|vision_start|><|image_pad|><|vision_end|>`` in the text, its pad repeated once per merged patch:
T H W / merge_size^2 times for a grid (T, H, W). In a video the pad becomes, per temporal patch,
``<t seconds><|vision_start|>pads<|vision_end|>``; the template's own pair stays around all of them, as in
``transformers`` 5 (4.57 took it away).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch

from .conversation import (
    OWN_CHAT_TEMPLATE,
    Message,
    check_messages,
    compile_template,
    find_chat_template,
    image_of,
    media_parts,
    video_of,
)
from .preprocess import ImagePreprocessor, ImageSource, PatchConfig
from .tokenizer import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END_TOKEN,
    VISION_START_TOKEN,
    StreamDecoder,
    Tokenizer,
    read_json,
)
from .video import (
    MAX_VIDEO_PIXELS,
    MIN_VIDEO_PIXELS,
    ProcessedVideo,
    SamplingConfig,
    Video,
    VideoPreprocessor,
    VideoSource,
)

PaddingSide = Literal["left", "right"]

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Batch(dict[str, torch.Tensor]):
    """What a model's ``forward`` takes; pass it as ``model(**batch)``. Absent media are absent keys (``None`` as
    attributes).

    ``input_ids`` (B, L) int64; ``attention_mask`` (B, L) int64, 0 at padding; ``pixel_values`` (N, C*T*P*P) float32;
    ``image_grid_thw`` (n, 3) int64; ``pixel_values_videos``, ``video_grid_thw`` likewise.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    video_grid_thw: torch.Tensor | None

    def __getattr__(self, name: str) -> Any:
        if name in Batch.__annotations__:
            return self.get(name)
        raise AttributeError(f"Batch has no {name}")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        return Batch({name: tensor.to(device) for name, tensor in self.items()})


def find_folder(path_or_repo: str | Path, files: Sequence[str] = PROCESSOR_FILES) -> Path:
    """A local folder as it is; a hub id ``owner/name`` after downloading those of ``files`` (glob patterns) it has.

    Raises FileNotFoundError where it is neither, ValueError where it is a file.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: expected the folder of a checkpoint, got a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)):
        raise FileNotFoundError(f"{path_or_repo}: no such folder, and not a hub id (owner/name)")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_repo), allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{path_or_repo}: no such folder here, nor on the model hub ({reason})") from None


class Processor:
    """``processor(text, images, videos) -> Batch``; ``processor.encode_chat(messages) -> Batch``.

    Attributes: ``tokenizer``, ``image_preprocessor``, ``video_preprocessor``, ``chat_template`` (Jinja source),
    ``image_token_id``, ``video_token_id``, ``eos_token_ids`` (list), ``pad_token_id``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_preprocessor: ImagePreprocessor | None = None,
        video_preprocessor: VideoPreprocessor | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_preprocessor = image_preprocessor or ImagePreprocessor()
        self.video_preprocessor = video_preprocessor or VideoPreprocessor()
        self.chat_template = chat_template or OWN_CHAT_TEMPLATE.read_text(encoding="utf-8")
        self._template = compile_template(self.chat_template)
        self.image_token_id = tokenizer.image_token_id
        self.video_token_id = tokenizer.video_token_id
        self.eos_token_ids = tokenizer.eos_token_ids
        self.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """Read a checkpoint's folder, or its hub id: ``tokenizer.json`` and ``preprocessor_config.json`` must be there
        (or ``processor_config.json``, where newer ``transformers`` put the latter); the other small files may.

        ``min_pixels``, ``max_pixels``: bounds for one image in place of the checkpoint's; fewer pixels, fewer tokens.

        Raises FileNotFoundError or ValueError with one sentence that names the file.
        """
        folder = find_folder(path_or_repo)
        tokenizer = Tokenizer.from_pretrained(folder)
        _check_token_ids(folder, tokenizer)
        nested = read_json(folder / "processor_config.json")
        image_file = folder / "preprocessor_config.json"
        image_values = nested.get("image_processor") or read_json(image_file, required=True)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        image_values = {**image_values, **{name: value for name, value in bounds.items() if value is not None}}
        video_file = folder / "video_preprocessor_config.json"
        video_values = nested.get("video_processor") or read_json(video_file)
        video_defaults = {"min_pixels": MIN_VIDEO_PIXELS, "max_pixels": MAX_VIDEO_PIXELS}
        template, file = find_chat_template(folder, tokenizer)
        try:
            return cls(
                tokenizer,
                ImagePreprocessor(PatchConfig.from_dict(image_values, str(image_file))),
                VideoPreprocessor(
                    PatchConfig.from_dict(video_values, str(video_file), **video_defaults),
                    SamplingConfig.from_dict(video_values),
                ),
                template,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{file}: the chat template has an error in line {error.lineno} ({error})") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what ``from_pretrained`` reads; ``transformers`` reads it too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        image = {
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **self.image_preprocessor.config.to_dict(),
        }
        video = {
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
            **self.video_preprocessor.config.to_dict(),
            **vars(self.video_preprocessor.sampling),
        }
        for name, values in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        add_vision_id: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, media as placeholders.

        ``messages``: ``{"role": ..., "content": text or list of parts}``; a part is ``{"type": "text", "text": ...}``,
        ``{"type": "image", "image": ...}``, ``{"type": "image_url", "image_url": {"url": ...}}`` or
        ``{"type": "video", "video": ...}``. ``add_vision_id`` numbers them ("Picture 1: "). ``tools`` are JSON schemas.
        ``variables`` reach the template. Raises ValueError for what is not a conversation.
        """
        checked = check_messages(messages)
        try:
            return self._template.render(
                **self.tokenizer.special_tokens(),
                messages=checked,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
                tools=list(tools) if tools else None,
                **variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"apply_chat_template: the chat template refused the messages ({error})") from None

    def encode_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        images: Sequence[ImageSource] | None = None,
        videos: Sequence[VideoSource | Video] | None = None,
        padding_side: PaddingSide = "left",
        **template: Any,
    ) -> Batch:
        """One conversation, or a list of them, ready for ``generate``.

        Parts that carry their image (path, ``data:`` URL, PIL image, array) or video use it; parts that do not take
        the next of ``images`` or ``videos``. A video part may say ``fps``, ``num_frames``, ``source_fps``, ``sample``
        (see ``Video``). ``template``: keywords of ``apply_chat_template``.
        """
        if len(messages) == 0:
            raise ValueError("encode_chat: messages is empty")
        chats: Any = [messages] if isinstance(messages[0], Mapping) else messages
        text = [self.apply_chat_template(chat, **template) for chat in chats]
        own_images = [image_of(part) for chat in chats for part in media_parts(chat, "image")]
        own_videos = [video_of(part) for chat in chats for part in media_parts(chat, "video")]
        return self(text, _fill("image", own_images, images), _fill("video", own_videos, videos), padding_side)

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageSource | Sequence[Any] | None = None,
        videos: VideoSource | Video | Sequence[Any] | None = None,
        padding_side: PaddingSide = "left",
    ) -> Batch:
        """Tokenise ``text`` (B prompts) with its images and videos, given in the order of their placeholders over the
        whole batch (``images`` may also be a list per prompt; ``videos`` is a list of videos, not of frames).

        Raises ValueError for an empty prompt or where the numbers of placeholders and media differ, and what the
        preprocessors raise.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f'processor: padding_side must be "left" or "right", got {padding_side!r}')
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("processor: no prompt given")
        for index, prompt in enumerate(texts):
            if not prompt.strip():
                raise ValueError(f"processor: prompt {index} is empty")
        image_list, video_list = _image_list(images), _video_list(videos)
        _check_count("image", IMAGE_TOKEN, texts, len(image_list))
        _check_count("video", VIDEO_TOKEN, texts, len(video_list))

        batch = Batch()
        image_pads: list[str] = []
        if image_list:
            batch["pixel_values"], batch["image_grid_thw"] = self.image_preprocessor(image_list)
            merged = self.image_preprocessor.config.merge_size**2
            image_pads = [IMAGE_TOKEN * (int(n) // merged) for n in batch["image_grid_thw"].prod(-1)]
        processed = [self.video_preprocessor(video, f"video {i}") for i, video in enumerate(video_list)]
        if processed:
            pixels = [video.pixel_values for video in processed]
            batch["pixel_values_videos"] = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
            batch["video_grid_thw"] = torch.tensor([video.grid for video in processed], dtype=torch.int64)
        pads = {IMAGE_TOKEN: iter(image_pads), VIDEO_TOKEN: iter([self._video_text(video) for video in processed])}
        placeholder = re.compile("|".join(re.escape(token) for token in pads))
        expanded = [placeholder.sub(lambda match: next(pads[match.group()]), prompt) for prompt in texts]
        batch.update(self._pad([self.tokenizer.encode(prompt) for prompt in expanded], padding_side))
        return batch

    def decode(self, ids: Sequence[int] | torch.Tensor, skip_special_tokens: bool = True) -> str:
        """Text of a row of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one; it never emits half a character."""
        return self.tokenizer.stream_decoder(skip_special_tokens)

    def _video_text(self, video: ProcessedVideo) -> str:
        _, height, width = video.grid
        pads = VIDEO_TOKEN * (height * width // self.video_preprocessor.config.merge_size**2)
        segment = VISION_START_TOKEN + pads + VISION_END_TOKEN
        return "".join(f"<{seconds:.1f} seconds>{segment}" for seconds in video.timestamps)

    def _pad(self, rows: list[list[int]], padding_side: PaddingSide) -> dict[str, torch.Tensor]:
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for index, row in enumerate(rows):
            start = length - len(row) if padding_side == "left" else 0
            input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
            attention_mask[index, start : start + len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _check_token_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """The model finds its placeholders by ``config.json``'s ids; a tokenizer with others would feed it noise."""
    config = read_json(folder / "config.json")
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        expected, found = config.get(name), getattr(tokenizer, name)
        if expected is not None and expected != found:
            raise ValueError(f"{folder / 'config.json'}: {name} = {expected}, but tokenizer.json has {found}")


def _check_count(kind: str, token: str, texts: Sequence[str], given: int) -> None:
    found = sum(text.count(token) for text in texts)
    if found != given:
        raise ValueError(f"processor: the prompts have {found} {kind} placeholders ({token}), but {given} were given")


def _fill(kind: str, own: Sequence[Any], given: Sequence[Any] | None) -> list[Any]:
    """``own`` with each None replaced by the next of ``given``."""
    extra = list(given or ())
    missing = sum(media is None for media in own)
    if missing != len(extra):
        raise ValueError(
            f"encode_chat: the messages have {missing} {kind} placeholders without {kind}, but {len(extra)} were given"
        )
    rest = iter(extra)
    return [next(rest) if media is None else media for media in own]


def _image_list(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in (entry if isinstance(entry, (list, tuple)) else [entry])]


def _video_list(videos: Any) -> list[Any]:
    if videos is None:
        return []
    return list(videos) if isinstance(videos, (list, tuple)) else [videos]
