"""What an exported model of volumes answers: `tensor` and `explain`, both from pixels."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_medattn.data.decode import resize
from keras_medattn.explain import heatmaps
from keras_medattn.export.signatures import Exported


class ExportedVolumes(Exported):
    """A trained model of volumes with its preprocessing and class names, from pixels to answers.

    Volumes have no encoded form that the graph could decode, so there is no `serving_default`.

    - `tensor`: `image (B, S, H, W, 3)` uint8 and `mask (B, S)` bool, true for slices that exist ->
      `probabilities (B, C)`, `label (B,)` int64, `class_name (B,)`
    - `explain`: from the same -> the same, and `slice_scores (B, S, C)`: each slice alone; for the predicted
      class `attention (B, S, h, w)` in 0..1, of each slice alone, on one scale over the volume; and where
      the model has them `boxes (B, K, 4)`, in pixels `(x0, y0, x1, y1)` of the sent slices, `slices (B, K)`
      and `weights (B, K)`, highest first.
    """

    def signatures(self) -> dict[str, Any]:
        """Trace the signatures, by their names."""
        image = tf.TensorSpec((None, None, None, None, 3), tf.uint8, name="image")
        mask = tf.TensorSpec((None, None), tf.bool, name="mask")
        return {
            "tensor": tf.function(self.from_volumes).get_concrete_function(image, mask),
            "explain": tf.function(self.explain_volumes).get_concrete_function(image, mask),
        }

    def from_volumes(self, image, mask):
        """Answer RGB volumes of any one size."""
        return self._answers(self.model({"image": self._sized(image), "mask": mask}, training=False))

    def explain_volumes(self, image, mask):
        """Answer RGB volumes with the evidence for the predicted class."""
        sized = self._sized(image)
        found = self.model.explain({"image": sized, "mask": mask})
        answers = self._answers(found["scores"])
        answers["slice_scores"] = found["slice_scores"]
        answers["attention"] = self._attention(sized, mask, tf.argmax(found["scores"], axis=-1))
        if "boxes" in found:
            sent = tf.cast(tf.shape(image)[2:4], tf.float32)
            ratio = sent / tf.constant(self.image_size, tf.float32)  # height, width
            answers["boxes"] = found["boxes"] * tf.tile(ratio[::-1], (2,))
            answers |= {key: found[key] for key in ("slices", "weights")}
        return answers

    def _sized(self, image):
        shape = tf.shape(image)
        flat = resize(tf.reshape(image, tf.concat([[-1], shape[2:]], axis=0)), self.image_size)
        return tf.reshape(flat, (shape[0], shape[1], *self.image_size, 3))

    def _attention(self, sized, mask, label):
        batch, slices = tf.unstack(tf.shape(mask))
        flat = tf.reshape(sized, (-1, *self.image_size, 3))  # (B S, H, W, 3)
        argued = heatmaps.contributions(self.model, flat, tf.repeat(label, slices))["contributions"]
        rows, columns = tf.unstack(tf.shape(argued)[1:])
        there = tf.reshape(tf.cast(mask, tf.float32), (-1, 1, 1))
        together = heatmaps.attention(tf.reshape(argued * there, (batch, slices * rows, columns)))
        return tf.reshape(together, (batch, slices, rows, columns))
