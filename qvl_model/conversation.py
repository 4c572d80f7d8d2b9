"""Conversations: what a message may be, the chat template that renders it, and the media it carries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from .preprocess import ImageSource
from .tokenizer import Tokenizer, read_json
from .video import Video, VideoSource

Message = Mapping[str, Any]

OWN_CHAT_TEMPLATE = Path(__file__).parent / "assets" / "chat_template.jinja"
_ROLES = ("system", "user", "assistant", "tool")


def compile_template(source: str) -> jinja2.Template:
    """A chat template, sandboxed: it comes with the checkpoint, so it is somebody else's code. It finds what the
    template of any checkpoint may use: ``tojson`` that leaves HTML and Unicode alone, ``raise_exception``,
    ``strftime_now``, loop controls. Raises jinja2.TemplateSyntaxError."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def find_chat_template(folder: Path, tokenizer: Tokenizer) -> tuple[str, Path]:
    """The template of a checkpoint and the file it is from: ``chat_template.jinja``, ``chat_template.json``,
    ``tokenizer_config.json`` (one template, or a list with one named "default"), or else our own."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), path
    path = folder / "chat_template.json"
    if template := read_json(path).get("chat_template"):
        return template, path
    path = folder / "tokenizer_config.json"
    template = tokenizer.config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if template:
        return template, path
    return OWN_CHAT_TEMPLATE.read_text(encoding="utf-8"), OWN_CHAT_TEMPLATE


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages, with ``content=None`` beside tool calls as "". Raises ValueError, naming the message, for what a
    template would drop or garble without a word: an unknown role, a late system message, a user who says nothing."""
    if isinstance(messages, (str, Mapping)) or len(messages) == 0:
        raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    checked: list[Message] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"{where}: expected {{'role': ..., 'content': ...}}, got {message!r:.80}")
        role, content = message["role"], message.get("content")
        if role not in _ROLES:
            raise ValueError(f"{where}: role must be one of {', '.join(_ROLES)}; got {role!r}")
        if role == "system" and index > 0:
            raise ValueError(f"{where}: a system message must be the first")
        if content is None and message.get("tool_calls"):
            message = {**message, "content": ""}
        elif not isinstance(content, str) and not (
            isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
        ):
            raise ValueError(f"{where}: content must be text or a list of parts, got {type(content).__name__}")
        if role == "user" and not _says_something(content):
            raise ValueError(f"{where}: the user's content is empty")
        checked.append(message)
    return checked


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(_media_kind(part) or str(part.get("text", "")).strip() for part in content)


def _media_kind(part: Mapping[str, Any]) -> str | None:
    """Which placeholder the chat templates of Qwen render for a part."""
    if part.get("type") == "image" or "image" in part or "image_url" in part:
        return "image"
    if part.get("type") == "video" or "video" in part:
        return "video"
    return None


def media_parts(messages: Sequence[Message], kind: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a conversation that stand for an "image" or a "video", in order."""
    for message in messages:
        content = message.get("content")
        for part in () if content is None or isinstance(content, str) else content:
            if _media_kind(part) == kind:
                yield part


def image_of(part: Mapping[str, Any]) -> ImageSource | None:
    """The image that a part carries, or None where it is only a placeholder."""
    return _first(part, "image", "image_url", "url", "path")


def video_of(part: Mapping[str, Any]) -> Video | None:
    """The video that a part carries with its sampling, or None where it is only a placeholder."""
    source: VideoSource | None = _first(part, "video", "url", "path")
    if source is None or isinstance(source, Video):
        return source
    return Video(
        source,
        source_fps=part.get("source_fps"),
        fps=part.get("fps"),
        num_frames=part.get("num_frames"),
        sample=part.get("sample", True),
    )


def _first(part: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        value = part.get(name)
        if isinstance(value, Mapping):  # OpenAI's form: {"image_url": {"url": ...}}
            value = value.get("url")
        if value is not None:
            return value
    return None
