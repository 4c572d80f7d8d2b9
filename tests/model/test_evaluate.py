"""Benchmarks: what a TSV may be, what a right answer is, and what a malformed line is told."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from PIL import Image

from qvl_model import Qwen3VL
from qvl_model.evaluate import (
    BenchmarkError,
    Question,
    Record,
    Report,
    answer_questions,
    normalize,
    read_tsv,
    run_benchmark,
)


def picture(colour: str = "red") -> str:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


HEADER = "index\timage\tquestion\tanswer\tcategory\tA\tB\thint"


def write(folder: Path, *lines: str) -> Path:
    file = folder / "questions.tsv"
    file.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    return file


def test_a_benchmark_of_vlmevalkits_kind(tmp_path):
    red, blue = picture(), picture("blue")
    questions = read_tsv(
        write(
            tmp_path,
            f"7\t{red}\tWhat colour?\tred\tcolour\t\t\t",
            "8\t7\tHow many?\t1\tcount\t\t\t",
            f'9\t{blue}\t"two lines\nand a ""quote"""\tB\t\tred\tblue\tLook well.',
        )
    )
    assert [question.index for question in questions] == ["7", "8", "9"]
    assert questions[0].image == questions[1].image == base64.b64decode(red)
    assert questions[2].image == base64.b64decode(blue)
    assert [question.category for question in questions] == ["colour", "count", "all"]
    assert questions[0].prompt() == "What colour?"
    assert questions[2].prompt() == (
        'Hint: Look well.\ntwo lines\nand a "quote"\nA. red\nB. blue\nAnswer with the option\'s letter only.'
    )
    assert [question.where.rpartition(":")[2] for question in questions] == ["2", "3", "4"]


def test_a_limit_keeps_images_that_later_lines_lend(tmp_path):
    file = write(tmp_path, "1\t2\tWhat?\tx\t\t\t\t", f"2\t{picture()}\tWhat?\ty\t\t\t\t")
    assert [question.answer for question in read_tsv(file, 1)] == ["x"]


def test_optional_columns_may_be_absent(tmp_path):
    file = tmp_path / "plain.tsv"
    file.write_text(f"answer\tindex\timage\tquestion\nred\t1\t{picture()}\tWhat?\n", encoding="utf-8-sig")
    assert read_tsv(file)[0].answer == "red"


BAD = {
    "no columns": (["answer"], 1, "column 'index' is missing; there are answer"),
    "too few cells": ([HEADER, "1\tx"], 2, "2 cells, the header has 8"),
    "index twice": (
        [HEADER, f"1\t{picture()}\tq\ta\t\t\t\t", f"1\t{picture()}\tq\ta\t\t\t\t"],
        3,
        "index 1 appears twice",
    ),
    "no base64": ([HEADER, "1\t" + "*" * 100 + "\tq\ta\t\t\t\t"], 2, "image is not base64"),
    "no image": ([HEADER, "1\t" + "QUJD" * 30 + "\tq\ta\t\t\t\t"], 2, "image cannot be read as an image"),
    "a reference to nothing": (
        [HEADER, "1\t5\tq\ta\t\t\t\t"],
        2,
        "image refers to index '5', which has no image of its own",
    ),
    "a reference to itself": ([HEADER, "1\t1\tq\ta\t\t\t\t"], 2, "image refers to index '1'"),
    "no question": ([HEADER, f"1\t{picture()}\t \ta\t\t\t\t"], 2, "question and answer must not be empty"),
    "no answer": ([HEADER, f"1\t{picture()}\tq\t\t\t\t\t"], 2, "question and answer must not be empty"),
    "answer no option": ([HEADER, f"1\t{picture()}\tq\tC\t\tx\ty\t"], 2, "answer 'C' is none of the options A, B"),
    "an open quote": ([HEADER, f'1\t{picture()}\t"q\ta\t\t\t\t'], 2, "unexpected end of data"),
    "nothing asked": ([HEADER], 1, "holds no questions"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_line_is_named(tmp_path, name):
    lines, number, message = BAD[name]
    file = tmp_path / "bad.tsv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(BenchmarkError) as caught:
        read_tsv(file)
    assert str(caught.value).startswith(f"{file}:{number}: {message}")


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "latin.tsv"
    file.write_bytes(HEADER.encode() + b"\n1\t2\tgr\xfcn\tx\t\t\t\t\n")
    with pytest.raises(BenchmarkError, match=r"latin.tsv:\d: .*utf-8"):
        read_tsv(file)


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("3 7 1", "3 7 1", True),
        ("  3  7 1.\n", "3 7 1", True),
        ("Red", "red", True),
        ("red.", "Red", True),
        ("3 7", "3 7 1", False),
        ("reddish", "red", False),
        ("", "red", False),
        ("no", "yes", False),
        ("red..", "red", False),
    ],
)
def test_exact_match(reply, answer, right):
    assert Question("", "1", b"", "?", answer).is_right(reply) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("B", True),
        ("b", True),
        ("B.", True),
        ("(B)", True),
        ("B. blue", True),
        ("B: blue", True),
        ("blue", True),
        ("Blue.", True),
        ("A", False),
        ("red", False),
        ("Because", False),
        ("", False),
        ("A or B", False),
    ],
)
def test_multiple_choice(reply, right):
    question = Question("", "1", b"", "?", "B", options={"A": "red", "B": "blue"})
    assert question.is_right(reply) is right


def test_normalize_drops_one_full_stop_only():
    assert normalize(" A  b .\n") == "a b"
    assert normalize("...") == ".."


def some_questions(number: int) -> list[Question]:
    return [Question("", str(i), b"", f"q{i}", str(i % 3), "even" if i % 2 == 0 else "odd") for i in range(number)]


def test_the_report_counts():
    sizes = []

    def answer(batch):
        sizes.append(len(batch))
        return [question.answer if question.index != "4" else "wrong" for question in batch]

    report = run_benchmark(answer, some_questions(7), batch_size=3)
    assert sizes == [3, 3, 1]
    assert report.by_category() == {"even": (3, 4), "odd": (3, 3)}
    assert report.accuracy == 6 / 7
    assert report.table().splitlines() == [
        "even          3 / 4       75.00%",
        "odd           3 / 3      100.00%",
        "overall       6 / 7       85.71%",
    ]
    content = json.loads(report.to_json())
    assert content["accuracy"] == 6 / 7
    assert content["categories"]["even"] == {"right": 3, "answered": 4, "accuracy": 0.75}
    assert content["records"][4] == {
        "index": "4",
        "category": "even",
        "question": "q4",
        "answer": "1",
        "reply": "wrong",
        "right": False,
    }


def test_ctrl_c_leaves_what_was_answered():
    def answer(batch):
        if batch[0].index == "4":
            raise KeyboardInterrupt
        return [question.answer for question in batch]

    report = run_benchmark(answer, some_questions(7), batch_size=2)
    assert len(report.records) == 4
    assert report.table().splitlines()[-1] == "interrupted: 4 of 7 questions answered"


def test_an_empty_report():
    assert Report([], 3).accuracy == 0
    assert "overall" in Report([], 3).table()


def test_a_batch_size_of_nothing():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run_benchmark(lambda batch: [], some_questions(1), batch_size=0)


def test_a_model_answers_in_batches_as_it_does_alone(tmp_path):
    write_checkpoint(tmp_path, seed=3)
    model = Qwen3VL.from_pretrained(tmp_path)
    lines = [f"{i}\t{picture(colour)}\tWhat is {i}?\tx\t\t\t\t" for i, colour in enumerate(["red", "blue", "green"])]
    questions = read_tsv(write(tmp_path, *lines))
    answer = answer_questions(model, max_new_tokens=8)
    together = run_benchmark(answer, questions, batch_size=3)
    alone = run_benchmark(answer, questions, batch_size=1)
    assert together == alone
    assert together.records[0] == Record.of(questions[0], together.records[0].reply)


def test_an_image_that_breaks_off_names_its_line(tmp_path):
    broken = base64.b64encode(base64.b64decode(picture())[:60]).decode()
    write_checkpoint(tmp_path, seed=3)
    questions = read_tsv(write(tmp_path, f"1\t{broken}\tWhat?\tx\t\t\t\t"))
    answer = answer_questions(Qwen3VL.from_pretrained(tmp_path), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"questions.tsv:2: cannot decode the image"):
        answer(questions)
