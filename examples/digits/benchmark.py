"""Builds the benchmark of the digits checkpoint, and the picture that the README asks about.

    python examples/digits/benchmark.py      # rewrites qvl_model/assets/digits/benchmark.tsv and examples/digits.png

Both hold test scans only. The table has VLMEvalKit's columns index, image, question, answer, category; `image` is a
base64 PNG on the first line about a picture and that line's index on the others. Equal seeds give equal files.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import KINDS, Question, Scans, Scene, ask, draw_scene, load_scans, split_scans

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "qvl_model" / "assets" / "digits" / "benchmark.tsv"
PICTURE = ROOT / "examples" / "digits.png"
COLUMNS = ("index", "image", "question", "answer", "category")
SEED = 2_000_000  # training draws from (seed, step), this from one number: no sequence is shared
PICTURE_SEED = 42790  # reads 3 7 1
PICTURES = 340


def benchmark_scenes(scans: Scans, pictures: int = PICTURES) -> list[tuple[Scene, list[Question]]]:
    """`pictures` scenes of 1, 2, 3, 4, 1, ... test scans, each with one question of every kind that it allows."""
    pool = split_scans(scans.labels)[1]
    rng = np.random.default_rng(SEED)
    scenes = []
    for number in range(pictures):
        scene = draw_scene(rng, scans, pool, 1 + number % 4)
        questions = [question for kind in KINDS if (question := ask(rng, scene, kind)) is not None]
        scenes.append((scene, questions))
    return scenes


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_table(path: Path, scenes: list[tuple[Scene, list[Question]]]) -> int:
    """Writes the TSV and returns its number of questions."""
    index = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for scene, questions in scenes:
            first = index
            for question in questions:
                image = base64.b64encode(png(scene.image)).decode() if index == first else str(first)
                writer.writerow((index, image, question.text, question.answer, question.kind))
                index += 1
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    scans = load_scans()
    count = write_table(options.table, benchmark_scenes(scans))
    print(f"{options.table}: {count} questions, {options.table.stat().st_size / 1e6:.2f} MB")
    scene = draw_scene(np.random.default_rng(PICTURE_SEED), scans, split_scans(scans.labels)[1], 3)
    options.picture.write_bytes(png(scene.image))
    print(f"{options.picture}: " + ", ".join(f"{digit.colour} {digit.value}" for digit in scene.digits))


if __name__ == "__main__":
    main()
