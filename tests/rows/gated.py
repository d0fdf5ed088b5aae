"""GatedAttention and InstanceCrops."""

import keras
import numpy as np
import reference.gated

from keras_medattn import layers
from rows import Inputs, Row, normal


def _gated_attention(weights: dict, x: np.ndarray, training: bool) -> list[np.ndarray]:
    return [reference.gated.gated_attention(weights, x, training=training)["gated"]]


def _instance_crops(
    weights: dict, attention: np.ndarray, training: bool, images: np.ndarray, size: np.ndarray | None = None
) -> list[np.ndarray]:
    return list(reference.gated.instance_crops(attention, images, size, **_CROPS))


def _images(batch: int) -> Inputs:
    return np.abs(normal(batch, 4, 3)), {"images": normal(batch, 12, 16, 2, seed=1)}


def _bytes(batch: int) -> Inputs:
    images = np.random.default_rng(2).integers(0, 9, (batch, 12, 16, 2), dtype="uint8")
    sizes = [[12 - 4 * (b % 2), 8 + 8 * (b % 2)] for b in range(batch)]
    return np.abs(normal(batch, 4, 3, seed=3)), {"images": images, "size": np.array(sizes, "int32")}


def _padded_images() -> tuple[Inputs, Inputs, Inputs]:
    attention, images = np.abs(normal(2, 4, 3)), normal(2, 8, 16, 2, seed=1)
    padded = np.pad(images, ((0, 0), (0, 5), (0, 3), (0, 0)), constant_values=np.nan)
    size = np.array([[8, 16]] * 2, "int32")
    return (
        (attention, {"images": images, "size": size}),
        (attention, {"images": padded, "size": size}),
        (np.ones_like(attention), {"images": padded, "size": size}),  # nothing lies above the mean
    )


def _crops_network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((16, 20, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    attention = keras.layers.Lambda(lambda x: keras.ops.mean(x, axis=-1))(maps)
    crops, _, _ = layer(attention, images)  # (B, 2, 4, 4, 3)
    return keras.Model([images], [keras.layers.Dense(3)(keras.layers.Flatten()(crops))])


_CROPS = {"k": 2, "crop_size": 4, "label_size": 8}

ROWS = [
    Row(
        layers.GatedAttention,
        {"filters": 3},
        {"maps": lambda batch: (normal(batch, 6, 7, 4), {})},
        _gated_attention,
        skipped=dict.fromkeys(
            ["test_padding_changes_nothing_and_is_not_read", "test_all_masked_stays_finite"],
            "it takes no mask: the images of a batch are resized to one size before the backbone",
        ),
    ),
    Row(
        layers.InstanceCrops,
        _CROPS,
        {"images": _images, "bytes of several sizes": _bytes},
        _instance_crops,
        _padded_images,
        network=_crops_network,
        skipped={
            "test_gradients_reach_every_weight_but_those_listed": "no weights, and places carry no gradient",
            "test_gradients_equal_central_differences": "no weights, and places carry no gradient",
            "test_training_lowers_a_loss": "no weights",
            "test_precisions[mixed": "boxes stay float32: float16 counts pixels to 2048 only",
        },
    ),
]
