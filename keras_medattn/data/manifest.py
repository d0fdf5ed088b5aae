"""Which images there are, with label, patient and split: from a folder a class, or from a CSV."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


class ManifestError(ValueError):
    """The data's table or folder is not as it must be; the message lists every fault found."""


@dataclass(frozen=True)
class Manifest:
    """Images with their labels.

    Attributes:
        root: the folder that `names` are relative to.
        names: one a image, as given; also its id in every table that is written.
        labels: `(N,)` int, places in `class_names`.
        class_names: the classes in order; of two, the second is the positive one.
        patients: one a image, or None where the data names none.
        splits: `train`, `val` or `test` for each image, or None.
    """

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    patients: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    @property
    def groups(self) -> np.ndarray | None:
        """`(N,)` the patients as an array, or None."""
        return None if self.patients is None else np.asarray(self.patients)

    def take(self, indices: Sequence[int] | np.ndarray) -> Manifest:
        """The same table with only these rows, in this order."""

        def pick(values):
            return None if values is None else tuple(values[i] for i in indices)

        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            labels=self.labels[np.asarray(indices, int)],
            patients=pick(self.patients),
            splits=pick(self.splits),
        )

    def split(self, name: str) -> Manifest:
        """The rows of one split."""
        if self.splits is None:
            raise ManifestError(f"{self.root}: the data has no splits, so none is called {name!r}")
        return self.take([i for i, split in enumerate(self.splits) if split == name])


def load(data: Path | str, classes: Sequence[str] | None = None) -> Manifest:
    """Read the table of a data set.

    Args:
        data: a CSV with the columns `path,label` and, where known, `patient` and `split` (paths are relative
            to the CSV); or a folder with one folder a class, or with `train`, `val`, `test` folders of them.
        classes: their order; by default sorted, numbers by value.

    Raises:
        ManifestError: names every row or folder at fault.
    """
    data = Path(data)
    if data.is_dir():
        return _from_folder(data, classes)
    if data.is_file():
        return _from_csv(data, classes)
    raise ManifestError(f"{data}: no such folder or CSV file")


def patients_on_two_sides(manifest: Manifest) -> list[str]:
    """Patients whose images stand in more than one split."""
    if manifest.patients is None or manifest.splits is None:
        return []
    sides: dict[str, set[str]] = {}
    for patient, split in zip(manifest.patients, manifest.splits, strict=True):
        sides.setdefault(patient, set()).add(split)
    return sorted(patient for patient, where in sides.items() if len(where) > 1)


def _from_folder(root: Path, classes: Sequence[str] | None) -> Manifest:
    folders = _folders(root)
    if folders and all(folder.name.lower() in SPLITS for folder in folders):
        pairs = [(SPLITS[side.name.lower()], folder) for side in folders for folder in _folders(side)]
    else:
        pairs = [("", folder) for folder in folders]
    rows = [
        (str(path.relative_to(root)), folder.name, side)
        for side, folder in pairs
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix.lower() in SUFFIXES and not _hidden(path.relative_to(folder))
    ]
    if not rows:
        hint = " It holds a manifest.csv: pass that file." if (root / "manifest.csv").is_file() else ""
        raise ManifestError(f"{root}: no images. Expected one folder a class, with images inside.{hint}")
    names, labels, sides = zip(*rows, strict=True)
    order = _class_order(labels, classes, root)
    return Manifest(root, names, _places(labels, order), order, None, sides if sides[0] else None)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(Path(path.name)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_csv(path: Path, classes: Sequence[str] | None) -> Manifest:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: not a CSV in UTF-8 ({error})") from error
    missing = {"path", "label"} - set(columns)
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ManifestError(f"{path}: columns {twice} stand more than once. Received columns: {columns}")
    if missing:
        raise ManifestError(f"{path}: columns {sorted(missing)} are missing. Received columns: {columns}")
    faults = _row_faults(rows, columns)
    if not rows:
        faults.append("no rows")
    if faults:
        shown = "\n  ".join(faults[:50] + ([f"... and {len(faults) - 50} more"] if len(faults) > 50 else []))
        raise ManifestError(f"{path}: {len(faults)} faults:\n  {shown}")
    values = {name: tuple(row[name].strip() for _, row in rows) for name in columns if name}
    order = _class_order(values["label"], classes, path)
    return Manifest(
        path.parent,
        values["path"],
        _places(values["label"], order),
        order,
        values.get("patient"),
        tuple(SPLITS[split.lower()] for split in values["split"]) if "split" in columns else None,
    )


def _row_faults(rows: list[tuple[int, dict[str, str]]], columns: list[str]) -> list[str]:
    faults, seen = [], {}
    for number, row in rows:
        if None in row:
            faults.append(f"line {number}: more fields than columns")
        for column in ("path", "label", "patient"):
            if column in columns and not row[column].strip():
                faults.append(f"line {number}: {column} is empty")
        if "split" in columns and row["split"].strip().lower() not in SPLITS:
            faults.append(f"line {number}: split must be train, val or test. Received: {row['split']!r}")
        name = os.path.normpath(row["path"].strip()) if row["path"].strip() else ""
        if name and seen.setdefault(name, number) != number:
            faults.append(f"line {number}: {name} stands in line {seen[name]} already")
    return faults


def _class_order(labels: Sequence[str], classes: Sequence[str] | None, source: Path) -> tuple[str, ...]:
    found = set(labels)
    if classes is not None:
        unknown = sorted(found - set(classes))
        if unknown:
            raise ManifestError(f"{source}: labels {unknown} are not among the classes {list(classes)}")
        return tuple(classes)
    try:
        order = sorted(sorted(found), key=_number)
    except ValueError:
        order = sorted(found)
    if len(order) < 2:
        raise ManifestError(f"{source}: a classifier needs two classes or more. Received: {order}")
    return tuple(order)


def _number(label: str) -> float:
    if not math.isfinite(number := float(label)):
        raise ValueError(label)  # "nan" and "inf" are names, and nan has no order
    return number


def _places(labels: Sequence[str], order: tuple[str, ...]) -> np.ndarray:
    place = {name: i for i, name in enumerate(order)}
    return np.array([place[label] for label in labels], np.int64)
