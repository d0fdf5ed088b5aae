"""Known places on images, masks or boxes: for measuring localisation only, never for training."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from keras_medattn.explain.overlays import SIDE, drawn_size


class TruthError(ValueError):
    """Ground truth that cannot be read; the message names the file."""


def load_truth(
    source: Path, paths: Sequence[Path], kinds: Sequence[str] = (), side: int = SIDE
) -> list[np.ndarray | None]:
    """Read ground truth for images.

    A mask's file is named `[FOLDER_]NAME[_KIND].png`: NAME is the image's name without its suffix, KIND says
    what is marked, and FOLDER stands in the name of the image's folder, in whatever case. So
    `train_IDRiD_007_MA.png` marks `MA` on `a. Training Set/IDRiD_007.jpg`. Of several readings the longest
    NAME counts. An image's masks are united.

    Args:
        source: a folder of masks (non-zero is inside), or a CSV with the columns `path,xmin,ymin,xmax,ymax`
            and perhaps `class`; paths end as the images' do.
        paths: the images.
        kinds: kinds of masks, or of a CSV with a `class` column classes, to take; by default all.
        side: longer masks are shrunk to it, as pictures are: marked is what has anything marked in it.

    Returns:
        For each image a mask bool, as large as what is drawn of the image, boxes `(K, 4)` in the image's
        pixels, or None where nothing is marked.

    Raises:
        TruthError: the source is neither, lacks a column or a kind, fits two images, or marks none.
    """
    if source.is_dir():
        truths = _masks(source, paths, kinds, side)
    elif source.is_file():
        truths = _boxes(source, paths, kinds)
    else:
        raise TruthError(f"{source}: no such folder of masks or CSV of boxes")
    if all(truth is None for truth in truths):
        raise TruthError(f"{source}: marks none of the {len(paths)} images. Are the names the same?")
    return truths


def _masks(folder: Path, paths: Sequence[Path], kinds: Sequence[str], side: int) -> list[np.ndarray | None]:
    by_name: dict[str, set[Path]] = {}
    for path in paths:
        by_name.setdefault(path.stem, set()).add(path)
    files: dict[Path, list[Path]] = {}
    there = set()
    for file in sorted(folder.glob("*.png")):
        for path, kind in _readings(file, by_name):
            there.add(kind)
            if not kinds or kind in kinds:
                files.setdefault(path, []).append(file)
    _all_known(folder, kinds, there)
    return [_united(files[path], side) if path in files else None for path in paths]


def _readings(file: Path, by_name: dict[str, set[Path]]) -> Iterable[tuple[Path, str]]:
    """The image that a mask's name means, and the kind, once; nothing where it means none."""
    words = file.stem.split("_")
    spans = [(first, end) for end in (len(words), len(words) - 1) for first in range(end)]
    for first, end in sorted(spans, key=lambda span: span[0] - span[1]):  # the longest name first
        front = "_".join(words[:first]).lower()
        fits = [p for p in by_name.get("_".join(words[first:end]), ()) if front in p.parent.name.lower()]
        if len(fits) > 1:
            raise TruthError(
                f"{file}: could be of {len(fits)} images, among them {fits[0]} and {fits[1]}. Name it "
                "FOLDER_NAME.png, where FOLDER stands in the name of the image's folder"
            )
        if fits:
            return [(fits[0], "_".join(words[end:]))]
    return []


def _united(files: Sequence[Path], side: int) -> np.ndarray | None:
    masks = [_mask(file, side) for file in files]
    for file, mask in zip(files, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise TruthError(f"{file}: {mask.shape} pixels, but {files[0]} has {masks[0].shape}")
    mask = np.logical_or.reduce(masks)
    return mask if mask.any() else None


def _mask(file: Path, side: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            mask = np.asarray(image.convert("L")) > 0
    except (OSError, Image.DecompressionBombError) as error:
        raise TruthError(f"{file}: cannot be read as a mask ({error})") from error
    size = drawn_size(mask.shape, side)
    if size == mask.shape:
        return mask
    small = np.zeros(size, bool)
    rows, columns = np.nonzero(mask)
    small[rows * size[0] // mask.shape[0], columns * size[1] // mask.shape[1]] = True
    return small


def _boxes(source: Path, paths: Sequence[Path], kinds: Sequence[str]) -> list[np.ndarray | None]:
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes: dict[str, list[list[float]]] = {}
    there = set()
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"path", *corners} - set(reader.fieldnames or ())
        if missing:
            raise TruthError(
                f"{source}: columns {sorted(missing)} are missing. Received: {reader.fieldnames}"
            )
        for row in reader:
            there.add(row.get("class", ""))
            if not kinds or row.get("class") in kinds:
                boxes.setdefault(Path(row["path"]).name, []).append([float(row[key]) for key in corners])
    _all_known(source, kinds, there)
    return [np.array(boxes[path.name]) if path.name in boxes else None for path in paths]


def _all_known(source: Path, kinds: Sequence[str], there: set[str]) -> None:
    unknown = sorted(set(kinds) - there)
    if unknown and there:
        has = ", ".join(sorted(there - {""}))
        raise TruthError(f"{source}: marks no {', '.join(unknown)} on these images. It has: {has}")
