"""JAFFE: 213 faces of ten women, rated on six emotions (Lyons et al., 1998; zenodo 3451524)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np

from keras_medattn.data import readers
from keras_medattn.data.manifest import Manifest, ManifestError, places
from keras_medattn.data.sets import common

EMOTIONS = ("HAP", "SAD", "SUR", "ANG", "DIS", "FEA")  # the order of the ratings' columns
IMAGES, SIZE = 213, 224
_NAME = re.compile(r"([A-Z]{2})\.([A-Z]{2}\d)\.(\d+)\.tiff?")
_RATING = re.compile(r"\s*(\d+)((?:\s+\d+(?:\.\d+)?){6})\s+([A-Z]{2})[-.]([A-Z]{2}\d)\s*")


def read(root: Path) -> common.Found:
    """Read `KA.AN1.39.tiff` and the ratings, lines `39 1.55 ... KA-AN1` of a text file with `HAP SAD SUR`.

    The label is the emotion of the largest mean rating (Xu et al.); of equal ones the first. The patient is
    the person, the first two letters. A rating belongs to the image of its name, or, where no image has it,
    to the image of its number and pose; images without a rating are left out.
    """
    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder")
    found, ignored = common.images(root, _NAME)
    by_name, by_number = _ratings(root)
    rows, unrated, used, ties, renamed = [], [], set(), 0, []
    for path, match in found:
        key = (match[1], match[2])
        if key not in by_name and (other := by_number.get((match[3], match[2]))) is not None:
            renamed.append(f"{'-'.join(other)} for {path.name}")
            key = other
        if key not in by_name:
            unrated.append(path)
            continue
        used.add(key)
        rating = by_name[key]
        ties += rating.count(max(rating)) > 1
        rows.append((path, match[1], EMOTIONS[rating.index(max(rating))]))
    if not rows:
        raise ManifestError(
            f"{root}: no image KA.AN1.39.tiff has a rating. Put the images and the ratings there"
        )
    absent = ["-".join(key) for key in by_name if key not in used]
    problems = []
    if absent and len(rows) < IMAGES:
        problems.append(f"{len(absent)} rated images are missing: {common.some(absent)}")
    notes = common.counted(len(rows), IMAGES, [*ignored, *unrated])
    if ties:
        notes.append(f"{ties} images have two largest ratings: the first counts")
    if renamed:
        notes.append(
            f"{len(renamed)} ratings are named otherwise, and belong by number: {common.some(renamed)}"
        )
    paths, people, labels = zip(*rows, strict=True)
    names = common.relative(paths, root)
    twice = [name for name, count in Counter(Path(name).name for name in names).items() if count > 1]
    if twice:
        raise ManifestError(f"{root}: images stand in two folders: {common.some(twice)}. Pass one of them")
    manifest = Manifest(root, names, places(labels, EMOTIONS), EMOTIONS, patients=people)
    return common.Found(manifest, tuple(notes), tuple(problems))


def prepared(manifest: Manifest, place: int) -> np.ndarray:
    """The image of a row, by area to 224 x 224 (Xu et al., supplement 1.2)."""
    return common.shrink(readers.read(manifest.paths[place]), SIZE)


def _ratings(root: Path):
    """Ratings by (person, pose), and that key by (number, pose)."""
    tables = [path for path in sorted(root.rglob("*.txt")) if _is_table(path)]
    if len(tables) != 1:
        raise ManifestError(
            f"{root}: expected one text file with the semantic ratings ({' '.join(EMOTIONS)}), as the set's "
            f"README_FIRST.txt. Received: {[str(path) for path in tables]}"
        )
    by_name, by_number = {}, {}
    for line in tables[0].read_text(encoding="latin-1").splitlines():
        if match := _RATING.fullmatch(line):  # rows of the second study, without fear, have five ratings
            key = (match[3], match[4])
            by_name[key] = [float(value) for value in match[2].split()]
            by_number[match[1], match[4]] = key
    if not by_name:
        raise ManifestError(f"{tables[0]}: no rows such as '39 1.55 1.71 1.61 4.29 2.71 1.71 KA-AN1'")
    return by_name, by_number


def _is_table(path: Path) -> bool:
    words = " ".join(path.read_text(encoding="latin-1").split())
    return " ".join(EMOTIONS) in words
