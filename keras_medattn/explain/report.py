"""Explain images with a trained model: pictures, arrays, places, and localisation where truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from keras_medattn.data import pipeline, readers
from keras_medattn.data.manifest import NO_PATIENTS, Manifest
from keras_medattn.data.pseudonyms import Pseudonyms
from keras_medattn.explain import figures, heatmaps, overlays, places, stacks
from keras_medattn.explain.truth import load_truth
from keras_medattn.files import write_json, written_aside
from keras_medattn.metrics.localisation import boxes_to_mask

TOP = 5  # boxes drawn on a picture
_KEPT = ("above", "cells", "mask", "initial_mask")  # small: what is needed once all images were explained


@dataclass(frozen=True)
class Finding:
    """What a model says of one image, and where it looked.

    Attributes:
        path: the image.
        probabilities: `(C,)`.
        predicted: the class that is answered: the most probable, or by the threshold.
        argued: `(h, w)` contributions of the primary maps' cells to that class; or the model's own attention.
        size: height and width of the image in pixels.
        boxes: `(K, 4)` in its pixels, those that weigh most first; empty where the model has none, or where
            something else than evidence for the most probable class was asked for.
        weights: `(K,)` contributions of the boxes to the class's score.
        named: what the model's `explain` names of this image.
        side: the longest side at which it is drawn.
        alias: what is written in place of the image's name; empty: its name.
    """

    path: Path
    probabilities: np.ndarray
    predicted: int
    argued: np.ndarray
    size: tuple[int, int]
    boxes: np.ndarray
    weights: np.ndarray
    named: dict[str, np.ndarray] = field(default_factory=dict)
    side: int = overlays.SIDE
    alias: str = ""

    @property
    def drawn(self) -> tuple[int, int]:
        """Height and width of what is drawn of it."""
        return overlays.drawn_size(self.size, self.side)

    @property
    def scale(self) -> np.ndarray:
        """Drawn pixels for one of its pixels, along x, y, x, y."""
        return np.tile(np.array(self.drawn[::-1]) / np.array(self.size[::-1]), 2)

    def heat(self) -> np.ndarray:
        """As large as what is drawn, float32: what argues for the class, 0 and more."""
        return overlays.to_image_size(np.maximum(self.argued, 0).astype(np.float32), *self.drawn)

    def region(self) -> np.ndarray | None:
        """As large as what is drawn, bool: where the model cuts out its instances or patches; or None."""
        if "above" in self.named:  # cells of the attention above its threshold
            cells = Image.fromarray(self.named["above"].astype(np.uint8))
            return np.asarray(cells.resize((self.drawn[1], self.drawn[0]), Image.Resampling.NEAREST)) > 0
        if "cells" in self.named:
            return boxes_to_mask(self.boxes * self.scale, self.drawn)
        return None


@dataclass(frozen=True)
class Job:
    """Images for one model to explain: a table with labels, or plain files.

    `ids` stand for their names; `temperature` and `threshold` are those of the model's calibration.
    """

    part: Any
    table: Manifest | None
    images: Sequence[Path] = ()
    ids: Pseudonyms | None = None
    temperature: float = 1.0
    threshold: float | None = None

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return list(self.images) if self.table is None else self.table.paths

    @property
    def aliases(self) -> list[str]:
        """What is written in place of each image's name; empty strings: the name itself."""
        names = [str(path) for path in self.images] if self.table is None else self.table.names
        return [self.ids(name) if self.ids else "" for name in names]


def explain(
    jobs: Sequence[Job],
    out: Path,
    wanted: str | None = None,
    truth: Path | None = None,
    kinds: Sequence[str] = (),
    most: int | None = None,
    progress: Callable = lambda items, *_: items,
    write: Callable[[str], None] = print,
    side: int = overlays.SIDE,
    sign: int = 1,
) -> int:
    """Explain images into a folder, and measure localisation where truth is known.

    Args:
        jobs: the models, each with its images.
        out: written: `NAME.overlay.png`, `NAME.heat.npy` as large, the pages of `figures.draw`,
            `explanations.json`, `sheet.png` of the first four with a truth, `mask.png` of a model that has
            one mask for all images, and `localisation.json` where truth is given. Of volumes see `stacks`.
        wanted: the class to argue for; by default the predicted one of each image.
        truth: masks or boxes, see `load_truth`.
        kinds: see `load_truth`.
        most: write pictures and arrays of the first so many images only.
        progress: wraps the loop.
        write: prints a line.
        side: longer images are drawn, and localisation on them is measured, with their longest side so long.
        sign: -1 shows what argues against the class.

    Returns:
        The exit code.
    """
    class_names = jobs[0].part.manifest.class_names
    if wanted is not None and wanted not in class_names:
        raise ValueError(f"--class must be one of {list(class_names)}. Received: {wanted!r}")
    if side < 32:
        raise ValueError(f"--side must be 32 pixels or more. Received: {side}")
    index = None if wanted is None else class_names.index(wanted)
    if jobs[0].part.recipe.data.slices:
        if truth is not None:
            raise ValueError("--truth is for images: localisation in volumes is not measured")
        return stacks.explain(jobs, out, index, most, progress, write, sign)
    paths = [path for job in jobs for path in job.paths]
    truths = [None] * len(paths) if truth is None else load_truth(truth, paths, kinds, side)
    most = len(paths) if most is None else most
    found, records = [], []
    for job in jobs:
        model = job.part.model()
        draws = figures.monte_carlo(model)
        settings = (index, side, sign, job.temperature, job.threshold)
        looked = findings(model, job.part.recipe, job.paths, *settings)
        for one, alias in zip(progress(looked, len(job.paths), "explaining"), job.aliases, strict=True):
            one = replace(one, alias=alias)
            if len(records) < most:
                out.mkdir(parents=True, exist_ok=True)
                name = f"{len(records):04d}-{alias or one.path.stem}"
                records.append(write_one(one, draws, job.part.recipe, class_names, out, name))
            found.append(replace(one, named={key: one.named[key] for key in _KEPT if key in one.named}))
    write_json(records, out / "explanations.json")
    marked = [place for place, one in enumerate(truths) if one is not None] or list(range(len(found)))
    data = jobs[0].part.recipe.data
    _sheet([(found[i], truths[i]) for i in marked[:4]], class_names, out / "sheet.png", data)
    masked = _write_mask(found[0], jobs, out / "mask.png", write)
    write(f"wrote {len(records)} overlays and arrays, explanations.json{masked} and sheet.png in {out}")
    tables = [job.table for job in jobs]
    if truth is not None and all(table is not None for table in tables):
        _report_localisation(found, truths, tables, out, write)
    elif truth is not None:
        write("localisation is measured on labelled images only: use --split")
    return 0


def findings(
    model: Any,
    recipe: Any,
    paths: Iterable[Path],
    class_index: int | None = None,
    side: int = overlays.SIDE,
    sign: int = 1,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> Iterable[Finding]:
    """Explain images one after another.

    Args:
        model: a trained model.
        recipe: the recipe of its run, for image size and intensity window.
        paths: the image files.
        class_index: the class to argue for; by default the predicted one of each image.
        side: see `Finding`.
        sign: -1 shows what argues against the class.
        temperature: divides the scores before the softmax.
        threshold: of two classes, the probability from which the second is predicted; None: the likelier is.
    """
    settings = recipe.data

    @tf.function(reduce_retracing=True)
    def look(images, classes):
        return heatmaps.evidence(model, images, classes, sign)

    for path in paths:
        original = readers.read(path, settings.window or None, settings.max_pixels)
        sized = pipeline.size_pixels(original, settings.image_size)
        if settings.scaled_decoding:
            read = settings.image_size, settings.window or None, settings.max_pixels, True
            sized = pipeline.read_sized(path, *read)
        images = tf.constant(sized[None])
        named = look(images, None if class_index is None else tf.constant([class_index], tf.int64))
        probabilities = tf.nn.softmax(named["scores"][0] / temperature).numpy()
        top = int(probabilities.argmax())
        predicted = top if threshold is None else int(probabilities[1] >= threshold)
        wanted = predicted if class_index is None else class_index
        if class_index is None and predicted != top:  # answered is not what the evidence argues for
            named = look(images, tf.constant([predicted], tf.int64))
        named = {key: value.numpy()[0] for key, value in named.items() if not isinstance(value, list)}
        boxes, weights = named.get("boxes", np.zeros((0, 4))), named.get("weights", np.zeros(0))
        # a slot without an instance is no box; and boxes argue for the most probable class, and for no other
        real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (wanted == top and sign > 0)
        yield Finding(
            Path(path),
            probabilities,
            predicted,
            named["contributions"],
            (int(original.shape[0]), int(original.shape[1])),
            boxes[real] * _scale(original.shape, settings.image_size),
            weights[real],
            named,
            side,
        )


def write_one(
    finding: Finding, draws: Callable, recipe: Any, class_names: Sequence[str], folder: Path, name: str
) -> dict:
    """Write one image's overlay, heat array, pages and record.

    Args:
        finding: of the image.
        draws: `figures.monte_carlo` of the model.
        recipe: of its run.
        class_names: in the order of the scores.
        folder: where to write.
        name: begins each file's name.

    Returns:
        The record: prediction, files, boxes and weights.
    """
    image = _read(finding, recipe.data)
    drawn = overlays.overlay(overlays.shrink(image, finding.drawn), finding.argued)
    drawn = overlays.draw_boxes(drawn, finding.boxes[:TOP] * finding.scale, overlays.FOUND)
    files = {"overlay": folder / f"{name}.overlay.png", "heat": folder / f"{name}.heat.npy"}
    overlays.save_png(drawn, files["overlay"])
    with written_aside(files["heat"]) as aside:
        np.save(aside, finding.heat())
    size = recipe.data.image_size
    draw = draws(pipeline.size_pixels(image, size)[None])
    if draw:
        draw["drawn_boxes"] = draw["drawn_boxes"] * _scale(image.shape, size)
    whole = replace(finding, named=finding.named | draw)
    files |= figures.draw(whole, image, _title(finding, class_names), folder, name)
    return {
        "image": finding.alias or str(finding.path),
        "predicted": class_names[finding.predicted],
        "probabilities": {
            key: float(value) for key, value in zip(class_names, finding.probabilities, strict=True)
        },
        **{key: path.name if finding.alias else str(path) for key, path in files.items()},
        "scale": float(finding.scale[0]),  # pixels of overlay and heat for one of the image
        "boxes": finding.boxes[:20].round(1).tolist(),
        "weights": finding.weights[:20].tolist(),
    }


def _report_localisation(found, truths, tables, out: Path, write: Callable[[str], None]) -> None:
    labels = np.concatenate([table.labels for table in tables])
    chosen = places.true_positives(found, truths, labels)
    if not chosen:
        write("no true positive has a truth: nothing to measure localisation on")
        return
    groups = None
    if all(table.patients is not None for table in tables):
        patients = [patient for table in tables for patient in table.patients]
        groups = [patients[place] for place in chosen]
    measured = places.localisation([found[i] for i in chosen], [truths[i] for i in chosen], groups)
    warning = None if groups else NO_PATIENTS
    write(f"localisation on true positives. {measured['heat']}")
    if warning:
        write(f"warning: {warning}")
    report: dict[str, Any] = {"rests_on": str(measured["heat"]), "warning": warning}
    for key, group in (("heat", "figures"), ("region", "region")):
        if key not in measured:
            continue
        if key == "region":
            write("of the region that is cut out:")
        for name, interval in measured[key].figures.items():
            write(f"  {name:<16} {interval}")
        report[group] = {
            name: {"value": one.value, "low": one.low, "high": one.high}
            for name, one in measured[key].figures.items()
        }
    write_json(report, out / "localisation.json")


def _sheet(rows: Sequence[tuple], class_names: Sequence[str], path: Path, data: Any) -> None:
    """Each image with what is true beside its overlay with what was found."""
    panels = []
    for one, truth in rows:
        if truth is not None and truth.dtype != bool:
            truth = truth * one.scale
        elif truth is not None and truth.shape != one.drawn:
            truth = None  # localisation names the file
        panels.append(
            overlays.PanelRow(
                overlays.shrink(_read(one, data), one.drawn),
                one.argued,
                truth,
                one.boxes[:TOP] * one.scale,
                _title(one, class_names),
            )
        )
    overlays.panel(panels, path)


def _write_mask(finding: Finding, jobs: Sequence[Job], path: Path, write: Callable[[str], None]) -> str:
    """The page of a model's one mask, and its raw range; nothing where it has none."""
    if "initial_mask" not in finding.named:
        return ""
    mask, data = finding.named["mask"], jobs[0].part.recipe.data
    images = [
        pipeline.read_sized(one, data.image_size, data.window or None, data.max_pixels, data.scaled_decoding)
        for one in jobs[0].paths[:3]
    ]
    figures.masks(finding.named, images, path)
    first = finding.named["initial_mask"]
    write(
        f"mask: {mask.min():.4g} to {mask.max():.4g}, mean {mask.mean():.4g}; before learning "
        f"{first.min():.4g} to {first.max():.4g}, mean {first.mean():.4g}"
    )
    return f", {path.name}"


def _read(finding: Finding, data: Any) -> np.ndarray:
    return readers.read(finding.path, data.window or None, data.max_pixels)


def _scale(shape: Sequence[int], model_size: Sequence[int]) -> np.ndarray:
    """Pixels of an image `(H, W, ...)` for one of the model's input, along x, y, x, y."""
    return np.tile(np.array(shape[1::-1]) / np.array(model_size[::-1]), 2)


def _title(finding: Finding, class_names: Sequence[str]) -> str:
    probability = finding.probabilities[finding.predicted]
    return f"{finding.alias or finding.path.name}: {class_names[finding.predicted]} ({probability:.2f})"
