"""Compare an exported model with the Keras model, from file to answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_medattn.data import pipeline, readers
from keras_medattn.data.headers import read_header
from keras_medattn.data.manifest import Manifest


def differences(folder: Path, model, recipe, samples: Manifest) -> dict[str, float]:
    """Find the largest difference in probabilities of each signature to the Keras model.

    Images that a signature cannot take (a TIFF as bytes) are left out of it.

    Args:
        folder: a SavedModel.
        model: the Keras model it was made from.
        recipe: its recipe.
        samples: images to compare on.

    Returns:
        The largest absolute difference by signature.
    """
    served = tf.saved_model.load(str(folder))  # kept in a variable, or its graph is collected
    data = recipe.data
    window = data.window or None
    found: dict[str, float] = {"serving_default": 0.0, "tensor": 0.0, "explain": 0.0}
    for path in samples.paths:
        sized = pipeline.read_sized(path, data.image_size, window, data.max_pixels)
        expected = tf.nn.softmax(model(sized[None], training=False)).numpy()
        pixels = readers.read(path, window, data.max_pixels)
        inputs = {"tensor": tf.constant(pixels[None])}
        if read_header(path).kind != "tiff":
            inputs["serving_default"] = inputs["explain"] = tf.constant([path.read_bytes()])
        for name, value in inputs.items():
            answer = served.signatures[name](value)["probabilities"].numpy()
            found[name] = max(found[name], float(np.abs(answer - expected).max()))
    return found
