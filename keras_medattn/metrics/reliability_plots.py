"""The reliability picture: how often answers are right, against how sure the model was."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import ArrayLike

from keras_medattn.metrics.calibration import BINS, calibration_scores, confidence_bins
from keras_medattn.metrics.intervals import Bootstrap
from keras_medattn.metrics.plots import COLOURS, _figure, save_figure
from keras_medattn.metrics.scores import check_predictions


def reliability_picture(
    labels: ArrayLike,
    probabilities: ArrayLike,
    path: str | os.PathLike[str],
    intervals: Bootstrap | None = None,
) -> None:
    """Accuracy against mean confidence of 15 bins, and below how many images each holds.

    On the diagonal the model is right as often as it claims; below it, it claims too much (DeGroot and
    Fienberg 1983; Guo et al., ICML 2017). The class is the most probable one, whatever the threshold.

    Args:
        labels: class of each image, `(N,)`.
        probabilities: predicted probabilities, `(N, C)`.
        path: the PNG file to write.
        intervals: of `bootstrap`, for the calibration error in the title.

    Raises:
        ValueError: as `scores`.
    """
    labels, probabilities = check_predictions(labels, probabilities)
    bins, confidence, right = confidence_bins(labels, probabilities)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.flatnonzero(counts)
    sure = np.bincount(bins, confidence, BINS)[filled] / counts[filled]
    accurate = np.bincount(bins, right, BINS)[filled] / counts[filled]
    figure = _figure(6, 7.2)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    upper.plot([0, 1], [0, 1], color="0.55", linestyle=(0, (2, 3)), label="As often right as sure")
    upper.plot(sure, accurate, color=COLOURS[0], marker="o", linewidth=2, label="Images of a bin")
    upper.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    upper.set_ylabel("Accuracy", fontsize=12)
    upper.legend(fontsize=10, frameon=False, loc="upper left")
    lower.bar((np.arange(BINS) + 0.5) / BINS, counts, 0.9 / BINS, color=COLOURS[0])
    lower.set_xlabel("Confidence: probability of the most probable class", fontsize=12)
    lower.set_ylabel("Images", fontsize=12)
    error = calibration_scores(labels, probabilities, np.ones((1, len(labels))))["ece"][0]
    shown = intervals.figures["ece"] if intervals else f"{error:.3f}"
    upper.set_title(f"Reliability, {len(labels)} images, ECE {shown}", fontsize=13)
    for axes in (upper, lower):
        axes.tick_params(labelsize=11)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    save_figure(figure, path)
