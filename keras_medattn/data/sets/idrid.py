"""IDRiD: fundus photographs with grades (Porwal et al., Data 2018), and the protocol of the global mask.

Xu et al., supplement 1.1: columns 260 to 3685 are kept, the rest resized to 224 x 224 by area, and right eyes
flipped so that all look like left ones.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_medattn.data import readers
from keras_medattn.data.manifest import Manifest, ManifestError, places
from keras_medattn.data.sets import common

HOME = "B. Disease Grading"
SIDES = {
    "train": ("a. Training Set", "a. IDRiD_Disease Grading_Training Labels.csv"),
    "test": ("b. Testing Set", "b. IDRiD_Disease Grading_Testing Labels.csv"),
}
COLUMNS = (260, 3685)  # first and last kept
WIDTH, SIZE = 4288, 224
GRADES, RISKS = tuple("01234"), tuple("012")
REFERABLE = ("not referable", "referable")
# places in the label files, from 0, of the right eyes (the supplement's lists)
_TRAIN = """
0 6 8 9 12 13 16 17 19 21 22 24 26 28 30 32 34 36 38 40 45 46 48 51 54 56 58 60 61 63 64 65 66 68 70 73 75
77 79 81 84 86 89 90 93 94 98 99 100 101 102 104 106 109 111 115 117 118 119 123 124 127 128 131 134 135
137 139 141 144 145 147 149 151 152 156 157 158 159 160 163 166 168 170 171 172 174 176 177 181 183 184
186 187 188 190 192 193 194 195 197 200 201 202 204 206 209 211 212 214 216 217 220 222 226 230 234 235
238 241 244 246 248 251 252 253 256 258 259 261 264 268 270 272 273 274 275 276 279 282 284 286 288 289
291 292 299 300 302 304 305 306 307 309 312 314 315 318 320 321 322 325 329 331 333 334 337 340 341 343
345 349 351 356 357 359 361 362 367 369 370 372 373 375 377 378 381 383 384 387 389 392 394 396 398 402
403 405 406 407 408 409 411 412
"""
_TEST = """
1 3 4 5 8 9 14 15 16 19 21 24 26 27 31 34 35 36 38 39 41 42 45 48 50 53 55 57 60 62 63 64 66 67 69 71 76
81 82 84 86 87 90 94 96 100 102
"""
RIGHT = {side: frozenset(map(int, text.split())) for side, text in (("train", _TRAIN), ("test", _TEST))}
_NAME = re.compile(r"IDRiD_(\d{3})\.jpe?g", re.IGNORECASE)


def retinopathy(root: Path) -> common.Found:
    """Grades 0 to 4 of diabetic retinopathy; see `_read`."""
    return _read(root, GRADES, lambda grade, risk: grade)


def edema(root: Path) -> common.Found:
    """Risk 0 to 2 of macular edema; see `_read`."""
    return _read(root, RISKS, lambda grade, risk: risk)


def referable(root: Path) -> common.Found:
    """Retinopathy of grade 2 and more against less; see `_read`."""
    return _read(root, REFERABLE, lambda grade, risk: REFERABLE[int(grade) >= 2])


def prepared(manifest: Manifest, place: int) -> np.ndarray:
    """The image of a row cut, shrunk, and flipped where it is a right eye."""
    path = manifest.paths[place]
    pixels = readers.read(path)
    if pixels.shape[1] != WIDTH:
        raise ManifestError(
            f"{path}: IDRiD's photographs are {WIDTH} columns wide, and the protocol cuts by column. "
            f"Received: {pixels.shape[1]}. Use the images as distributed"
        )
    small = common.shrink(pixels[:, COLUMNS[0] : COLUMNS[1] + 1], SIZE)
    return small[:, ::-1] if manifest.columns["eye"][place] == "right" else small


def flipped(side: str, name: str) -> bool:
    """Whether the paper flips an image, by its name: images are numbered from 1 in the label files' order.

    Example:
        >>> flipped("train", "IDRiD_001.jpg"), flipped("test", "IDRiD_001.jpg")
        (True, False)
    """
    return int(name.rpartition("IDRiD_")[2][:3]) - 1 in RIGHT[side]


def _read(root: Path, classes: tuple[str, ...], label: Callable[[str, str], str]) -> common.Found:
    """Read `B. Disease Grading/{1. Original Images,2. Groundtruths}` with its own train and test side.

    The set names no patients. Columns: `retinopathy`, `edema`, and `eye` by the lists of Xu et al.
    """
    folder = common.home(root, (HOME,), ("1. Original Images", "2. Groundtruths"))
    rows, ignored, problems = [], [], []
    for side, (images, labels) in SIDES.items():
        found, other = common.images(folder / "1. Original Images" / images, _NAME)
        there = {path.stem.lower(): path for path, _ in found}
        table = _labels(folder / "2. Groundtruths" / labels)
        absent = [name for name in table if name.lower() not in there]
        if absent:
            problems.append(
                f"{len(absent)} of {len(table)} images that {labels!r} names are missing in {images!r}: "
                f"{common.some(absent)}"
            )
        listed = {name.lower() for name in table}
        ignored += other + [path for stem, path in there.items() if stem not in listed]
        rows += [
            (there[name.lower()], side, *grades) for name, grades in table.items() if name.lower() in there
        ]
    if not rows:
        raise ManifestError(f"{folder}: none of the images that the label files name is there")
    paths, sides, grades, risks = zip(*rows, strict=True)
    manifest = Manifest(
        root,
        common.relative(paths, root),
        places([label(grade, risk) for grade, risk in zip(grades, risks, strict=True)], classes),
        classes,
        splits=sides,
        columns={
            "retinopathy": grades,
            "edema": risks,
            "eye": tuple(
                "right" if flipped(side, path.name) else "left"
                for path, side in zip(paths, sides, strict=True)
            ),
        },
    )
    return common.Found(manifest, tuple(common.counted(len(rows), 516, ignored)), tuple(problems))


def _labels(path: Path) -> dict[str, tuple[str, str]]:
    """Grade and risk of each image that a label file names."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = [row for row in reader if (row.get("Image name") or "").strip()]
    except OSError as error:
        raise ManifestError(f"{path}: the label file cannot be read ({error.strerror})") from error
    needed = ("Image name", "Retinopathy grade", "Risk of macular edema")
    if not set(needed) <= set(reader.fieldnames):
        raise ManifestError(f"{path}: columns {list(needed)} are needed. Received: {reader.fieldnames}")
    table = {}
    for row in rows:
        name, grade, risk = ((row[column] or "").strip() for column in needed)
        if not re.fullmatch(r"IDRiD_\d{3}", name) or grade not in GRADES or risk not in RISKS:
            raise ManifestError(
                f"{path}: a row needs IDRiD_NNN, a grade 0 to 4 and a risk 0 to 2. "
                f"Received: {[name, grade, risk]}"
            )
        table[name] = (grade, risk)
    return table
