"""The pictures of the papers, for whatever a system's `explain` names: parts, blocks, patches, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from keras_medattn.explain import overlays
from keras_medattn.explain.pages import Cell, Row, page
from keras_medattn.metrics.localisation import boxes_to_mask

if TYPE_CHECKING:
    from keras_medattn.explain.report import Finding

_DRAWS = 10
_SHOWN = 10  # patches of a page, of each kind
_INSTANCE = 160  # pixels of the side at which instances are shown


def draw(finding: Finding, image: np.ndarray, title: str, folder: Path, name: str) -> dict[str, str]:
    """Write the pages that what a finding names gives rise to.

    Args:
        finding: of one image.
        image: it, uint8 `(H, W, 3)`, as large as it is.
        title: says what was answered.
        folder: where to write.
        name: begins each file's name.

    Returns:
        The files by kind; none where the system names nothing more than its heat and boxes.
    """
    named, made = finding.named, {}
    for kind, needed, rows in (
        ("attention", {"maps", "attention", "boxes"}, instances),
        ("blocks", {"attention_1"}, blocks),
        ("patches", {"cells", "attention"}, patches),
    ):
        if needed <= set(named) or (kind == "blocks" and any(map(_is_block, named))):
            made[kind] = str(folder / f"{name}.{kind}.png")
            page(rows(finding, image, title), made[kind])
    return made


def instances(finding: Finding, image: np.ndarray, title: str) -> list[Row]:
    """Attention and its instances, as figure 3 of Fan et al. (2020), and the crops that were found.

    The semantic map and the channels of the lowest and the highest gate are those of a gated attention. Of
    several channels with the lowest gate the strongest is shown.
    """
    named, aspect = finding.named, image.shape[0] / image.shape[1]
    maps = named["maps"].astype(np.float32)

    def cell(values: np.ndarray, text: str) -> Cell:
        return Cell(values, text, aspect)

    shown = _small(image)
    scale = shown.shape[1] / image.shape[1]
    cells = [
        Cell(overlays.draw_boxes(shown, finding.boxes * scale, overlays.FOUND), "image, instances"),
        cell(maps.mean(axis=-1), f"X, mean of {maps.shape[-1]} channels"),
    ]
    if "semantic" in named:
        cells.append(cell(named["semantic"], "S, sum 1"))
    cells.append(cell(named["attention"], "attention map Omega"))
    if "gates" in named:
        gates = named["gates"]
        lowest = np.lexsort((-np.abs(maps).sum(axis=(0, 1)), gates))[0]
        for place, text in ((lowest, "lowest"), (gates.argmax(), "highest")):
            cells.append(cell(maps[..., place], f"channel {place}, {text} gate, {gates[place]:.2f}"))
    rows = [Row(cells[:3], title), *([Row(cells[3:])] if cells[3:] else [])]
    if len(finding.boxes):
        crops = _cut(image, finding.boxes, finding.weights, square=True)
        rows += _rows(crops, "instances as they are read, and what each adds to the score")
    return rows


def blocks(finding: Finding, image: np.ndarray, title: str) -> list[Row]:
    """The mean answer of each attention module, block by block, as `AttnVGG` names them."""
    aspect = image.shape[0] / image.shape[1]
    cells = [Cell(_small(image), "image")]
    for key in sorted(filter(_is_block, finding.named), key=lambda key: int(key.split("_")[1])):
        values = finding.named[key]
        size = f"{values.shape[0]} x {values.shape[1]}"
        cells.append(Cell(values.astype(np.float32), f"block {key.split('_')[1]}, {size}", aspect))
    return [Row(cells[at : at + 3], "" if at else title) for at in range(0, len(cells), 3)]


def patches(finding: Finding, image: np.ndarray, title: str) -> list[Row]:
    """The attention map with the patches that were chosen, and with a Monte-Carlo draw; then the patches.

    The patches of the draw are `drawn_boxes`, and `drawn_probabilities` are those of the classes over many
    draws.
    """
    named = finding.named
    shown = _small(image)
    scale = shown.shape[1] / image.shape[1]
    attention = named["attention"]
    heated = overlays.overlay(shown, attention)
    drawn = named.get("drawn_boxes", np.zeros((0, 4)))
    seen = boxes_to_mask(finding.boxes, image.shape[:2]).mean()
    top = [
        Cell(attention * attention.size, "attention, 1 = even", image.shape[0] / image.shape[1]),
        Cell(
            overlays.draw_boxes(heated, finding.boxes * scale, overlays.FOUND),
            f"{len(finding.boxes)} places chosen, {seen:.1%} of the image",
        ),
    ]
    rows = [Row(top, title)]
    rows += _rows(
        _cut(image, finding.boxes, finding.weights),
        f"chosen{_first(finding.boxes)}, and what each adds to the score",
    )
    if len(drawn):
        top.append(Cell(overlays.draw_boxes(heated, drawn * scale, overlays.FOUND), "a Monte-Carlo draw"))
        rows += _rows(_cut(image, drawn), _over_draws(named["drawn_probabilities"], finding.predicted))
    return rows


def monte_carlo(model: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    """What a system that draws patches answers over several draws, and the patches of one of them.

    Args:
        model: the system.

    Returns:
        From images `(1, H, W, 3)` to `drawn_boxes (P, 4)` in their pixels and `drawn_probabilities (draws,
        C)`; to nothing where the system draws nothing.
    """
    if not hasattr(model, "sample"):
        return lambda images: {}

    @tf.function(reduce_retracing=True)
    def draw(images, number):
        named = model.explain(images, draw=number)
        return named["boxes"][0], named["scores"][0]

    def found(images):
        drawn = [draw(tf.constant(images), tf.constant(number)) for number in range(_DRAWS)]
        scores = tf.stack([one for _, one in drawn])
        return {"drawn_boxes": drawn[0][0].numpy(), "drawn_probabilities": tf.nn.softmax(scores).numpy()}

    return found


def masks(named: Mapping[str, np.ndarray], images: Sequence[np.ndarray], path: Path) -> None:
    """The one mask of a data set, min-max normalised, before and after learning; and images behind it.

    As figure 4 of Xu et al. The title and the bar beside a mask tell its raw numbers.

    Args:
        named: `mask (H, W)`, and `initial_mask (H, W)` where it is known.
        images: some, uint8 `(H, W, 3)` of the mask's size.
        path: the PNG file to write.
    """
    cells = []
    for key, text in (("initial_mask", "before learning"), ("mask", "after learning")):
        if key in named:
            low, high = named[key].min(), named[key].max()
            cells.append(Cell(named[key], f"{text}: {low:.3g} to {high:.3g}", colormap="gray"))
    mask = named["mask"][..., None]
    mask = (mask - mask.min()) / (np.ptp(mask) or 1)
    rows = [
        Row(cells, "the mask of the data set"),
        Row([Cell(image) for image in images], "images"),
        Row([Cell(np.rint(image * mask).astype(np.uint8)) for image in images], "times the normalised mask"),
    ]
    page(rows, path)


def _is_block(key: str) -> bool:
    word, _, number = key.partition("_")
    return word == "attention" and number.isdigit()


def _small(image: np.ndarray) -> np.ndarray:
    return overlays.shrink(image, overlays.drawn_size(image.shape, 800))


def _cut(
    image: np.ndarray, boxes: np.ndarray, weights: np.ndarray | None = None, square: bool = False
) -> list[Cell]:
    """What lies in boxes; stretched to a square, as instances are read, or as it is, on white."""
    cells = []
    side = int(np.ceil((boxes[:, 2:] - boxes[:, :2]).max(initial=0))) + 2
    for place, box in enumerate(boxes[:_SHOWN]):
        x0, y0 = np.floor(box[:2]).astype(int).clip(0)
        x1, y1 = np.maximum(np.ceil(box[2:]).astype(int), (x0 + 1, y0 + 1))
        part = image[y0:y1, x0:x1]
        if square:
            part = overlays.shrink(part, (_INSTANCE, _INSTANCE))
        else:
            part = np.pad(
                part, (*((0, side - length) for length in part.shape[:2]), (0, 0)), constant_values=255
            )
        cells.append(Cell(part, "" if weights is None else f"{weights[place]:+.2f}"))
    return cells


def _rows(cells: list[Cell], heading: str) -> list[Row]:
    return [Row(cells[at : at + 5], "" if at else heading, 5) for at in range(0, len(cells), 5)]


def _first(boxes: np.ndarray) -> str:
    return f", the first {_SHOWN}" if len(boxes) > _SHOWN else ""


def _over_draws(probabilities: np.ndarray, predicted: int) -> str:
    values = probabilities[:, predicted]
    return (
        f"drawn; over {len(values)} draws the predicted class has {values.mean():.2f} +- "
        f"{values.std(ddof=1):.2f}"
    )
