"""What an exported model answers: `serving_default`, `tensor` and `explain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_medattn.data.decode import decode, resize, size_of
from keras_medattn.explain import heatmaps


class Exported(tf.Module):
    """A trained model with its preprocessing and class names, from bytes to answers.

    Every input and output has the batch as dimension 0, or TensorFlow Serving could not batch it.

    - `serving_default`: `image_bytes (B,)` -> `probabilities (B, C)`, `label (B,)` int64, `class_name (B,)`
    - `tensor`: `image (B, H, W, 3)` uint8 -> the same
    - `explain`: `image_bytes (B,)` -> the same, and for the predicted class `attention (B, h, w)` in 0..1;
      where the model has them `boxes (B, K, 4)`, in pixels `(x0, y0, x1, y1)` of the sent image, and
      `weights (B, K)`, contributions to the class's score, highest first.

    The label is the most probable class; with a `threshold` it is class 1 where its probability is at least
    that, else class 0, and the evidence is for the most probable class all the same.

    Args:
        model: a trained model of this package.
        class_names: in the order of the scores.
        image_size: the model's `(height, width)`.
        window: intensity window of 16-bit images, or None.
        max_pixels: larger images fail before they are decoded.
        temperature: divides the scores before the softmax; 1 until it is fitted.
        threshold: of two classes, the probability from which the second is answered, or None.
        scaled: decode JPEGs towards the model's size, as `data.scaled_decoding` says.
    """

    def __init__(
        self,
        model: Any,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        window: tuple[float, float] | None,
        max_pixels: int,
        temperature: float = 1.0,
        threshold: float | None = None,
        scaled: bool = False,
    ):
        super().__init__(name="exported")
        self.model, self.image_size = model, (image_size[0], image_size[1])
        self.towards = self.image_size if scaled else None
        self.window, self.max_pixels = window, max_pixels
        self.class_names = tf.constant(list(class_names))
        self.temperature = tf.constant(temperature, tf.float32)
        self.threshold = threshold

    def signatures(self) -> dict[str, Any]:
        """Trace the signatures, by their names."""
        data = tf.TensorSpec((None,), tf.string, name="image_bytes")
        image = tf.TensorSpec((None, None, None, 3), tf.uint8, name="image")
        return {
            "serving_default": tf.function(self.from_bytes).get_concrete_function(data),
            "tensor": tf.function(self.from_pixels).get_concrete_function(image),
            "explain": tf.function(self.explain).get_concrete_function(data),
        }

    def from_bytes(self, image_bytes):
        """Answer encoded images."""
        images, _ = self._decoded(image_bytes)
        return self._answers(self.model(images, training=False))

    def from_pixels(self, image):
        """Answer RGB pixels of any one size."""
        return self._answers(self.model(resize(image, self.image_size), training=False))

    def explain(self, image_bytes):
        """Answer encoded images with the evidence for the predicted class."""
        images, sizes = self._decoded(image_bytes)
        found = heatmaps.evidence(self.model, images)
        answers = self._answers(found["scores"])
        answers["attention"] = heatmaps.attention(found["contributions"])
        if "boxes" in found:
            ratio = tf.cast(sizes, tf.float32) / tf.constant(self.image_size, tf.float32)  # (B, 2)
            answers["boxes"] = found["boxes"] * tf.tile(ratio[:, None, ::-1], (1, 1, 2))  # x, y, x, y
            answers["weights"] = found["weights"]
        return answers

    def _decoded(self, image_bytes):
        """Pixels at the model's size `(B, h, w, 3)` uint8, and the sizes `(B, 2)` that were sent."""

        def one(data):
            pixels = decode(data, self.window, self.max_pixels, self.towards)
            return resize(pixels, self.image_size), size_of(data, pixels)

        kinds = (tf.TensorSpec((*self.image_size, 3), tf.uint8), tf.TensorSpec((2,), tf.int32))
        return tf.map_fn(one, image_bytes, fn_output_signature=kinds)

    def _answers(self, scores):
        probabilities = tf.nn.softmax(scores / self.temperature)
        label = tf.argmax(scores, axis=-1)
        if self.threshold is not None:
            label = tf.cast(probabilities[:, 1] >= self.threshold, tf.int64)
        return {
            "probabilities": probabilities,
            "label": label,
            "class_name": tf.gather(self.class_names, label),
        }
