"""ChannelAttn and SpatialAttn."""

import numpy as np
import reference.channel_spatial

from keras_medattn import layers
from rows import Row, normal

_NO_MASK = {
    "test_padding_changes_nothing_and_is_not_read": "takes no mask: every position of a map counts",
    "test_all_masked_stays_finite": "takes no mask: every position of a map counts",
}


def _channel_attn(weights: dict, x: np.ndarray, training: bool) -> list[np.ndarray]:
    return [reference.channel_spatial.channel_attn(weights, x)[0]]


def _spatial_attn(weights: dict, x: np.ndarray, training: bool) -> list[np.ndarray]:
    return [reference.channel_spatial.spatial_attn(weights, x)[0]]


ROWS = [
    Row(
        layers.ChannelAttn,
        {"kernel_size": 4, "strides": 4},
        # small numbers: the scores are sums of products over the whole map, and saturate the softmax
        {"maps": lambda batch: (normal(batch, 5, 7, 3) / 4, {})},
        _channel_attn,
        skipped=_NO_MASK,
    ),
    Row(
        layers.SpatialAttn,
        {"ratio": 2},
        {"maps": lambda batch: (normal(batch, 3, 5, 4), {})},
        _spatial_attn,
        skipped=_NO_MASK,
    ),
]
