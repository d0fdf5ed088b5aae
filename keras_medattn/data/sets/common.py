"""What the adapters of the public sets share: where a set's folder is, which files are its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keras_medattn.data.manifest import SUFFIXES, Manifest, ManifestError
from keras_medattn.files import written_aside

Progress = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class Found:
    """What lies in the folder of a public set.

    Attributes:
        manifest: the images as distributed.
        notes: what a reader must know: files left out, decisions, another number of images than published.
        problems: what is missing or contradicts itself; such a set is not loaded.
    """

    manifest: Manifest
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edit:
    """Pixels that a protocol changes before any model sees them.

    Attributes:
        folder: where the changed images are written, below the `out` of `load`.
        change: `(manifest, place) -> (h, w, 3)` uint8.
    """

    folder: str
    change: Callable[[Manifest, int], np.ndarray]


@dataclass(frozen=True)
class PublicSet:
    """A public set: how to read it, how many images it has when whole, what its protocol edits."""

    read: Callable[[Path], Found]
    images: int
    edit: Edit | None = None


def home(root: Path, parts: Sequence[str], holds: Sequence[str]) -> Path:
    """The folder that holds these folders: `root/parts...`, or any deeper start of it that the user gave.

    Raises:
        ManifestError: names the folders that are missing.
    """
    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder")
    places = [root.joinpath(*parts[start:]) for start in range(len(parts) + 1)]
    missing = {place: [name for name in holds if not (place / name).is_dir()] for place in places}
    best = min(places, key=lambda place: len(missing[place]))
    if missing[best]:
        where = best if len(missing[best]) < len(holds) else places[0]
        raise ManifestError(
            f"{where}: the folders {missing[where]} are missing. The set as distributed holds "
            f"{'/'.join([*parts, ''])}{{{', '.join(holds)}}}: unpack it whole, and pass the folder above"
        )
    return best


def images(folder: Path, name: re.Pattern[str]) -> tuple[list[tuple[Path, re.Match[str]]], list[Path]]:
    """The image files below a folder by the set's naming rule, and those whose names break it."""
    known, other = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        match = name.fullmatch(path.name)
        known.append((path, match)) if match else other.append(path)
    return known, other


def counted(found: int, whole: int, ignored: Sequence[Path] = ()) -> list[str]:
    """Notes on how many images there are, and which files were left out for their names."""
    notes = [] if found == whole else [f"{found} images; the set as published has {whole}"]
    if ignored:
        notes.append(f"{len(ignored)} images are ignored, their names are not the set's: {some(ignored)}")
    return notes


def some(values: Iterable[object], most: int = 5) -> str:
    """The first of many, and how many more."""
    listed = [str(value) for value in values]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def relative(paths: Iterable[Path], root: Path) -> tuple[str, ...]:
    """Names as a manifest holds them."""
    return tuple(path.relative_to(root).as_posix() for path in paths)


def edited(manifest: Manifest, edit: Edit, out: Path, progress: Progress) -> Manifest:
    """Write the changed images as PNG below `out`, those that are not there yet, and answer their table."""
    from PIL import Image

    folder = out / edit.folder
    names = tuple(str(Path(name).with_suffix(".png")) for name in manifest.names)

    def write(place: int) -> None:
        path = folder / names[place]
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            Image.fromarray(edit.change(manifest, place)).save(aside)

    with ThreadPoolExecutor() as pool:
        for _ in progress(pool.map(write, range(len(manifest))), len(manifest)):
            pass
    return replace(manifest, root=folder, names=names)


def shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """Mean over the exact area of each of `size x size` cells, rounded: what OpenCV calls INTER_AREA.

    Args:
        pixels: `(H, W, C)` uint8.
        size: rows and columns of the answer.

    Example:
        >>> shrink(np.array([[[0], [90], [30]]] * 3, np.uint8), 2)[0, :, 0]  # (0 + 90/2) / 1.5
        array([30, 50], dtype=uint8)
    """
    import tensorflow as tf

    resized = tf.image.resize(pixels, (size, size), "area").numpy()
    return np.rint(resized).astype(np.uint8)
