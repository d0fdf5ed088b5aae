"""Figures of classifiers and heatmaps, their confidence intervals, and pictures of them."""

from keras_medattn.metrics.calibration import (
    calibration_scores,
    choose_threshold,
    fit_temperature,
    negative_log_likelihood,
)
from keras_medattn.metrics.comparison_plots import comparison_picture, curves_picture, setting_picture
from keras_medattn.metrics.epochs import best_window, plateau
from keras_medattn.metrics.intervals import Bootstrap, Interval, bootstrap, mean_sd, resample
from keras_medattn.metrics.localisation import (
    boxes_to_mask,
    coverage,
    coverage_curve,
    energy_inside,
    localise,
    pointing_game,
    pooled_coverage_curve,
    random_map,
)
from keras_medattn.metrics.patients import Patients, by_patient, patient_scores
from keras_medattn.metrics.plots import confusion_picture, history_picture, pr_picture, roc_picture
from keras_medattn.metrics.reliability_plots import reliability_picture
from keras_medattn.metrics.scores import scores
from keras_medattn.metrics.significance import Difference, paired_t, sign_flip, welch
from keras_medattn.metrics.trial_plots import trials_picture
from keras_medattn.metrics.weighted import weighted_scores

__all__ = [
    "Bootstrap",
    "Difference",
    "Interval",
    "Patients",
    "best_window",
    "bootstrap",
    "boxes_to_mask",
    "by_patient",
    "calibration_scores",
    "choose_threshold",
    "comparison_picture",
    "confusion_picture",
    "coverage",
    "coverage_curve",
    "curves_picture",
    "energy_inside",
    "fit_temperature",
    "history_picture",
    "localise",
    "mean_sd",
    "negative_log_likelihood",
    "paired_t",
    "patient_scores",
    "plateau",
    "pointing_game",
    "pooled_coverage_curve",
    "pr_picture",
    "random_map",
    "reliability_picture",
    "resample",
    "roc_picture",
    "scores",
    "setting_picture",
    "sign_flip",
    "trials_picture",
    "weighted_scores",
    "welch",
]
