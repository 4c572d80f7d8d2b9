"""Accuracy on image questions: VLMEvalKit-style TSV files, and the benchmark that ships with the digits checkpoint.

A TSV has one question per line and the columns `index`, `image` (base64 of an encoded image, or the index of another
line whose image it shares), `question`, `answer`, and where wanted `category`, `hint` and the options `A`, `B`, `C`,
`D`, ... (then `answer` is a letter).
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from .model import Qwen3VL

REQUIRED_COLUMNS = ("index", "image", "question", "answer")
# VLMEvalKit's own rule: what is this short is no image but the index of the line that has it.
_LONGEST_REFERENCE = 64


class BenchmarkError(ValueError):
    """A benchmark file cannot be read; the message starts with `file:line:`."""


@dataclass(frozen=True)
class Question:
    """One line of a benchmark.

    Attributes:
        where: "file:line", for messages.
        image: the encoded image file.
        options: letter -> text, empty unless it is multiple choice; then `answer` is a letter.
    """

    where: str
    index: str
    image: bytes
    question: str
    answer: str
    category: str = "all"
    hint: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def prompt(self) -> str:
        """The text that is asked: hint, question, options, each on its own lines."""
        parts = [f"Hint: {self.hint}"] if self.hint else []
        parts.append(self.question)
        if self.options:
            parts += [f"{letter}. {text}" for letter, text in self.options.items()]
            parts.append("Answer with the option's letter only.")
        return "\n".join(parts)

    def is_right(self, reply: str) -> bool:
        """Whether `reply` is the answer: equal after `normalize`; for multiple choice, naming its letter or its
        text."""
        said, wanted = normalize(reply), normalize(self.answer)
        if not self.options:
            return said == wanted
        if said == normalize(self.options.get(self.answer.strip().upper(), "")):
            return True
        letter = said.lstrip("(").split(")")[0].split(".")[0].split(":")[0].split(" ")[0]
        return letter == wanted


def normalize(text: str) -> str:
    """Lower case, single spaces, without surrounding space and without a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def read_tsv(file: Path, limit: int | None = None) -> list[Question]:
    """The questions of a TSV file, the first `limit` of them. Raises BenchmarkError naming the line that is
    malformed."""
    rows = list(_rows(file))
    images: dict[str, bytes] = {}
    for line, row in rows:
        if row["index"] in images:
            raise BenchmarkError(f"{file}:{line}: index {row['index']} appears twice")
        images[row["index"]] = b"" if _is_reference(row["image"]) else _decode_image(file, line, row["image"])
    questions = []
    for line, row in rows[:limit]:
        image = images[row["index"]] or images.get(row["image"].strip(), b"")
        if not image:
            raise BenchmarkError(
                f"{file}:{line}: image refers to index {row['image']!r}, which has no image of its own"
            )
        questions.append(_question(file, line, row, image))
    if not questions:
        raise BenchmarkError(f"{file}:1: holds no questions")
    return questions


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: cell}) per question; a quoted cell may span lines, the number is that of its first."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t", strict=True)
        try:
            columns = next(reader, [])
            absent = [name for name in REQUIRED_COLUMNS if name not in columns]
            if absent:
                raise BenchmarkError(
                    f"{file}:1: column {absent[0]!r} is missing; there are {', '.join(columns) or 'none'}"
                )
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(columns):
                    raise BenchmarkError(f"{file}:{line}: {len(cells)} cells, the header has {len(columns)}")
                if cells:
                    yield line, dict(zip(columns, cells))
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise BenchmarkError(f"{file}:{reader.line_num}: {error}") from None


def _is_reference(cell: str) -> bool:
    return len(cell.strip()) <= _LONGEST_REFERENCE


def _decode_image(file: Path, line: int, cell: str) -> bytes:
    try:
        data = base64.b64decode("".join(cell.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BenchmarkError(f"{file}:{line}: image is not base64 ({error})") from None
    try:
        # Reads the header only: a bad line is named now, not an hour into the evaluation.
        Image.open(io.BytesIO(data)).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BenchmarkError(f"{file}:{line}: image cannot be read as an image ({error})") from None
    return data


def _question(file: Path, line: int, row: Mapping[str, str], image: bytes) -> Question:
    options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter, "").strip()}
    answer = row["answer"].strip()
    if not row["question"].strip() or not answer:
        raise BenchmarkError(f"{file}:{line}: question and answer must not be empty")
    if options and answer.upper() not in options:
        raise BenchmarkError(f"{file}:{line}: answer {answer!r} is none of the options {', '.join(options)}")
    category = row.get("category", "").strip() or "all"
    return Question(
        f"{file}:{line}", row["index"], image, row["question"], answer, category, row.get("hint", "").strip(), options
    )


@dataclass(frozen=True)
class Record:
    """One question, the model's reply, and whether it was right."""

    index: str
    category: str
    question: str
    answer: str
    reply: str
    right: bool

    @classmethod
    def of(cls, question: Question, reply: str) -> Record:
        right = question.is_right(reply)
        return cls(question.index, question.category, question.question, question.answer, reply, right)


@dataclass(frozen=True)
class Report:
    """What an evaluation found: `records` of the questions answered, of `asked` in all."""

    records: Sequence[Record]
    asked: int

    @property
    def accuracy(self) -> float:
        """Right answers / answered questions; 0 where none was answered."""
        return sum(r.right for r in self.records) / len(self.records) if self.records else 0.0

    def by_category(self) -> dict[str, tuple[int, int]]:
        """category -> (right, answered), in the order of first appearance."""
        counts: dict[str, tuple[int, int]] = {}
        for record in self.records:
            right, total = counts.get(record.category, (0, 0))
            counts[record.category] = (right + record.right, total + 1)
        return counts

    def table(self) -> str:
        """The accuracy per category and overall, as aligned text."""
        rows = [(name, *counts) for name, counts in self.by_category().items()]
        rows.append(("overall", sum(r.right for r in self.records), len(self.records)))
        width = max(len(name) for name, _, _ in rows)
        lines = [
            f"{name:<{width}}  {right:>6} / {total:<6} {right / max(total, 1):7.2%}" for name, right, total in rows
        ]
        if len(self.records) < self.asked:
            lines.append(f"interrupted: {len(self.records)} of {self.asked} questions answered")
        return "\n".join(lines)

    def to_json(self) -> str:
        """{"accuracy", "answered", "asked", "categories": {name: {right, answered, accuracy}}, "records": [...]}."""
        categories = {
            name: {"right": right, "answered": total, "accuracy": right / total}
            for name, (right, total) in self.by_category().items()
        }
        summary = {"accuracy": self.accuracy, "answered": len(self.records), "asked": self.asked}
        return (
            json.dumps({**summary, "categories": categories, "records": [vars(r) for r in self.records]}, indent=1)
            + "\n"
        )


def answer_questions(model: Qwen3VL, **generation: Any) -> Callable[[Sequence[Question]], list[str]]:
    """A function that answers a batch of questions with `model`; `generation` are options of `Qwen3VL.generate`."""
    from .generation import answer_all, user_message
    from .preprocess import load_image

    def answer(batch: Sequence[Question]) -> list[str]:
        images = [load_image(question.image, question.where) for question in batch]
        chats = [[user_message(question.prompt(), [image])] for question, image in zip(batch, images)]
        return answer_all(model, chats, **generation)

    return answer


def run_benchmark(
    answer: Callable[[Sequence[Question]], list[str]],
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> Report:
    """Asks all `questions` in batches; `answer` gives one reply each. Ctrl-C ends with what was answered so far."""
    from tqdm import tqdm

    if batch_size < 1:
        raise ValueError(f"run_benchmark: batch_size must be at least 1, got {batch_size}")
    records: list[Record] = []
    # disable=None hides the bar where stderr is no terminal.
    with tqdm(total=len(questions), unit="question", disable=None if progress else True, leave=False) as bar:
        try:
            for start in range(0, len(questions), batch_size):
                batch = questions[start : start + batch_size]
                records += [Record.of(question, reply) for question, reply in zip(batch, answer(batch))]
                bar.update(len(batch))
                bar.set_postfix_str(f"accuracy {Report(records, len(questions)).accuracy:.1%}")
        except KeyboardInterrupt:
            pass
    return Report(records, len(questions))
