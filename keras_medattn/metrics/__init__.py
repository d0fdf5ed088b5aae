"""Figures of classifiers and heatmaps, their confidence intervals, and pictures of them."""

from keras_medattn.metrics.intervals import Bootstrap, Interval, bootstrap, mean_sd, resample
from keras_medattn.metrics.localisation import (
    boxes_to_mask,
    coverage,
    coverage_curve,
    energy_inside,
    localise,
    pointing_game,
    random_map,
)
from keras_medattn.metrics.plots import confusion_picture, history_picture, pr_picture, roc_picture
from keras_medattn.metrics.scores import scores
from keras_medattn.metrics.weighted import weighted_scores

__all__ = [
    "Bootstrap",
    "Interval",
    "bootstrap",
    "boxes_to_mask",
    "confusion_picture",
    "coverage",
    "coverage_curve",
    "energy_inside",
    "history_picture",
    "localise",
    "mean_sd",
    "pointing_game",
    "pr_picture",
    "random_map",
    "resample",
    "roc_picture",
    "scores",
    "weighted_scores",
]
