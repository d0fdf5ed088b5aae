"""Volumes: first the slices that argue for a class, each scored alone; then one heatmap for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from scipy.special import softmax

from keras_medattn.data import pipeline, volumes
from keras_medattn.explain import heatmaps, overlays
from keras_medattn.explain.pages import Cell, Row, page
from keras_medattn.files import write_json, written_aside

if TYPE_CHECKING:
    from keras_medattn.explain.report import Job

_PANELS, _COLUMNS, _BOXES = 40, 5, 5


@dataclass(frozen=True)
class Stack:
    """What a model says of one volume, and where it looked.

    Attributes:
        path: the volume.
        pixels: its slices that the model reads, uint8 `(S, H, W, 3)`.
        first: the number of the first of them in the volume, from 0.
        probabilities: `(C,)`.
        predicted: the class that is answered: the most probable, or by the threshold.
        by_slice: `(S, C)` probabilities of each slice alone.
        argued: for each slice that argues for the class, the most convinced first, `(h, w)` contributions.
        boxes: `(K, 4)` in pixels of the slices, those that weigh most first; empty where the model has none,
            or where something else than evidence for the most probable class was asked for.
        slices: `(K,)` the slice that each box lies on, an index of `pixels`.
        alias: what is written in place of the volume's name; empty: its name.
    """

    path: Path
    pixels: np.ndarray
    first: int
    probabilities: np.ndarray
    predicted: int
    by_slice: np.ndarray
    argued: dict[int, np.ndarray]
    boxes: np.ndarray
    slices: np.ndarray
    alias: str = ""

    def boxes_on(self, place: int) -> np.ndarray:
        """The boxes that weigh most of one slice."""
        return self.boxes[self.slices == place][:_BOXES]

    def heated(self, place: int) -> np.ndarray:
        """A slice with its heat; as it is where it does not argue for the class."""
        image = self.pixels[place]
        return overlays.overlay(image, self.argued[place]) if place in self.argued else image


def explain(
    jobs: Sequence[Job],
    out: Path,
    index: int | None,
    most: int | None,
    progress: Callable,
    write: Callable[[str], None],
    sign: int,
) -> int:
    """As `report.explain`, of volumes.

    Written are `NAME.overlay.png` of the slice that argues most, `NAME.slices.png` with a picture a slice,
    `NAME.heat.npy`, `(S, h, w)` in cells of the maps, 0 where a slice does not argue for the class,
    `explanations.json`, and `sheet.png` of the first four volumes.
    """
    class_names = jobs[0].part.manifest.class_names
    paths = sum(len(job.paths) for job in jobs)
    records, panels = [], []
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        settings = (index, sign, job.temperature, job.threshold)
        looked = stacks(job.part.model(), job.part.recipe, job.paths, *settings)
        for one, alias in zip(progress(looked, len(job.paths), "explaining"), job.aliases, strict=True):
            one = replace(one, alias=alias)
            if len(records) < (paths if most is None else most):
                name = f"{len(records):04d}-{alias or one.path.stem}"
                records.append(_write_one(one, index, class_names, out, name))
            if len(panels) < 4:
                place, heat = next(iter(one.argued.items()))
                title = f"{_title(one, class_names)}, slice {one.first + place + 1}"
                row = overlays.PanelRow(one.pixels[place], heat, None, one.boxes_on(place), title)
                panels.append(row)
    write_json(records, out / "explanations.json")
    overlays.panel(panels, out / "sheet.png")
    write(f"wrote {len(records)} overlays, pages of slices and arrays, and sheet.png in {out}")
    return 0


def stacks(
    model: Any,
    recipe: Any,
    paths: Iterable[Path],
    class_index: int | None = None,
    sign: int = 1,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> Iterable[Stack]:
    """Explain volumes one after another.

    A slice argues for the class that it would be given alone; where none is given the wanted class, the slice
    is taken that gives it the highest probability.

    Args:
        model: a trained model that names `slice_scores` of volumes.
        recipe: the recipe of its run.
        paths: the volumes.
        class_index: the class to argue for; by default the predicted one of each volume.
        sign: see `heatmaps.contributions`.
        temperature: see `report.findings`, of the volume's probabilities, like `threshold`.
        threshold: see there.
    """
    data = recipe.data
    named_of = tf.function(model.explain, reduce_retracing=True)

    @tf.function(reduce_retracing=True)
    def heat_of(slice_, wanted):
        return heatmaps.contributions(model, slice_, wanted, sign)["contributions"]

    for path in paths:
        pixels = volumes.read(path, data.window or None, data.max_pixels, data.central)
        sized = np.stack([pipeline.size_pixels(one, data.image_size) for one in pixels])
        inputs = {key: tf.constant(value) for key, value in pipeline.padded([sized]).items()}
        named = {
            key: value.numpy()[0]
            for key, value in named_of(inputs).items()
            if key in ("scores", "slice_scores", "boxes", "slices")
        }
        probabilities = softmax(named["scores"] / temperature)
        top = int(probabilities.argmax())
        predicted = top if threshold is None else int(probabilities[1] >= threshold)
        wanted = predicted if class_index is None else class_index
        alone = softmax(named["slice_scores"], axis=-1)  # (S, C)
        order = np.argsort(-alone[:, wanted], kind="stable")
        arguing = [int(place) for place in order if alone[place].argmax() == wanted] or [int(order[0])]
        chosen = tf.constant([wanted], tf.int64)
        argued = {place: heat_of(tf.constant(sized[place][None]), chosen).numpy()[0] for place in arguing}
        own = wanted == top and sign > 0 and "boxes" in named
        scale = np.tile(np.array(pixels.shape[2:0:-1]) / np.array(data.image_size[::-1]), 2)  # x, y, x, y
        yield Stack(
            Path(path),
            pixels,
            (volumes.check_header(path, data.max_pixels).pages - len(pixels)) // 2,
            probabilities,
            predicted,
            alone,
            argued,
            named["boxes"] * scale if own else np.zeros((0, 4)),
            named["slices"] if own else np.zeros(0, int),
        )


def slice_rows(one: Stack, wanted: int, title: str) -> list[Row]:
    """A picture of each slice, in their order, with its heat where it argues for the class.

    Of more than 40 slices those with the highest probability of the class are shown.
    """
    shown = sorted(np.argsort(-one.by_slice[:, wanted], kind="stable")[:_PANELS].tolist())
    cells = [
        Cell(one.heated(place), f"{one.first + place + 1}: {one.by_slice[place, wanted]:.2f}")
        for place in shown
    ]
    rows = [cells[at : at + _COLUMNS] for at in range(0, len(cells), _COLUMNS)]
    return [Row(row, "" if at else title, _COLUMNS) for at, row in enumerate(rows)]


def _write_one(one: Stack, index: int | None, class_names: Sequence[str], folder: Path, name: str) -> dict:
    wanted = one.predicted if index is None else index
    files = {
        "overlay": folder / f"{name}.overlay.png",
        "heat": folder / f"{name}.heat.npy",
        "slices": folder / f"{name}.slices.png",
    }
    strongest = next(iter(one.argued))
    drawn = overlays.draw_boxes(one.heated(strongest), one.boxes_on(strongest), overlays.FOUND)
    overlays.save_png(drawn, files["overlay"])
    heat = np.zeros((len(one.pixels), *one.argued[strongest].shape), np.float32)
    for place, values in one.argued.items():
        heat[place] = np.maximum(values, 0)
    with written_aside(files["heat"]) as aside:
        np.save(aside, heat)
    title = f"{_title(one, class_names)}. Each slice alone: how probable {class_names[wanted]} is"
    page(slice_rows(one, wanted, title), files["slices"])
    return {
        "image": one.alias or str(one.path),
        "predicted": class_names[one.predicted],
        "probabilities": dict(zip(class_names, one.probabilities.tolist(), strict=True)),
        **{key: path.name if one.alias else str(path) for key, path in files.items()},
        "first_slice": one.first + 1,
        "arguing": [one.first + place + 1 for place in one.argued],
        "slice_probabilities": one.by_slice[:, wanted].round(4).tolist(),
    }


def _title(one: Stack, class_names: Sequence[str]) -> str:
    return (
        f"{one.alias or one.path.name}: {class_names[one.predicted]} ({one.probabilities[one.predicted]:.2f})"
    )
