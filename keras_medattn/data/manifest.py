"""Which images there are, with label, patient and split: from a folder a class, or from a CSV."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
NO_PATIENTS = "no patients are known: if a patient has several images, this is less sure than it looks"
_FOLD = re.compile(r"fold\d+")
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
        folds: the data's own folds, or None: for each the side of every image.
        columns: what else the data says of each image, by name, say its `magnification`.
    """

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    patients: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None
    folds: tuple[tuple[str, ...], ...] | None = None
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
            folds=None if self.folds is None else tuple(pick(fold) for fold in self.folds),
            columns={name: pick(values) for name, values in self.columns.items()},
        )

    def split(self, name: str) -> Manifest:
        """The rows of one split."""
        if self.splits is None:
            raise ManifestError(f"{self.root}: the data has no splits, so none is called {name!r}")
        return self.take([i for i, split in enumerate(self.splits) if split == name])


def load(data: Path | str, classes: Sequence[str] | None = None) -> Manifest:
    """Read the table of a data set.

    Args:
        data: a CSV with the columns `path,label` and, where known, `patient`, `split` and given folds as
            `fold1`, `fold2`, ... (paths are relative to the CSV; further columns are kept); or a folder with
            one folder a class, or with `train`, `val`, `test` folders of them.
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


def patients_on_two_sides(manifest: Manifest, sides: Sequence[str] | None = None) -> list[str]:
    """Patients whose images stand in more than one split; or on more than one of these `sides` of a fold."""
    sides = manifest.splits if sides is None else sides
    if manifest.patients is None or sides is None:
        return []
    found: dict[str, set[str]] = {}
    for patient, side in zip(manifest.patients, sides, strict=True):
        found.setdefault(patient, set()).add(side)
    return sorted(patient for patient, where in found.items() if len(where) > 1)


def places(labels: Sequence[str], order: Sequence[str]) -> np.ndarray:
    """`(N,)` the place of each label in `order`."""
    place = {name: i for i, name in enumerate(order)}
    return np.array([place[label] for label in labels], np.int64)


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
    return Manifest(root, names, places(labels, order), order, None, sides if sides[0] else None)


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
    folds = [name for name in columns if _FOLD.fullmatch(name)]
    if set(folds) != {f"fold{i + 1}" for i in range(len(folds))}:
        raise ManifestError(f"{path}: given folds are columns fold1, fold2, ... in a row. Received: {folds}")
    sides = [name for name in columns if name == "split" or name in folds]
    faults = _row_faults(rows, columns, sides)
    if not rows:
        faults.append("no rows")
    if faults:
        shown = "\n  ".join(faults[:50] + ([f"... and {len(faults) - 50} more"] if len(faults) > 50 else []))
        raise ManifestError(f"{path}: {len(faults)} faults:\n  {shown}")
    values = {name: tuple(row[name].strip() for _, row in rows) for name in columns if name}
    order = _class_order(values["label"], classes, path)
    given = {name: tuple(SPLITS[side.lower()] for side in values.pop(name)) for name in sides}
    return Manifest(
        path.parent,
        values.pop("path"),
        places(values.pop("label"), order),
        order,
        values.pop("patient", None),
        given.pop("split", None),
        tuple(given[f"fold{i + 1}"] for i in range(len(given))) or None,
        values,
    )


def _row_faults(rows: list[tuple[int, dict[str, str]]], columns: list[str], sides: list[str]) -> list[str]:
    faults, seen = [], {}
    for number, row in rows:
        if None in row:
            faults.append(f"line {number}: more fields than columns")
        for column in ("path", "label", "patient"):
            if column in columns and not row[column].strip():
                faults.append(f"line {number}: {column} is empty")
        for column in sides:
            if row[column].strip().lower() not in SPLITS:
                faults.append(
                    f"line {number}: {column} must be train, val or test. Received: {row[column]!r}"
                )
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
