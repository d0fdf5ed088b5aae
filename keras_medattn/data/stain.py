"""Stains of histology: absorbed light as amounts of dyes, and an augmentation that varies these."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

ops: Any = keras.ops

# Optical density of red, green and blue under haematoxylin, eosin and DAB (Ruifrok and Johnston, 2001).
DENSITIES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DARKEST = 1.0  # of 255: a black pixel has no logarithm


def to_stains(images: Any) -> Any:
    """RGB to amounts of haematoxylin, eosin and DAB: `-log10(images / 255) D^-1`, D being `DENSITIES`.

    After Ruifrok and Johnston (2001), "Quantification of histochemical staining by color deconvolution".
    Values below 1 count as 1. Amounts below 0, of colours that no mixture of the three has, are kept.

    Args:
        images: `(..., 3)` in 0..255.

    Example:
        >>> white = np.full((1, 3), 255.0, np.float32)
        >>> np.abs(np.asarray(to_stains(white))).round(3).tolist()
        [[0.0, 0.0, 0.0]]
    """
    images = ops.cast(images, "float32")
    density = -ops.log10(ops.maximum(images, _DARKEST) / 255.0)
    return ops.matmul(density, ops.cast(np.linalg.inv(DENSITIES), "float32"))


def from_stains(stains: Any) -> Any:
    """Amounts of haematoxylin, eosin and DAB to RGB: `255 10^(-stains D)`, clipped to 0..255.

    Args:
        stains: `(..., 3)`.

    Example:
        >>> pixel = np.array([[180.0, 90.0, 140.0]], np.float32)
        >>> np.asarray(from_stains(to_stains(pixel))).round(2).tolist()
        [[180.0, 90.0, 140.0]]
    """
    density = ops.matmul(ops.cast(stains, "float32"), ops.cast(DENSITIES, "float32"))
    return ops.clip(255.0 * ops.power(10.0, -density), 0.0, 255.0)


@keras.saving.register_keras_serializable("keras_medattn")
class RandomStain(keras.Layer):
    """Varies how strongly each dye of a histology image is taken up, while training.

    `s' = a s + b` for each of the amounts s of haematoxylin, eosin and DAB (`to_stains`), with one a in
    `[1 - alpha, 1 + alpha]` and one b in `[-beta, beta]` for each image and dye, both uniform (Tellez et al.,
    2018, "Whole-slide mitosis detection in H&E breast histology").

    Args:
        alpha: in [0, 1).
        beta: 0 or more, in units of optical density: .05 darkens or lightens by 12%.
        seed: of the layer's own draws. In a recipe the run's seed, the epoch and the image decide instead.

    Input shape:
        `(B, H, W, 3)` or `(H, W, 3)`, RGB in 0..255.

    Output shape:
        The same, float32.

    Raises:
        ValueError: for an alpha or beta outside their range.

    Example:
        >>> images = np.full((2, 4, 4, 3), 200, np.uint8)
        >>> changed = RandomStain(alpha=0.2, beta=0.1, seed=0)(images, training=True)
        >>> bool(np.ptp(np.asarray(changed)[:, 0, 0], axis=0).min() > 0)  # each image has its own
        True
    """

    def __init__(self, alpha: float = 0.05, beta: float = 0.05, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1). Received: {alpha}")
        if beta < 0:
            raise ValueError(f"beta must be 0 or more. Received: {beta}")
        self.alpha, self.beta, self.seed = alpha, beta, seed
        self.generator = keras.random.SeedGenerator(seed)

    def get_random_transformation(self, images: Any, training: bool = True, seed: Any = None) -> Any:
        """Draw a and b, each `(B, 1, 1, 3)`; None where not training. One image counts as a batch of 1."""
        if not training:
            return None
        seed = self.generator if seed is None else seed
        shape = (ops.shape(images)[0] if len(images.shape) == 4 else 1, 1, 1, 3)
        return (
            keras.random.uniform(shape, 1 - self.alpha, 1 + self.alpha, seed=seed),
            keras.random.uniform(shape, -self.beta, self.beta, seed=seed),
        )

    def transform_images(self, images: Any, transformation: Any, training: bool = True) -> Any:
        """Apply what was drawn."""
        if not training or transformation is None:
            return ops.cast(images, "float32")
        factor, shift = transformation
        if len(images.shape) == 3:
            factor, shift = factor[0], shift[0]
        return from_stains(factor * to_stains(images) + shift)

    def call(self, images, training=False):
        drawn = self.get_random_transformation(images, training)
        return self.transform_images(images, drawn, training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"alpha": self.alpha, "beta": self.beta, "seed": self.seed}
