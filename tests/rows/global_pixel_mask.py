"""GlobalPixelMask."""

import keras
import numpy as np
import reference.global_pixel_mask

from keras_medattn import layers
from rows import Row, normal

IMAGES = normal(4, 7, 9, 2, seed=7) * 0.25  # the training images


def _masked(weights: dict, x: np.ndarray, training: bool) -> list[np.ndarray]:
    return [x * reference.global_pixel_mask.mask(weights, IMAGES)]


def _network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((7, 9, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(layer(images))
    return keras.Model([images], [keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps))])


ROWS = [
    Row(
        layers.GlobalPixelMask,
        {"channels": 5},
        {"images": lambda batch: (normal(batch, 7, 9, 3), {})},
        _masked,
        network=_network,
        ready=lambda layer: layer.adapt(IMAGES),
        deployed=lambda layer: layer.freeze(),
        skipped=dict.fromkeys(
            ("test_padding_changes_nothing_and_is_not_read", "test_all_masked_stays_finite"),
            "its mask is its answer, for all images: it takes none",
        ),
    )
]
