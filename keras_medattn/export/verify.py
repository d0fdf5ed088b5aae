"""Compare an exported model with the Keras model, from file to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_medattn.data import pipeline, readers, volumes
from keras_medattn.data.headers import read_header
from keras_medattn.data.manifest import Manifest
from keras_medattn.export import known_answers


def differences(folder: Path, model, recipe, samples: Manifest, temperature: float = 1.0) -> dict[str, float]:
    """Find the largest difference in probabilities of each signature to the Keras model.

    Images that a signature cannot take (a TIFF as bytes) are left out of it. Those that the export's own
    `known_answers` drew are compared too.

    Args:
        folder: a SavedModel.
        model: the Keras model it was made from.
        recipe: its recipe.
        samples: images to compare on.
        temperature: that the export divides the scores by.

    Returns:
        The largest absolute difference by signature.
    """
    served = tf.saved_model.load(str(folder))  # kept in a variable, or its graph is collected
    found = dict.fromkeys(served.signatures, 0.0)
    for path in (*samples.paths, *known_answers.files(folder)):
        sized, sent = _read(path, recipe.data)
        expected = tf.nn.softmax(model(sized, training=False) / temperature).numpy()
        for name, inputs in sent.items():
            answer = served.signatures[name](**inputs)["probabilities"].numpy()
            found[name] = max(found[name], float(np.abs(answer - expected).max()))
    return found


def probabilities(path: Path, model, recipe, temperature: float = 1.0) -> np.ndarray:
    """The Keras model's answer to one file: `(C,)`."""
    sized, _ = _read(path, recipe.data)
    return tf.nn.softmax(model(sized, training=False) / temperature).numpy()[0]


def _read(path: Path, data) -> tuple[Any, dict[str, dict[str, tf.Tensor]]]:
    """What the Keras model takes, and what each signature takes."""
    return _volume(path, data) if data.slices else _image(path, data)


def _image(path: Path, data) -> tuple[Any, dict[str, dict[str, tf.Tensor]]]:
    window = data.window or None
    sized = pipeline.read_sized(path, data.image_size, window, data.max_pixels, data.scaled_decoding)
    towards = data.image_size if data.scaled_decoding else None
    pixels = readers.read(path, window, data.max_pixels, None, towards)
    sent = {"tensor": {"image": tf.constant(pixels[None])}}
    if read_header(path).kind != "tiff":
        sent["serving_default"] = sent["explain"] = {"image_bytes": tf.constant([path.read_bytes()])}
    return sized[None], sent


def _volume(path: Path, data) -> tuple[Any, dict[str, dict[str, tf.Tensor]]]:
    """As `_image`, with an empty slice behind the others."""
    window = data.window or None
    stack = pipeline.read_sized_volume(path, data.image_size, window, data.max_pixels, data.central)
    whole = volumes.read(path, window, data.max_pixels, data.central)
    pixels = np.concatenate([whole, np.zeros_like(whole[:1])])[None]
    mask = np.arange(len(whole) + 1)[None] < len(whole)
    inputs = {"image": tf.constant(pixels), "mask": tf.constant(mask)}
    return pipeline.padded([stack]), {"tensor": inputs, "explain": inputs}
