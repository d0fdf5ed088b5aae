"""The table of public layers: each once, with examples of its inputs, its equation and its exceptions.

A new layer needs a row in `rows/` and nothing else: every check of `test_conformance*.py` and of `backends/`
runs over the rows.
"""

from typing import Any

import keras
import numpy as np
import rows.channel_spatial
import rows.comparison
import rows.gated
import rows.global_pixel_mask
import rows.mims
import rows.recurrent_sampler
import rows.sampler
from rows import Inputs, Row

ROWS = [
    *rows.channel_spatial.ROWS,
    *rows.comparison.ROWS,
    *rows.gated.ROWS,
    *rows.global_pixel_mask.ROWS,
    *rows.mims.ROWS,
    *rows.recurrent_sampler.ROWS,
    *rows.sampler.ROWS,
]
CASES = [(row, example) for row in ROWS for example in row.examples]
CASE_IDS = [f"{row.layer.__name__}-{example.replace(' ', '-')}" for row, example in CASES]
ROW_IDS = [row.layer.__name__ for row in ROWS]


def cast(inputs: Inputs, dtype: str = "float32") -> Inputs:
    """The inputs as NumPy arrays, the floats of one type."""
    return keras.tree.map_structure(
        lambda array: array.astype(dtype) if array.dtype.kind == "f" else array, inputs
    )


def symbolic(inputs: Inputs, unknown: bool) -> Inputs:
    """Keras inputs for these arrays: the batch is unknown, and on request every size but the channels."""

    def make(array: np.ndarray) -> Any:
        shape = list(array.shape[1:])
        if unknown:  # masks, sizes and the like have no channels
            channels = array.ndim > 2 or array.dtype.kind == "f"
            shape = [None] * (len(shape) - 1) + shape[-1:] if channels else [None] * len(shape)
        return keras.Input(shape, dtype="float32" if array.dtype.kind == "f" else array.dtype.name)

    return keras.tree.map_structure(make, inputs)


def functional(row: Row, inputs: Inputs, unknown: bool = True) -> tuple[keras.Model, keras.layers.Layer]:
    """The layer with random weights as a model of a flat list of inputs, and the layer."""
    layer, (first, named) = row.make(), symbolic(inputs, unknown)
    outputs = layer(first, **named)
    randomise(layer)
    return keras.Model(keras.tree.flatten((first, named)), keras.tree.flatten(outputs)), layer


def built(row: Row, inputs: Inputs, **kwargs: Any) -> keras.layers.Layer:
    """The layer with random weights."""
    layer, (first, named) = row.make(**kwargs), cast(inputs)
    layer(first, **named)
    randomise(layer)
    return layer


def randomise(layer: keras.layers.Layer) -> None:
    """Weights like trained ones: none at its start value, variances and magnitudes positive."""
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        value = rng.normal(size=weight.shape) * 0.5
        weight.assign(np.abs(value) + 0.5 if weight.name in ("moving_variance", "sw") else value)


def values_of(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The weights in float64, by their path below the layer."""
    return {below(weight): keras.ops.convert_to_numpy(weight).astype("float64") for weight in layer.weights}


def below(weight: Any) -> str:
    return weight.path.split("/", 1)[1]


def arrays(outputs: Any) -> list[np.ndarray]:
    """The outputs, flat, as NumPy arrays."""
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]
