"""Scenes of handwritten digits and questions about them.

A scene is an RGB picture, usually ``SIDE x SIDE``, with one to four digits. Each digit is one of scikit-learn's 1797
scans (8 x 8, 17 grey levels, handwriting of the UCI "Optical Recognition of Handwritten Digits" set), resampled to a
random height, slant, angle and stroke weight, painted in one of eight colours over a plain, graded or striped
background. The scans are divided once, by ``split_scans``: pictures of the test split hold only handwriting that
training never saw.

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
_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float64)

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
# Asked in training only: who can find a colour's digit has half of what "which" takes, and yes or no is quickly learnt.
EXERCISES: dict[str, tuple[str, ...]] = {
    "has": (
        "Is there a {n} digit?",
        "Do you see a {n} digit?",
        "Is there a {n} digit in the picture?",
        "Does the picture show a {n} digit?",
    ),
}

MIN_HEIGHT, MAX_HEIGHT = 28, 46  # pixels
MIN_CENTRE_GAP = 19  # pixels between the centres of neighbours, so that "left to right" has one answer
LARGEST_RATIO = 1.3  # "largest" is asked only where the tallest digit beats the next by this factor
MIN_CONTRAST = 130.0  # RGB distance of a digit's colour from both background colours
_MARGIN = 2  # empty scan pixels around each scan, so that a turned or slanted one is not cut
_LAYOUTS_AT_ONCE = 96


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
    """A picture, (H, W, 3) uint8; how much of each pixel is ink, (H, W) in [0, 1]; the digits from left to right."""

    image: np.ndarray
    ink: np.ndarray
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scans:
    """``images`` (N, 12, 12) float32 in [0, 1], the 8 x 8 scans with a margin, and ``labels`` (N,), both in
    scikit-learn's order."""

    images: np.ndarray
    labels: np.ndarray


def load_scans() -> Scans:
    """scikit-learn's digits set: 1797 scans, part of the package, nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.pad(digits.images / 16.0, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    return Scans(images.astype(np.float32), digits.target.astype(np.int64))


def split_scans(labels: np.ndarray, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and test scans: a fifth of each class, drawn with ``seed``, is for testing."""
    rng = np.random.default_rng(seed)
    test = []
    for value in range(10):
        members = rng.permutation(np.flatnonzero(labels == value))
        test.append(members[: round(TEST_SHARE * len(members))])
    test_indices = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_indices), test_indices


def draw_scene(
    rng: np.random.Generator, scans: Scans, pool: np.ndarray, count: int, size: tuple[int, int] = (SIDE, SIDE)
) -> Scene:
    """A scene of ``count`` digits and of ``size`` (height, width), whose scans come from the indices ``pool``."""
    image, back_colours = _background(rng, size)
    ink = np.zeros(size, np.float32)
    distance = np.linalg.norm(_RGB[:, None] - np.stack(back_colours), axis=-1).min(1)
    visible = np.flatnonzero(distance > MIN_CONTRAST)
    digits = []
    for x, y, width, height in _layout(rng, count, size):
        scan = int(pool[rng.integers(len(pool))])
        colour = int(visible[rng.integers(len(visible))])
        cover = _stretch(rng, scans.images[scan], width, height)
        paint = np.clip(_RGB[colour] + rng.normal(0, 7, 3), 0, 255).astype(np.float32)
        _paint(image, ink, cover, paint, (x, y))
        digits.append(Digit(int(scans.labels[scan]), scan, _NAMES[colour], x, y, height))
    return Scene(np.rint(image).astype(np.uint8), ink, tuple(digits))


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """A question of ``kind`` with exactly one right answer, or None where the scene allows none."""
    values = Counter(digit.value for digit in scene.digits)
    fields = {"c": ("colour", "color")[rng.integers(2)]}
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
        candidates = [value for value in range(10) if (value in values) == present]
        fields["v"] = str(candidates[rng.integers(len(candidates))])
        answer = "yes" if present else "no"
    elif kind == "has":
        present = rng.random() < 0.5
        there = {digit.colour for digit in scene.digits}
        candidates = [name for name in _NAMES if (name in there) == present]
        fields["n"] = candidates[rng.integers(len(candidates))]
        answer = "yes" if present else "no"
    elif kind == "place":
        fields["s"] = ("left", "right")[rng.integers(2)]
        answer = str(scene.digits[0 if fields["s"] == "left" else -1].value)
    else:
        colours = Counter(digit.colour for digit in scene.digits)
        single = [d for d in scene.digits if (values[d.value] if kind == "colour" else colours[d.colour]) == 1]
        if not single:
            return None
        chosen = single[int(rng.integers(len(single)))]
        fields |= {"v": str(chosen.value), "n": chosen.colour}
        answer = chosen.colour if kind == "colour" else str(chosen.value)
    return Question(
        kind, (WORDINGS | EXERCISES)[kind][rng.integers(len((WORDINGS | EXERCISES)[kind]))].format(**fields), answer
    )


def _background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(H, W, 3) float picture that runs between two near colours: plain, graded along an angle, or striped."""
    first = np.clip(rng.uniform(0, 255) + rng.normal(0, 22, 3), 0, 255)
    second = np.clip(first + rng.normal(0, 22, 3), 0, 255)
    angle = rng.uniform(0, np.pi)
    style = rng.integers(3)
    if style == 0:
        return np.broadcast_to(first.astype(np.float32), (*size, 3)).copy(), (first, first)
    rows, columns = (np.arange(length, dtype=np.float32) / SIDE for length in size)
    ramp = rows[:, None] * np.float32(np.sin(angle)) + columns[None, :] * np.float32(np.cos(angle))
    if style == 1:
        blend = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    else:
        blend = np.floor(ramp * rng.integers(4, 12)) % 2
    return first.astype(np.float32) + blend[..., None] * (second - first).astype(np.float32), (first, second)


def _layout(rng: np.random.Generator, count: int, size: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """``count`` boxes (centre x, centre y, width, height) that do not overlap, from left to right.

    Neighbours' centres are at least MIN_CENTRE_GAP apart by construction (sorted draws from what the gaps leave over);
    overlap is left to rejection, many layouts at once. Crowded scenes get smaller digits with every round that fails.
    """
    ceiling = min(MAX_HEIGHT, *size)
    first, second = np.triu_indices(count, 1)
    gaps = MIN_CENTRE_GAP * np.arange(count)
    while True:
        draws = rng.random((4, _LAYOUTS_AT_ONCE, count))
        heights = MIN_HEIGHT + draws[0] * (ceiling - MIN_HEIGHT)
        widths = heights * (0.75 + 0.25 * draws[1])
        margin = widths.max(1, keepdims=True)
        room = size[1] - margin - gaps[-1]
        xs = margin / 2 + np.sort(draws[2], axis=1) * room + gaps
        ys = heights / 2 + draws[3] * (size[0] - heights)
        apart = abs(xs[:, first] - xs[:, second]) > (widths[:, first] + widths[:, second]) / 2
        apart |= abs(ys[:, first] - ys[:, second]) > (heights[:, first] + heights[:, second]) / 2
        good = np.flatnonzero(apart.all(1) & (room[:, 0] >= 0))
        if len(good):
            boxes = np.stack([part[good[0]] for part in (xs, ys, widths, heights)], axis=1)
            return [tuple(box) for box in boxes.tolist()]
        ceiling = max(ceiling * 0.9, MIN_HEIGHT * 1.2)


def _stretch(rng: np.random.Generator, scan: np.ndarray, width: float, height: float) -> np.ndarray:
    """Ink in [0, 1] of a scan resampled to about ``height x width`` pixels, turned and slanted a little.

    The inverse map sends a pixel of the result to the padded scan; bicubic resampling, then a soft threshold at a
    random level, which is the pen's weight.
    """
    rows, columns = int(np.ceil(height)) + 4, int(np.ceil(width)) + 4
    angle, slant = rng.normal(0, 0.09, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ np.array([[1, slant], [0, 1]])
    inverse = np.array([[8 / width], [8 / height]]) * turn
    offset = scan.shape[0] / 2 - inverse @ np.array([columns / 2, rows / 2])
    data = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
    source = Image.fromarray(scan)
    grey = np.asarray(source.transform((columns, rows), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC))
    level, softness = rng.uniform(0.28, 0.5), rng.uniform(0.25, 0.45)
    return np.clip((grey - np.float32(level)) / np.float32(softness) + np.float32(0.5), 0, 1)


def _paint(
    image: np.ndarray, ink: np.ndarray, cover: np.ndarray, colour: np.ndarray, centre: tuple[float, float]
) -> None:
    """Lay ``cover`` in ``colour`` over ``image`` and into ``ink``, in place, cut at the border."""
    top, left = round(centre[1] - cover.shape[0] / 2), round(centre[0] - cover.shape[1] / 2)
    bottom, right = min(top + cover.shape[0], image.shape[0]), min(left + cover.shape[1], image.shape[1])
    row, column = max(top, 0), max(left, 0)
    cover = cover[row - top : bottom - top, column - left : right - left]
    ink[row:bottom, column:right] = np.maximum(ink[row:bottom, column:right], cover)
    part = image[row:bottom, column:right]
    part += cover[..., None] * (colour - part)
