"""The equations as pure functions of `keras.ops`: each runs on TensorFlow, JAX and PyTorch."""

from keras_medattn.ops.attention import channel_scores, spatial_attention, spatial_scores
from keras_medattn.ops.comparison import channel_attention, channel_mean, softmax_pool
from keras_medattn.ops.components import (
    above_threshold,
    bounding_boxes,
    heaviest_components,
    label_components,
)
from keras_medattn.ops.crops import crop_bilinear
from keras_medattn.ops.draws import greedy_cells, log_probabilities, sample_cells
from keras_medattn.ops.estimators import aggregate, expectation, negative_entropy, reinforce_surrogate
from keras_medattn.ops.gating import gated_attention
from keras_medattn.ops.masking import (
    convolve_tiles,
    pixel_mask,
    pixel_tiles,
    reducing_matrix,
    share_of_variance,
    tile_transforms,
)
from keras_medattn.ops.patches import (
    cell_mask,
    cells_to_corners,
    corners_to_cells,
    gather_patches,
    masked_softmax,
    overview,
)
from keras_medattn.ops.pooling import top_k, top_k_pool
from keras_medattn.ops.regions import position_to_box, position_to_cell
from keras_medattn.ops.resize import resize_bilinear, scaled_size

__all__ = [
    "above_threshold",
    "aggregate",
    "bounding_boxes",
    "cell_mask",
    "cells_to_corners",
    "channel_attention",
    "channel_mean",
    "channel_scores",
    "convolve_tiles",
    "corners_to_cells",
    "crop_bilinear",
    "expectation",
    "gated_attention",
    "gather_patches",
    "greedy_cells",
    "heaviest_components",
    "label_components",
    "log_probabilities",
    "masked_softmax",
    "negative_entropy",
    "overview",
    "pixel_mask",
    "pixel_tiles",
    "position_to_box",
    "position_to_cell",
    "reducing_matrix",
    "reinforce_surrogate",
    "resize_bilinear",
    "sample_cells",
    "scaled_size",
    "share_of_variance",
    "softmax_pool",
    "spatial_attention",
    "spatial_scores",
    "tile_transforms",
    "top_k",
    "top_k_pool",
]
