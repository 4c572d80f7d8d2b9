"""Scenes of handwritten digits and questions about them.

A scene is a ``SIDE x SIDE`` RGB picture with one to four digits. Each digit is one of scikit-learn's 1797 scans (8 x 8,
17 grey levels, handwriting of the UCI "Optical Recognition of Handwritten Digits" set), resampled to a random height,
slant, angle and stroke weight, painted in one of eight colours over a plain, graded or striped background. The scans are
divided once, by ``split_scans``: pictures of the test split hold only handwriting that training never saw.

Everything is drawn from a ``numpy.random.Generator``: equal seeds give equal pictures and questions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 96
SPLIT_SEED = 0
TEST_SHARE = 0.2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 42, 38),
    "orange": (245, 140, 25),
    "yellow": (245, 222, 50),
    "green": (45, 165, 70),
    "blue": (50, 90, 225),
    "purple": (150, 60, 185),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}

# "{c}" is colour/color; "{v}" a digit; "{n}" a colour's name. Every wording is used in both splits.
WORDINGS: dict[str, tuple[str, ...]] = {
    "read": (
        "Read the digits from left to right.",
        "Read the digits.",
        "Which digits are in the picture, from left to right?",
        "What digits do you see?",
        "What number is written here?",
        "List the digits from left to right.",
    ),
    "count": (
        "How many digits are there?",
        "How many digits are in the picture?",
        "How many digits do you see?",
        "Count the digits.",
        "What is the number of digits?",
    ),
    "colour": (
        "What {c} is the {v}?",
        "Which {c} is the {v}?",
        "What is the {c} of the {v}?",
        "What {c} is the digit {v}?",
        "Name the {c} of the {v}.",
    ),
    "which": (
        "Which digit is {n}?",
        "What digit is {n}?",
        "What is the {n} digit?",
        "Read the {n} digit.",
    ),
    "largest": (
        "Which digit is the largest?",
        "Which is largest?",
        "What is the largest digit?",
        "Which digit is the biggest?",
        "Which digit is drawn largest?",
    ),
    "exists": (
        "Is there a {v}?",
        "Is there a {v} in the picture?",
        "Do you see a {v}?",
        "Does the picture show a {v}?",
    ),
    "place": (
        "Which digit is on the {s}?",
        "What is the {s}most digit?",
        "Which digit is furthest to the {s}?",
    ),
}
KINDS = tuple(WORDINGS)

MIN_HEIGHT, MAX_HEIGHT = 20, 46  # pixels, for SIDE = 96
MIN_CENTRE_GAP = 11  # pixels between the centres of neighbours, so that "left to right" has one answer
LARGEST_RATIO = 1.25  # "largest" is asked only where the tallest digit beats the next by this factor
MIN_CONTRAST = 115.0  # RGB distance of a digit's colour from both background colours


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, the scan it shows, and where it stands (centre and height in pixels)."""

    value: int
    scan: int
    colour: str
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Scene:
    """A picture, (SIDE, SIDE, 3) uint8, and its digits from left to right."""

    image: np.ndarray
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scans:
    """``images`` (N, 8, 8) float32 in [0, 1] and ``labels`` (N,), both indexed by scikit-learn's own numbering."""

    images: np.ndarray
    labels: np.ndarray


def load_scans() -> Scans:
    """scikit-learn's digits set: 1797 scans, part of the package, nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Scans((digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64))


def split_scans(labels: np.ndarray, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and test scans: a fifth of each class, drawn with ``seed``, is for testing."""
    rng = np.random.default_rng(seed)
    test = []
    for value in range(10):
        members = rng.permutation(np.flatnonzero(labels == value))
        test.append(members[: round(TEST_SHARE * len(members))])
    test_indices = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_indices), test_indices


def draw_scene(rng: np.random.Generator, scans: Scans, pool: np.ndarray, count: int) -> Scene:
    """A scene of ``count`` digits whose scans come from the indices ``pool``."""
    image, back_colours = _background(rng)
    names = [
        name
        for name, rgb in COLOURS.items()
        if min(np.linalg.norm(np.subtract(rgb, back)) for back in back_colours) > MIN_CONTRAST
    ]
    digits = []
    for x, y, width, height in _layout(rng, count):
        scan = int(rng.choice(pool))
        colour = str(rng.choice(names))
        ink = _stretch(rng, scans.images[scan], width, height)
        paint = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 7, 3), 0, 255)
        _paint(image, ink, paint, x, y)
        digits.append(Digit(int(scans.labels[scan]), scan, colour, x, y, height))
    return Scene(np.rint(image).astype(np.uint8), tuple(digits))


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """A question of ``kind`` with exactly one right answer, or None where the scene allows none."""
    values = Counter(digit.value for digit in scene.digits)
    fields = {"c": str(rng.choice(["colour", "color"]))}
    if kind == "read":
        answer = " ".join(str(digit.value) for digit in scene.digits)
    elif kind == "count":
        answer = str(len(scene.digits))
    elif kind == "largest":
        tallest = sorted(scene.digits, key=lambda digit: -digit.height)
        if len(tallest) > 1 and tallest[0].height < LARGEST_RATIO * tallest[1].height:
            return None
        answer = str(tallest[0].value)
    elif kind == "exists":
        present = rng.random() < 0.5
        fields["v"] = str(rng.choice([value for value in range(10) if (value in values) == present]))
        answer = "yes" if present else "no"
    elif kind == "place":
        fields["s"] = str(rng.choice(["left", "right"]))
        answer = str(scene.digits[0 if fields["s"] == "left" else -1].value)
    else:
        colours = Counter(digit.colour for digit in scene.digits)
        single = [d for d in scene.digits if (values[d.value] if kind == "colour" else colours[d.colour]) == 1]
        if not single:
            return None
        chosen = single[rng.integers(len(single))]
        fields |= {"v": str(chosen.value), "n": chosen.colour}
        answer = chosen.colour if kind == "colour" else str(chosen.value)
    return Question(kind, str(rng.choice(WORDINGS[kind])).format(**fields), answer)


def _background(rng: np.random.Generator) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(SIDE, SIDE, 3) float picture that runs between two near colours: plain, graded along an angle, or striped."""
    first = np.clip(rng.uniform(0, 255) + rng.normal(0, 22, 3), 0, 255)
    second = np.clip(first + rng.normal(0, 22, 3), 0, 255)
    angle = rng.uniform(0, np.pi)
    axis = np.arange(SIDE, dtype=np.float64) / SIDE
    ramp = axis[:, None] * np.sin(angle) + axis[None, :] * np.cos(angle)
    style = rng.integers(3)
    if style == 0:
        blend = np.zeros_like(ramp)
    elif style == 1:
        blend = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    else:
        blend = (np.floor(ramp * rng.integers(4, 12)) % 2).astype(np.float64)
    return first + blend[..., None] * (second - first), (first, second)


def _layout(rng: np.random.Generator, count: int) -> list[tuple[float, float, float, float]]:
    """``count`` boxes (centre x, centre y, width, height) that do not overlap, from left to right."""
    ceiling = float(MAX_HEIGHT)
    while True:
        boxes: list[tuple[float, float, float, float]] = []
        for _ in range(count):
            height = rng.uniform(MIN_HEIGHT, ceiling)
            width = height * rng.uniform(0.75, 1.0)
            x = rng.uniform(width / 2, SIDE - width / 2)
            y = rng.uniform(height / 2, SIDE - height / 2)
            boxes.append((x, y, width, height))
        boxes.sort()
        if all(_apart(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]):
            return boxes
        ceiling = max(ceiling * 0.98, MIN_HEIGHT * 1.4)


def _apart(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    return dx >= MIN_CENTRE_GAP and (dx > (a[2] + b[2]) / 2 or dy > (a[3] + b[3]) / 2)


def _stretch(rng: np.random.Generator, scan: np.ndarray, width: float, height: float) -> np.ndarray:
    """Ink in [0, 1] of an 8 x 8 scan resampled to about ``height x width`` pixels, turned and slanted a little.

    The inverse map sends a pixel of the result to the padded scan; bicubic resampling, then a soft threshold at a random
    level, which is the pen's weight.
    """
    rows, columns = int(np.ceil(height)) + 4, int(np.ceil(width)) + 4
    angle, slant = rng.normal(0, 0.09), rng.normal(0, 0.09)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ np.array([[1, slant], [0, 1]])
    inverse = np.diag([8 / width, 8 / height]) @ turn
    offset = np.array([6.0, 6.0]) - inverse @ np.array([columns / 2, rows / 2])
    padded = Image.fromarray(np.pad(scan, 2))
    data = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
    grey = np.asarray(padded.transform((columns, rows), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC))
    level, softness = rng.uniform(0.28, 0.5), rng.uniform(0.25, 0.45)
    return np.clip((grey - level) / softness + 0.5, 0, 1)


def _paint(image: np.ndarray, ink: np.ndarray, colour: np.ndarray, x: float, y: float) -> None:
    """Lay ``ink`` in ``colour`` over ``image`` in place, centred on (x, y) and cut at the border."""
    top, left = round(y - ink.shape[0] / 2), round(x - ink.shape[1] / 2)
    bottom, right = min(top + ink.shape[0], SIDE), min(left + ink.shape[1], SIDE)
    row, column = max(top, 0), max(left, 0)
    cover = ink[row - top : bottom - top, column - left : right - left, None]
    image[row:bottom, column:right] += cover * (colour - image[row:bottom, column:right])
