"""Attention sampling of large images (Sinigaglia)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.layers import AttentionSampler
from keras_medattn.models.sampling_networks import attention_network, feature_network
from keras_medattn.ops.patches import cell_mask, cells_to_corners, overview
from keras_medattn.ops.sampling import (
    BASELINES,
    aggregate,
    log_probabilities,
    negative_entropy,
    reinforce_surrogate,
)

ops: Any = keras.ops  # a type checker would infer its types from one backend

_CHOICES = {
    "estimator": ("reinforce", "expectation"),
    "aggregation": ("self_weighted", "mean"),
    "reward": ("patch", "image"),
    "baseline": BASELINES,
}


@keras.saving.register_keras_serializable("keras_medattn")
class AttentionSampling(keras.Model):
    """Classifies a large image by a few of its patches, read where an attention network says.

    ```
    a = attention(overview(x) / 255)                         over the cells of stride x stride pixels
    cell_t ~ a in training, else the most probable cells whose patches do not overlap, t = 1 ... P
    f_t = features(patch_t / 255)                            patch_t: s x s pixels around the cell's centre
    scores = T sum_t a_t f_t / sum_t a_t
    ```

    Sinigaglia, Scaling mega-pixel images classification via attention sampling, Eq. 1; T = 3 is the author's
    code's and not in the text, where it is 1. The feature network learns from the compiled loss of `scores`.
    `compute_loss` adds what the attention network learns from, with the reward r = exp(-cross entropy) of a
    patch alone or of the image:

    ```
    loss = compiled(y, scores) - mean((r - b) log a[cell]) + entropy mean(sum_p a_p log a_p)
    ```

    With `estimator="expectation"` the second term goes, and the compiled loss itself reaches the attention
    (Katharopoulos and Fleuret, Processing Megapixel Images with Deep Attention-Sampling Models, in the form
    of `ops.expectation`). Labels are ints or one-hot. An image's sample weight (or its class's weight) weighs
    what it adds to each term; rewards and baselines are not weighed. Of the surrogate only the gradient
    means something, and only it is weighed.

    Args:
        num_classes: scores to answer.
        patches: P, the number of patches an image.
        patch_size: s, in pixels; more than `stride`.
        stride: pixels along the side of a cell. Up to `stride - 1` pixels at the right and the lower border
            fall under no cell.
        attention: a Keras model, overview `(B, h, w, 3)` in 0..1 to a map `(B, h, w)` with sum 1. By default
            the paper's of 1,513 parameters.
        features: a Keras model, patches `(N, s, s, 3)` in 0..1 to `(N, num_classes)`. By default the paper's
            of 7,459 parameters, whose answer has norm 1.
        estimator: `"reinforce"`, or `"expectation"`, which needs `aggregation="mean"`.
        aggregation: `"self_weighted"`, as above, or `"mean"`, the unbiased estimate of `sum_p a_p f_p`. Cells
            that are chosen and not drawn are weighted by `a / sum a` in either case.
        replacement: whether a cell may be drawn again.
        reward: `"patch"` or `"image"`.
        baseline: b, as in `ops.advantages`: `"leave_one_out"`, `"batch_mean"` or `"z_score"`.
        repeats: draws of P patches from each image in a training step.
        temperature: T.
        entropy: weight of the negative entropy, which spreads the attention.
        nms: whether chosen patches must not overlap, while there are such.
        seed: of the draws. By default one is drawn, and kept in the configuration.

    Call arguments:
        inputs: the images; or a dict of `image` and `size`, `(B, 2)` int: the rows and columns of each image
            in a batch padded to the largest. An attention network of one's own gets a `mask` with it.
        training: in training the answer is a dict of what the loss is made of, `repeats` rows an image:
            `scores (B R, num_classes)`, `patch_scores (B R, P, num_classes)`, `log_probs (B R, P)`, `cells
            (B R, P)`, and `attention (B, h, w)`.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; only the overview and the patches are ever float.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown name, a patch no larger than a cell, or `"self_weighted"` with
            `"expectation"`.

    Example:
        >>> import numpy as np
        >>> model = AttentionSampling(2, patches=3, patch_size=12, stride=5)
        >>> tuple(model(np.zeros((1, 60, 80, 3), "uint8")).shape)
        (1, 2)
    """

    def __init__(
        self,
        num_classes: int,
        patches: int = 20,
        patch_size: int = 50,
        stride: int = 5,
        attention: keras.Model | None = None,
        features: keras.Model | None = None,
        estimator: str = "reinforce",
        aggregation: str = "self_weighted",
        replacement: bool = True,
        reward: str = "patch",
        baseline: str = "leave_one_out",
        repeats: int = 4,
        temperature: float = 3.0,
        entropy: float = 0.05,
        nms: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        chosen = {
            "estimator": estimator,
            "aggregation": aggregation,
            "reward": reward,
            "baseline": baseline,
        }
        for key, value in chosen.items():
            if value not in _CHOICES[key]:
                raise ValueError(f"`{key}` must be one of {_CHOICES[key]}. Received: {key}={value!r}")
        if estimator == "expectation" and aggregation == "self_weighted":
            raise ValueError(
                "estimator='expectation' needs aggregation='mean': weights `a` over cells drawn from `a` "
                f"estimate no expectation. Received: estimator={estimator!r}, aggregation={aggregation!r}"
            )
        if num_classes < 2 or repeats < 1 or patch_size <= stride:
            raise ValueError(
                "`num_classes` must be 2 or more, `repeats` 1 or more, and `patch_size` above `stride`. "
                f"Received: num_classes={num_classes}, repeats={repeats}, patch_size={patch_size}, "
                f"stride={stride}"
            )
        for network in (attention, features):
            if not isinstance(network, keras.layers.Layer | None):
                raise ValueError(
                    f"`attention` and `features` must be Keras models or None. Received: {network!r}"
                )
        self.num_classes, self.stride, self.repeats = num_classes, stride, repeats
        self.estimator, self.aggregation, self.reward, self.baseline = chosen.values()
        self.temperature, self.entropy = float(temperature), float(entropy)
        self.attention = attention_network() if attention is None else attention
        self.features = feature_network(num_classes) if features is None else features
        self.sampler = AttentionSampler(
            patches, patch_size, replacement, stride, nms, seed, dtype="float32", name="sampler"
        )

    def build(self, input_shape):
        shape = input_shape["image"] if isinstance(input_shape, dict) else input_shape
        cells = [None if length is None else length // self.stride for length in shape[1:3]]
        size = self.sampler.patch_size
        for network, given in (
            (self.attention, (None, *cells, shape[-1])),
            (self.features, (None, size, size, shape[-1])),
        ):
            if not network.built:
                network.build(given)
        if not self.sampler.built:
            self.sampler.build((None, *cells), (None, *shape[1:]))
        self.built = True

    def call(self, inputs, training=None):
        if training:
            return self._pass(inputs, [{"training": True}] * self.repeats, training=True)
        return self._pass(inputs)["scores"]

    def sample(self, inputs, draws: int = 32, seed: int = 0) -> Any:
        """Class scores over patches that are drawn, as in training: their spread tells how sure they are.

        Args:
            inputs: as for the call.
            draws: of P patches from each image.
            seed: of the draws, beside the model's own.

        Returns:
            `(B, draws, num_classes)`.
        """
        # training counts its draws up from 0; below 0 no number is one of its
        calls = [{"draw": -1 - (seed * draws + number)} for number in range(draws)]
        scores = self._pass(inputs, calls)["scores"]
        return ops.reshape(scores, (-1, draws, self.num_classes))

    def explain(self, inputs) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        A patch's weight is what it adds to the predicted class's score, `T a_t f_t / sum_t a_t`; the patches
        are sorted by it, highest first.

        Args:
            inputs: as for the call.

        Returns:
            `attention (B, h, w)`, `scores (B, num_classes)`, and of the patches `cells (B, P)`, `boxes
            (B, P, 4)`, in pixels `(x0, y0, x1, y1)` of the input, cut to the image, `weights (B, P)`, and
            `shares (B, P)`, `a / sum a`.
        """
        images, size = _image_and_size(inputs)
        found = self._pass(inputs)
        attention, scores, cells = found["attention"], found["scores"], found["cells"]
        shares = self._probabilities(attention, cells)
        shares = shares / ops.sum(shares, axis=1, keepdims=True)
        predicted = ops.expand_dims(ops.argmax(scores, axis=-1), (1, 2))  # (B, 1, 1)
        weights = shares * ops.squeeze(ops.take_along_axis(found["patch_scores"], predicted, axis=2), 2)
        order = ops.argsort(-weights, axis=1)
        cells, weights, shares = (
            ops.take_along_axis(each, order, axis=1) for each in (cells, weights, shares)
        )
        return {
            "attention": attention,
            "scores": scores,
            "cells": cells,
            "boxes": self._boxes(cells, attention, images, size),
            "weights": weights,
            "shares": shares,
        }

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The compiled loss, and in training what the attention network learns from."""
        if not isinstance(y_pred, dict):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        spread = ops.mean(_weighed(negative_entropy(y_pred["attention"]), sample_weight))
        y, sample_weight = self._repeated(y, sample_weight)
        loss = super().compute_loss(x, y, y_pred["scores"], sample_weight, training)
        loss = loss + self.entropy * spread
        if self.estimator == "expectation":
            return loss
        logs = y_pred["log_probs"]
        if sample_weight is not None:
            fixed = ops.stop_gradient(logs)
            logs = fixed + _weighed(logs - fixed, sample_weight)  # the gradient alone is weighed
        rewards = self._rewards(y, y_pred["scores" if self.reward == "image" else "patch_scores"])
        return loss + reinforce_surrogate(
            logs, rewards, self.baseline, self.repeats, self.sampler.replacement
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if isinstance(y_pred, dict):
            y, sample_weight = self._repeated(y, sample_weight)
            y_pred = y_pred["scores"]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _pass(self, inputs: Any, calls: Sequence[dict] = ({},), training: bool = False) -> dict[str, Any]:
        """All that the model makes of the images, with a row for each call of the sampler on each image."""
        images, size = _image_and_size(inputs)
        view, named = overview(images, self.stride, size), {}
        if size is not None:
            named["mask"] = cell_mask(size, ops.shape(view)[1:3], ops.shape(images)[1:3], self.stride)
        attention = self.attention(view / 255, training=training, **named)
        if len(attention.shape) != 3 or attention.shape[1:] != view.shape[1:3]:
            raise ValueError(
                "`attention` must answer a number for each cell of the overview. Received: "
                f"overview {tuple(view.shape)}, answer {tuple(attention.shape)}"
            )
        drawn = [self.sampler(attention, images, size, **call) for call in calls]
        patches, cells, log_probs = (
            ops.reshape(ops.stack(each, axis=1), (-1, *each[0].shape[1:]))
            for each in zip(*drawn, strict=True)
        )  # (B R, P, ...)
        scores = self.features(ops.reshape(patches / 255, (-1, *patches.shape[2:])), training=training)
        scores = self.temperature * ops.cast(scores, "float32")
        scores = ops.reshape(scores, (-1, self.sampler.patches, self.num_classes))  # (B R, P, N)
        fused = aggregate(
            scores,
            self._probabilities(attention, cells, len(calls)),
            self.aggregation,
            self.estimator,
            self.sampler.replacement,
            drawn=calls[0] != {},
        )
        return {
            "scores": fused,
            "patch_scores": scores,
            "log_probs": log_probs,
            "cells": cells,
            "attention": attention,
        }

    def _probabilities(self, attention: Any, cells: Any, repeats: int = 1) -> Any:
        """`a (B R, P)` of cells `(B R, P)`: not those given the draws before, which the sampler answers."""
        count = self.sampler.patches
        drawn = ops.reshape(cells, (-1, repeats * count))
        return ops.reshape(ops.exp(log_probabilities(attention, drawn, replacement=True)), (-1, count))

    def _boxes(self, cells: Any, attention: Any, images: Any, size: Any) -> Any:
        patch, pixels = self.sampler.patch_size, ops.shape(images)[1:3]
        corners = cells_to_corners(cells, ops.shape(attention)[1:], pixels, patch, self.stride)
        low, high = [], []
        for axis in (1, 0):
            end = pixels[axis] if size is None else ops.cast(size[:, axis : axis + 1], "int32")
            low.append(ops.maximum(corners[:, :, axis], 0))
            high.append(ops.minimum(corners[:, :, axis] + patch, end))
        return ops.cast(ops.stack(low + high, axis=-1), "float32")

    def _rewards(self, y: Any, scores: Any) -> Any:
        """`exp(-cross entropy)` of each patch `(B R, P)` or image `(B R,)`."""
        if len(y.shape) == 1 or y.shape[-1] == 1:
            y = ops.one_hot(ops.cast(ops.reshape(y, (-1,)), "int32"), self.num_classes)
        y = ops.cast(y, scores.dtype)
        y = ops.expand_dims(y, 1) if len(scores.shape) == 3 else y
        return ops.exp(ops.sum(y * ops.log_softmax(scores, axis=-1), axis=-1))

    def _repeated(self, *each: Any) -> list[Any]:
        """Labels and weights of images as those of their rows."""
        return [None if one is None else ops.repeat(one, self.repeats, axis=0) for one in each]

    def get_config(self):
        config, sampler = super().get_config(), self.sampler
        config.update(
            num_classes=self.num_classes,
            patches=sampler.patches,
            patch_size=sampler.patch_size,
            stride=self.stride,
            attention=keras.saving.serialize_keras_object(self.attention),
            features=keras.saving.serialize_keras_object(self.features),
            estimator=self.estimator,
            aggregation=self.aggregation,
            replacement=sampler.replacement,
            reward=self.reward,
            baseline=self.baseline,
            repeats=self.repeats,
            temperature=self.temperature,
            entropy=self.entropy,
            nms=sampler.nms,
            seed=sampler.seed,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("attention", "features"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


def _image_and_size(inputs: Any) -> tuple[Any, Any]:
    return (inputs["image"], inputs["size"]) if isinstance(inputs, dict) else (inputs, None)


def _weighed(terms: Any, weight: Any) -> Any:
    """Terms `(B, ...)` times a weight `(B,)` or None."""
    if weight is None:
        return terms
    return terms * ops.cast(ops.reshape(weight, (-1, *[1] * (len(terms.shape) - 1))), terms.dtype)
