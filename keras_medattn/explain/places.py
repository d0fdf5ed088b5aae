"""Localisation of a model's findings: did it look where something is?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from keras_medattn import metrics
from keras_medattn.explain.truth import TruthError
from keras_medattn.metrics.localisation import object_boxes

if TYPE_CHECKING:
    from keras_medattn.explain.report import Finding


def true_positives(
    found: Sequence[Finding], truths: Sequence[np.ndarray | None], labels: np.ndarray
) -> list[int]:
    """Places of the images that localisation is measured on: rightly classified, and with something marked.

    Of two classes the first is the one without the thing, and its images are left out.
    """
    return [
        place
        for place, (one, truth) in enumerate(zip(found, truths, strict=True))
        if truth is not None
        and one.predicted == labels[place]
        and (labels[place] > 0 or len(one.probabilities) > 2)
    ]


def localisation(
    found: Sequence[Finding], truths: Sequence[np.ndarray | None], groups: Sequence | None = None
) -> dict[str, metrics.Bootstrap]:
    """Figures of localisation with intervals and with chance beside them.

    All is measured at the size at which the images are drawn; so are the 8 pixels of tolerance.

    Args:
        found: one an image.
        truths: of each image from `load_truth`, none of them None.
        groups: the patient of each image, or None.

    Returns:
        `heat`, see `metrics.localise`. Where the system names the region that it cuts out, `region`: how
        many true objects it covers, as `metrics.coverage`, whose chance is the same region elsewhere. Where
        it reads patches, this region is theirs, and `centre_uniform` is the expected share of objects with
        their centre under as many patches at independent, uniformly drawn places.

    Raises:
        TruthError: a mask is of another size than its image.
    """
    at_size = [_at_drawn_size(one, truth) for one, truth in zip(found, truths, strict=True)]
    figures = {"heat": metrics.localise((one.heat() for one in found), at_size, groups)}
    rows = [
        metrics.coverage(region, truth) | uniform(one, truth)
        for one, truth in zip(found, at_size, strict=True)
        if (region := one.region()) is not None
    ]
    if len(rows) == len(found):
        figures["region"] = _over_objects(rows, groups)
    return figures


def uniform(finding: Finding, truth: np.ndarray) -> dict[str, float]:
    """The share of objects that uniform patches would hold the centre of; nothing where no patch is read.

    `1 - (1 - q)^P`, where q is the share of the attention map's cells from which a patch holds it.
    """
    if "cells" not in finding.named or not len(finding.boxes):
        return {}
    size = (finding.boxes[:, 2:] - finding.boxes[:, :2]).max(axis=0) * finding.scale[:2]  # w, h
    boxes = object_boxes(truth, finding.drawn)
    centres = (boxes[:, :2] + boxes[:, 2:]) // 2 + 0.5  # of the pixels that `coverage` looks at; x, y
    shares = np.ones(len(centres))
    for axis, (pixels, cells) in enumerate(zip(finding.drawn[::-1], finding.argued.shape[::-1], strict=True)):
        places = (np.arange(cells) + 0.5) * pixels / cells
        shares *= (np.abs(places - centres[:, axis : axis + 1]) <= size[axis] / 2).mean(axis=1)
    return {"centre_uniform": float(np.mean(1 - (1 - shares) ** len(finding.boxes)))}


def _at_drawn_size(finding: Finding, truth: np.ndarray | None) -> np.ndarray:
    truth = np.asarray(truth)
    if truth.dtype != bool:
        return truth * finding.scale
    if truth.shape != finding.drawn:
        raise TruthError(
            f"{finding.path}: its mask must have the image's {finding.size} rows and columns. "
            f"Received: {truth.shape}, or a shape of which that is the shrunk one"
        )
    return truth


def _over_objects(rows: Sequence[dict[str, float]], groups: Sequence | None) -> metrics.Bootstrap:
    """Shares of all objects; the area is a mean over images."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    counts = columns.pop("boxes")

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        amounts = {name: np.ones_like(counts) if name == "area" else counts for name in columns}
        return {
            name: (weights @ (values * amounts[name])) / (weights @ amounts[name])
            for name, values in columns.items()
        }

    return metrics.resample(means, len(rows), groups)
