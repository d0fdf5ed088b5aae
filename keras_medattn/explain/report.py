"""Explain images with a trained model: pictures, arrays, places, and localisation where truth is known."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from keras_medattn import metrics
from keras_medattn.data import pipeline, readers
from keras_medattn.data.manifest import Manifest
from keras_medattn.explain import heatmaps, overlays
from keras_medattn.files import write_json, written_aside

TOP = 5  # boxes drawn on a picture


class TruthError(ValueError):
    """Ground truth that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Finding:
    """What a model says of one image, and where it looked.

    Attributes:
        path: the image.
        probabilities: `(C,)`.
        predicted: the class of the highest score.
        argued: `(h, w)` contributions of the primary maps' cells to that class; or the model's own attention.
        size: height and width of the image in pixels.
        boxes: `(K, 4)` in its pixels, those that weigh most first; empty where the model has none, or where
            another class than the predicted one was asked for.
        weights: `(K,)` contributions of the boxes to the class's score.
    """

    path: Path
    probabilities: np.ndarray
    predicted: int
    argued: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    weights: np.ndarray

    def heat(self) -> np.ndarray:
        """`(H, W)` float32 in image coordinates: what argues for the class, 0 and more."""
        resized = overlays.to_image_size(np.maximum(self.argued, 0).astype(np.float32), *self.size)
        return resized


@dataclass(frozen=True)
class Job:
    """Images for one model to explain: a table with labels, or plain files."""

    part: Any
    table: Manifest | None
    images: Sequence[Path] = ()

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(self.images) if self.table is None else self.table.paths


def explain(
    jobs: Sequence[Job],
    out: Path,
    wanted: str | None = None,
    truth: Path | None = None,
    truth_class: str | None = None,
    most: int | None = None,
    progress: Callable = lambda items, *_: items,
    write: Callable[[str], None] = print,
) -> int:
    """Explain images into a folder, and measure localisation where truth is known.

    Args:
        jobs: the models, each with its images.
        out: written: `NAME.overlay.png`, `NAME.heat.npy` in image coordinates, `explanations.json`,
            `sheet.png` of the first four with a truth, and `localisation.json` where truth is given.
        wanted: the class to argue for; by default the predicted one of each image.
        truth: masks or boxes, see `load_truth`.
        truth_class: see `load_truth`.
        most: write pictures and arrays of the first so many images only.
        progress: wraps the loop.
        write: prints a line.

    Returns:
        The exit code.
    """
    class_names = jobs[0].part.manifest.class_names
    if wanted is not None and wanted not in class_names:
        raise ValueError(f"--class must be one of {list(class_names)}. Received: {wanted!r}")
    paths = [path for job in jobs for path in job.paths]
    truths = [None] * len(paths) if truth is None else load_truth(truth, paths, truth_class)
    index = None if wanted is None else class_names.index(wanted)
    found = [
        one
        for job in jobs
        for one in progress(
            findings(job.part.model(), job.part.recipe, job.paths, index), len(job.paths), "explaining"
        )
    ]
    out.mkdir(parents=True, exist_ok=True)
    window = jobs[0].part.recipe.data.window or None
    shown = found[: len(found) if most is None else most]
    records = [
        write_one(one, class_names, out, f"{place:04d}-{one.path.stem}", window)
        for place, one in enumerate(progress(shown, len(shown), "writing pictures"))
    ]
    write_json(records, out / "explanations.json")
    marked = [place for place, one in enumerate(truths) if one is not None] or list(range(len(found)))
    sheet(
        [found[i] for i in marked[:4]],
        [truths[i] for i in marked[:4]],
        class_names,
        out / "sheet.png",
        window,
    )
    write(f"wrote {len(records)} overlays and arrays, explanations.json and sheet.png in {out}")
    tables = [job.table for job in jobs]
    if truth is not None and all(table is not None for table in tables):
        _report_localisation(found, truths, tables, out, write)
    elif truth is not None:
        write("localisation is measured on labelled images only: use --split")
    return 0


def _report_localisation(found, truths, tables, out: Path, write: Callable[[str], None]) -> None:
    labels = np.concatenate([table.labels for table in tables])
    known = all(table.patients is not None for table in tables)
    groups = [patient for table in tables for patient in table.patients] if known else None
    figures = localisation(found, truths, labels, groups)
    if figures is None:
        write("no true positive has a truth: nothing to measure localisation on")
        return
    write(f"localisation on true positives. {figures}")
    for name, interval in figures.figures.items():
        write(f"  {name:<16} {interval}")
    plain = {
        name: {"value": one.value, "low": one.low, "high": one.high} for name, one in figures.figures.items()
    }
    write_json({"rests_on": str(figures), "figures": plain}, out / "localisation.json")


def findings(
    model: Any, recipe: Any, paths: Iterable[Path], class_index: int | None = None
) -> Iterable[Finding]:
    """Explain images one after another.

    Args:
        model: a trained model.
        recipe: the recipe of its run, for image size and intensity window.
        paths: the image files.
        class_index: the class to argue for; by default the predicted one of each image.
    """
    settings = recipe.data

    @tf.function(reduce_retracing=True)
    def look(images, classes):
        return heatmaps.evidence(model, images, classes if class_index is not None else None)

    classes = tf.constant([class_index or 0], tf.int64)
    for path in paths:
        original = readers.read(path, settings.window or None, settings.max_pixels)
        sized = pipeline.size_pixels(original, settings.image_size)
        found = {key: value.numpy()[0] for key, value in look(tf.constant(sized[None]), classes).items()}
        size = original.shape[:2]
        scale = np.tile(np.array(size[::-1]) / np.array(settings.image_size[::-1]), 2)  # x, y, x, y
        predicted = int(found["scores"].argmax())
        if class_index not in (None, predicted):  # the boxes argue for the predicted class, not for this one
            found = {key: value for key, value in found.items() if key not in ("boxes", "weights")}
        boxes, weights = found.get("boxes", np.zeros((0, 4))), found.get("weights", np.zeros(0))
        real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # a slot without an instance is no box
        yield Finding(
            Path(path),
            tf.nn.softmax(found["scores"]).numpy(),
            predicted,
            found["contributions"],
            (int(size[0]), int(size[1])),
            boxes[real] * scale,
            weights[real],
        )


def write_one(finding: Finding, class_names: Sequence[str], folder: Path, name: str, window=None) -> dict:
    """Write one image's overlay PNG, heat array and record.

    Returns:
        The record: prediction, files, boxes and weights.
    """
    image = readers.read(finding.path, window)
    heat = finding.heat()
    picture = overlays.overlay(image, finding.argued)
    overlay_path, heat_path = folder / f"{name}.overlay.png", folder / f"{name}.heat.npy"
    overlays.save_png(overlays.draw_boxes(picture, finding.boxes[:TOP], overlays.FOUND), overlay_path)
    with written_aside(heat_path) as aside:
        np.save(aside, heat)
    return {
        "image": str(finding.path),
        "predicted": class_names[finding.predicted],
        "probabilities": {
            key: float(value) for key, value in zip(class_names, finding.probabilities, strict=True)
        },
        "overlay": str(overlay_path),
        "heat": str(heat_path),
        "boxes": finding.boxes[:20].round(1).tolist(),
        "weights": finding.weights[:20].tolist(),
    }


def load_truth(source: Path, paths: Sequence[Path], kind: str | None = None) -> list[np.ndarray | None]:
    """Read ground truth for images, for measuring localisation only.

    Args:
        source: a folder of masks named as the images (`NAME.png`, non-zero is inside), or a CSV with the
            columns `path,xmin,ymin,xmax,ymax` and perhaps `class`; paths end as the images' do.
        paths: the images.
        kind: of a CSV with a `class` column, the class to take; by default all.

    Returns:
        For each image a mask `(H, W)` bool, boxes `(K, 4)`, or None where nothing is marked.

    Raises:
        TruthError: the source is neither, lacks a column, or marks none of the images.
    """
    if source.is_dir():
        masks = {path.stem: path for path in sorted(source.glob("*.png"))}
        truths = [_mask(masks[path.stem]) if path.stem in masks else None for path in paths]
    elif source.is_file():
        truths = _boxes(source, paths, kind)
    else:
        raise TruthError(f"{source}: no such folder of masks or CSV of boxes")
    if all(truth is None for truth in truths):
        raise TruthError(f"{source}: marks none of the {len(paths)} images. Are the names the same?")
    return truths


def localisation(
    found: Sequence[Finding], truths: Sequence[np.ndarray | None], labels: np.ndarray, groups=None
) -> metrics.Bootstrap | None:
    """Figures of localisation on the true positives: predicted and labelled as another class than the first.

    Args:
        found: one a image.
        truths: from `load_truth`; images without any are left out.
        labels: `(N,)` int.
        groups: the patient of each image, or None.

    Returns:
        Figures with intervals and with chance beside them; None when no true positive has a truth.
    """
    chosen = [
        place
        for place, (one, truth) in enumerate(zip(found, truths, strict=True))
        if truth is not None and one.predicted == labels[place] and labels[place] > 0
    ]
    if not chosen:
        return None
    heats = (found[place].heat() for place in chosen)
    marked = (np.asarray(truths[place]) for place in chosen)
    return metrics.localise(heats, marked, None if groups is None else [groups[i] for i in chosen])


def sheet(found: Sequence[Finding], truths, class_names: Sequence[str], path: Path, window=None) -> None:
    """Write a contact sheet: each image with what is true beside its overlay with what was found."""
    rows = []
    for one, truth in zip(found, truths or [None] * len(found), strict=True):
        probability = one.probabilities[one.predicted]
        rows.append(
            overlays.PanelRow(
                readers.read(one.path, window),
                one.argued,
                truth,
                one.boxes[:TOP],
                f"{one.path.name}: {class_names[one.predicted]} ({probability:.2f})",
            )
        )
    overlays.panel(rows, path)


def _mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")) > 0


def _boxes(source: Path, paths: Sequence[Path], kind: str | None) -> list[np.ndarray | None]:
    corners = ("xmin", "ymin", "xmax", "ymax")
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = {"path", *corners} - set(reader.fieldnames or ())
        if missing:
            raise TruthError(
                f"{source}: columns {sorted(missing)} are missing. Received: {reader.fieldnames}"
            )
        boxes: dict[str, list[list[float]]] = {}
        for row in reader:
            if kind is None or row.get("class") == kind:
                boxes.setdefault(Path(row["path"]).name, []).append([float(row[key]) for key in corners])
    return [np.array(boxes[path.name]) if path.name in boxes else None for path in paths]
