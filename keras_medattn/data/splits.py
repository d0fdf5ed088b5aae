"""Splits and folds: stratified by class, grouped by patient, a function of the seed alone."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from keras_medattn.data.manifest import Manifest, ManifestError, patients_on_two_sides


def folds(manifest: Manifest, count: int, seed: int) -> list[np.ndarray]:
    """Deal the images into `count` stratified folds; a patient's images stay together.

    Args:
        manifest: the images.
        count: how many folds.
        seed: the folds are a function of it and of the table.

    Returns:
        The places of each fold's images.

    Raises:
        ManifestError: if a class has fewer images (patients, where known) than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    groups = manifest.groups
    for place, name in enumerate(manifest.class_names):
        mine = manifest.labels == place
        members = int(mine.sum()) if groups is None else len(np.unique(groups[mine]))
        if members < count:
            what = "images" if groups is None else "patients"
            raise ManifestError(
                f"class {name!r} has {members} {what}, too few for {count} folds. Use fewer folds, more data"
            )
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        count, shuffle=True, random_state=seed
    )
    return [held for _, held in splitter.split(manifest.labels, manifest.labels, groups)]


def with_splits(manifest: Manifest, seed: int, val: float = 0.15, test: float = 0.15) -> Manifest:
    """Give each image a side: the data's own splits where it has them, else stratified ones.

    A set with its own `train` and `test` but no `val` gets a validation side out of `train`.

    Raises:
        ManifestError: for a patient on two sides, or a set without training images.
    """
    if manifest.splits is None:
        sides = np.full(len(manifest), "train", object)
        sides[hold_out(manifest, test, seed)] = "test"
    else:
        sides = np.array(manifest.splits, object)
    return _with_validation(manifest, sides, seed, val)


def fold_splits(manifest: Manifest, count: int, fold: int, seed: int, val: float = 0.15) -> Manifest:
    """One fold as the test side, a stratified share of the others as validation.

    A set that gives folds of its own keeps them; the seed then only draws the validation side, unless it has
    one.

    Raises:
        ManifestError: if the data gives another number of folds; for a patient on two sides.
    """
    if manifest.folds is None:
        sides = np.full(len(manifest), "train", object)
        sides[folds(manifest, count, seed)[fold]] = "test"
    elif len(manifest.folds) == count:
        sides = np.array(manifest.folds[fold], object)
    else:
        raise ManifestError(
            f"{manifest.root}: the data gives {len(manifest.folds)} folds of its own: use as many. "
            f"Received: {count}"
        )
    return _with_validation(manifest, sides, seed, val)


def _with_validation(manifest: Manifest, sides: np.ndarray, seed: int, val: float) -> Manifest:
    if "val" not in sides:
        train = np.flatnonzero(sides == "train")
        sides[train[hold_out(manifest.take(train), val, seed + 1)]] = "val"
    result = replace(manifest, splits=tuple(sides))
    check_sides(result)
    return result


def hold_out(manifest: Manifest, share: float, seed: int) -> np.ndarray:
    """Places of about `share` of the images, stratified and by patient."""
    if share <= 0:
        return np.array([], int)
    return folds(manifest, max(2, round(1 / share)), seed)[0]


def check_sides(manifest: Manifest) -> None:
    """Refuse a table in which a patient stands on two sides, or nothing is left to train on."""
    both = patients_on_two_sides(manifest)
    if both:
        raise ManifestError(
            f"{len(both)} patients stand in more than one split, so the figures would be too good: "
            f"{', '.join(both[:20])}. Move each to one side, or leave the split column out"
        )
    for side in ("train", "val"):
        if side not in (manifest.splits or ()):
            raise ManifestError(f"{manifest.root}: no images in the split {side!r}")


def write(manifest: Manifest, path: Path) -> None:
    """Write the table with its splits, as a CSV that `manifest.load` reads beside the images."""
    columns = {"path": manifest.names, "label": [manifest.class_names[i] for i in manifest.labels]}
    if manifest.patients is not None:
        columns["patient"] = manifest.patients
    if manifest.splits is not None:
        columns["split"] = manifest.splits
    columns |= {f"fold{i + 1}": sides for i, sides in enumerate(manifest.folds or ())} | manifest.columns
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
