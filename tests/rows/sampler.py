"""AttentionSampler."""

import keras
import numpy as np
import reference.sampler

from keras_medattn import layers
from rows import Inputs, Row, normal

_ARGUMENTS = {"patches": 3, "patch_size": 5, "stride": 3, "seed": 3}


def _equation(weights: dict, attention: np.ndarray, training: bool, **named) -> list[np.ndarray]:
    return reference.sampler.attention_sampler(weights, attention, training=training, **_ARGUMENTS, **named)


def _attention(*shape: int) -> np.ndarray:
    """Maps in which no two cells are nearly alike."""
    weights = np.exp(normal(*shape, seed=1))
    return (weights / weights.sum(axis=(1, 2), keepdims=True)).astype("float32").astype("float64")


def _images(batch: int) -> Inputs:
    return _attention(batch, 3, 4), {"image": normal(batch, 10, 13, 2)}


def _bytes(batch: int) -> Inputs:
    image = np.random.default_rng(2).integers(0, 9, (batch, 10, 14, 2), dtype="uint8")
    size = np.array([[10 - 3 * (b % 2), 8 + 5 * (b % 2)] for b in range(batch)], "int32")
    examples = (7 - 2 * np.arange(batch)).astype("int32")
    return _attention(batch, 3, 4), {"image": image, "size": size, "examples": examples}


def _padded() -> tuple[Inputs, Inputs, Inputs]:
    attention, image = _attention(2, 3, 4), normal(2, 10, 13, 2)
    size = np.array([[10, 13]] * 2, "int32")
    more = np.pad(attention, ((0, 0), (0, 2), (0, 2)), constant_values=np.nan)
    padded = np.pad(image, ((0, 0), (0, 5), (0, 5), (0, 0)), constant_values=np.nan)
    return (
        (attention, {"image": image, "size": size}),
        (more, {"image": padded, "size": size}),
        (more, {"image": padded, "size": 0 * size}),
    )


def _network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((16, 20, 3))
    logits = keras.layers.Conv2D(1, 3, padding="same")(keras.layers.AveragePooling2D(3)(images))
    attention = keras.layers.Reshape((5, 6))(keras.layers.Softmax(axis=(1, 2))(logits))
    patches, _, log_probs = layer(attention, images)
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(patches), log_probs])
    return keras.Model([images], [keras.layers.Dense(3)(flat)])


ROWS = [
    Row(
        layers.AttentionSampler,
        _ARGUMENTS,
        {"images": _images, "bytes of several sizes": _bytes},
        _equation,
        _padded,
        kept=lambda answer: [answer[0], answer[2]],  # a cell's number depends on the map's width
        network=_network,
        skipped={
            "test_gradients_reach_every_weight_but_those_listed": "no weights to train",
            "test_training_lowers_a_loss": "no weights to train",
        },
    ),
]
