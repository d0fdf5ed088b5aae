"""RecurrentSampler."""

import keras
import numpy as np
import reference.sampling

from keras_medattn import layers
from rows import Inputs, Row, normal

_ARGUMENTS = {"patches": 3, "units": 5, "seed": 3}


def _equation(weights: dict, attention: np.ndarray, replacement: bool = True, **named) -> list[np.ndarray]:
    return reference.sampling.recurrent_sampler(
        weights, attention, replacement=replacement, **_ARGUMENTS, **named
    )


def _attention(*shape: int) -> np.ndarray:
    """Maps in which no two cells are nearly alike."""
    return np.exp(2 * normal(*shape, seed=1)).astype("float32").astype("float64")


def _images(batch: int) -> Inputs:
    examples = (7 - 2 * np.arange(batch)).astype("int32")
    return _attention(batch, 3, 5), {"features": normal(batch, 3, 5, 4), "examples": examples}


def _padded() -> tuple[Inputs, Inputs, Inputs]:
    """Below and at the right of the cells there are others without attention."""
    attention, features = _attention(2, 3, 5), normal(2, 3, 5, 4)
    below = ((0, 0), (0, 2), (0, 0))
    return (
        (attention, {"features": features}),
        (np.pad(attention, below), {"features": np.pad(features, (*below, (0, 0)), constant_values=np.nan)}),
        (np.zeros_like(attention), {"features": features}),
    )


def _network(layer: keras.layers.Layer) -> keras.Model:
    images = keras.Input((16, 20, 3))
    maps = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(images)
    logits = keras.layers.Conv2D(1, 1)(maps)
    attention = keras.layers.Reshape((8, 10))(keras.layers.Softmax(axis=(1, 2))(logits))
    seen, _, log_probs = layer(attention, features=maps)
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(seen), log_probs])
    return keras.Model([images], [keras.layers.Dense(3)(flat)])


_NOISE = (
    "each step draws other cells: five steps tell of the draws (test_training_draws_the_second_object does)"
)

ROWS = [
    Row(
        layers.RecurrentSampler,
        _ARGUMENTS,
        {"images": _images},
        _equation,
        _padded,
        network=_network,
        skipped={"test_training_lowers_a_loss": _NOISE},
    ),
]
