"""`qvl chat`: a conversation in a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .generation import user_message
from .preprocess import load_image, local_file

if TYPE_CHECKING:
    from .model import Qwen3VL

HELP = """\
/image FILE   show an image with the next question
/video FILE   show a video with the next question
/reset        begin a new conversation
/quit         leave (or Ctrl-D)
Ctrl-C        stop an answer"""


class Conversation:
    """The turns so far, and the images and videos that wait for the next question."""

    def __init__(self, model: Qwen3VL, images: list[Any], videos: list[Any], generation: dict[str, Any]) -> None:
        self.model = model
        self.generation = generation
        self.messages: list[dict[str, Any]] = []
        self.images = list(images)
        self.videos = list(videos)

    def ask(self, question: str, show: Callable[[str], None]) -> None:
        """Answers `question`, piece by piece through `show`; a failed or empty turn leaves the conversation as it was.

        Ctrl-C ends the answer, which counts as far as it came.
        """
        messages = [*self.messages, user_message(question, self.images, self.videos)]
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.model.chat(messages, stream=True, **self.generation):
                answer += piece
                show(piece)
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.images, self.videos = [], []

    def command(self, line: str) -> str:
        """Does what a line such as "/image scene.png" says; returns what to tell the user."""
        name, _, rest = line.partition(" ")
        file = rest.strip()
        if name in ("/image", "/video") and not file:
            raise ValueError(f"{name} needs the name of a file")
        if name == "/image":
            self.images.append(load_image(file))
            return f"{file} goes with the next question"
        if name == "/video":
            self.videos.append(str(local_file(file)))
            return f"{file} goes with the next question"
        if name == "/reset":
            self.messages, self.images, self.videos = [], [], []
            return "a new conversation"
        if name == "/help":
            return HELP
        raise ValueError(f"{name}: no such command; /help lists them")


def converse(model: Qwen3VL, images: list[Any], videos: list[Any], generation: dict[str, Any]) -> None:
    """Reads questions and commands until /quit or the input's end. A bad line is reported, and the talk goes on."""
    from .cli import one_line

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history

    conversation = Conversation(model, images, videos, generation)
    terminal = sys.stdin.isatty()
    if terminal:
        print("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                print(conversation.command(line), flush=True)
            else:
                conversation.ask(line, lambda piece: print(piece, end="", flush=True))
                print(flush=True)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            print(f"qvl: {one_line(error)}", file=sys.stderr, flush=True)
