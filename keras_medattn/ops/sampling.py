"""Sampling of an attention map: `draws` of its cells, and `estimators` of what all cells would give."""

from keras_medattn.ops.draws import cells_at, greedy_cells, log_probabilities, sample_cells
from keras_medattn.ops.estimators import (
    BASELINES,
    advantages,
    aggregate,
    expectation,
    likelihood_rewards,
    negative_entropy,
    reinforce_surrogate,
)

__all__ = [
    "BASELINES",
    "advantages",
    "aggregate",
    "cells_at",
    "expectation",
    "greedy_cells",
    "likelihood_rewards",
    "log_probabilities",
    "negative_entropy",
    "reinforce_surrogate",
    "sample_cells",
]
