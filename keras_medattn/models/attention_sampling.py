"""Attention sampling of large images (Sinigaglia)."""

from __future__ import annotations

from typing import Any

import keras

from keras_medattn.layers import AttentionSampler, RecurrentSampler
from keras_medattn.models.patch_reading import all_at_once, boxes, one_by_one, unpacked
from keras_medattn.models.precision import at_own_precision, exact
from keras_medattn.models.sampling_networks import (
    AttentionNetwork,
    UniformAttention,
    attention_by_name,
    features_by_name,
)
from keras_medattn.ops.comparison import wide
from keras_medattn.ops.patches import cell_mask, overview
from keras_medattn.ops.sampling import (
    BASELINES,
    aggregate,
    likelihood_rewards,
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
    of `ops.expectation`). An attention that nothing can train adds nothing. Labels are ints or one-hot. An
    image's sample weight (or its class's weight) weighs what it adds to each term; rewards and baselines are
    not weighed. Of the surrogate only the gradient means something, and only it is weighed.

    Args:
        num_classes: scores to answer.
        patches: P, the number of patches an image.
        patch_size: s, in pixels; more than `stride`.
        stride: pixels along the side of a cell. Up to `stride - 1` pixels at the right and the lower border
            fall under no cell.
        attention: `"paper"`, of 1,513 parameters; `"wide"`, its 8 filters made 32; `"uniform"`, the same
            everywhere, the baseline: there P cells that are the same for all images are read where the others
            choose; or a Keras model, overview `(B, h, w, 3)` in 0..1 to a map `(B, h, w)` with sum 1.
        features: `"paper"`, of 7,459 parameters for three classes, whose answer has norm 1; `"wide"`, its 16
            filters made 32, as in the author's checkpoints; a name that `backbones.backbone` knows, with a
            dense layer on its pooled maps, and norm 1 as well; or a Keras model, patches `(N, s, s, 3)` in
            0..1 to `(N, num_classes)`.
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
        conditional: whether each cell is drawn or chosen in view of the patches read before, by a
            `RecurrentSampler` (section XI.B) that sees x_3 of an `AttentionNetwork`, else the overview. `nms`
            is not used then, and `"mean"` is the plain mean over the draws. Its memory grows with cells times
            draws: take a larger `stride`.
        pool: `"max"` or `"average"` over a patch, in a named feature network.
        weights: of a named backbone: `"imagenet"`, `None`, or a path.
        feature_stride: of a named backbone's maps, in pixels.
        layer: of a named backbone, where to cut it, in place of the stride's layer.
        seed: of the draws. By default one is drawn, and kept in the configuration.

    Call arguments:
        inputs: the images; or a dict of `image` and one of these or both: `size`, `(B, 2)` int: the rows and
            columns of each image in a batch padded to the largest (an attention network of one's own gets a
            `mask` with it); `examples`, `(B,)` int: the images' numbers in a batch that replicas share.
        training: in training the answer is a dict of what the loss is made of, `repeats` rows an image:
            `scores (B R, num_classes)`, `patch_scores (B R, P, num_classes)`, `log_probs (B R, P)`, `cells
            (B R, P)`, and `attention (B, h, w)`.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; only the overview and the patches are ever float.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown name, a patch no larger than a cell, or `"self_weighted"` or
            `conditional` with `"expectation"`.

    Example:
        >>> import numpy as np
        >>> model = AttentionSampling(2, patches=3, patch_size=12, stride=5)
        >>> tuple(model(np.zeros((1, 60, 80, 3), "uint8")).shape)
        (1, 2)
    """

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        patches: int = 20,
        patch_size: int = 50,
        stride: int = 5,
        attention: str | keras.layers.Layer = "paper",
        features: str | keras.layers.Layer = "paper",
        estimator: str = "reinforce",
        aggregation: str = "self_weighted",
        replacement: bool = True,
        reward: str = "patch",
        baseline: str = "leave_one_out",
        repeats: int = 4,
        temperature: float = 3.0,
        entropy: float = 0.05,
        nms: bool = True,
        conditional: bool = False,
        pool: str = "max",
        weights: str | None = "imagenet",
        feature_stride: int = 32,
        layer: str | None = None,
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
        if estimator == "expectation" and (aggregation == "self_weighted" or conditional):
            raise ValueError(
                "estimator='expectation' needs aggregation='mean' and conditional=False: weights `a` over "
                "cells drawn from `a`, or not from `a` alone, estimate no expectation. Received: "
                f"estimator={estimator!r}, aggregation={aggregation!r}, conditional={conditional}"
            )
        if num_classes < 2 or repeats < 1 or patch_size <= stride:
            raise ValueError(
                "`num_classes` must be 2 or more, `repeats` 1 or more, and `patch_size` above `stride`. "
                f"Received: num_classes={num_classes}, repeats={repeats}, patch_size={patch_size}, "
                f"stride={stride}"
            )
        self._named = {"pool": pool, "feature_stride": feature_stride, "layer": layer}
        self.num_classes, self.patch_size, self.stride = num_classes, patch_size, stride
        self.estimator, self.aggregation, self.reward, self.baseline = chosen.values()
        self.repeats, self.temperature, self.entropy = repeats, float(temperature), float(entropy)
        self.nms, self.conditional = nms, conditional
        self.attention = attention_by_name(attention) if isinstance(attention, str) else attention
        if isinstance(features, str):
            features = features_by_name(features, num_classes, pool, weights, feature_stride, layer)
        self.features = features
        for network in (self.attention, self.features):
            if not isinstance(network, keras.layers.Layer):
                raise ValueError(
                    f"`attention` and `features` must be names or Keras models. Received: {network!r}"
                )
        self.sampler: Any = (
            RecurrentSampler(patches, 16, replacement, seed, num_classes, dtype=exact(), name="sampler")
            if conditional
            else AttentionSampler(
                patches, patch_size, replacement, stride, nms, seed, dtype=exact(), name="sampler"
            )
        )

    numbered = True  # replicas that share a batch tell it each example's number

    @property
    def backbones(self) -> list[keras.Model]:
        """The models inside the feature network: those that a recipe freezes, or trains more slowly."""
        return [one for one in getattr(self.features, "layers", []) if isinstance(one, keras.Model)]

    @property
    def learns(self) -> bool:
        """Whether there is anything to train in where it looks."""
        return bool(self.attention.trainable_weights or self.sampler.trainable_weights)

    def build(self, input_shape):
        shape = input_shape["image"] if isinstance(input_shape, dict) else input_shape
        cells = [None if length is None else length // self.stride for length in shape[1:3]]
        size = self.patch_size
        for network, given in (
            (self.attention, (None, *cells, shape[-1])),
            (self.features, (None, size, size, shape[-1])),
        ):
            if not network.built:
                network.build(given)
        if not self.sampler.built:
            own = self.attention.filters if isinstance(self.attention, AttentionNetwork) else shape[-1]
            read = (None, *cells, own) if self.conditional else (None, *shape[1:])
            self.sampler.build((None, *cells), read)
        self.built = True

    def call(self, inputs, training=None):
        if training:
            return self._pass(inputs, self.repeats, training=True)
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
        scores = self._pass(inputs, draws, first=-2 - seed * draws)["scores"]
        return ops.reshape(scores, (-1, draws, self.num_classes))

    def explain(self, inputs, draw: int | None = None) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        A patch's weight is what it adds to the predicted class's score, `T a_t f_t / sum_t a_t`; the patches
        are sorted by it, highest first.

        Args:
            inputs: as for the call.
            draw: explain the Monte-Carlo draw of this number, the first of `sample(seed=draw, draws=1)`, in
                place of the answer. A patch's weight is then as if it had been chosen.

        Returns:
            `attention (B, h, w)`, `scores (B, num_classes)`, and of the patches `cells (B, P)`, `boxes
            (B, P, 4)`, in pixels `(x0, y0, x1, y1)` of the input, cut to the image, `weights (B, P)`, and
            `shares (B, P)`, `a / sum a`.
        """
        images, size, _ = unpacked(inputs)
        found = self._pass(inputs, first=None if draw is None else -2 - draw)
        attention, scores, cells = found["attention"], found["scores"], found["cells"]
        shares = self._shares(self._probabilities(attention, cells))
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
            "boxes": boxes(cells, attention, images, size, self.patch_size, self.stride),
            "weights": weights,
            "shares": shares,
        }

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The compiled loss, and in training what the attention network learns from."""
        if not isinstance(y_pred, dict):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        spread = _mean(negative_entropy(y_pred["attention"]), sample_weight)
        y, sample_weight = self._repeated(y, sample_weight)
        loss = super().compute_loss(x, y, y_pred["scores"], sample_weight, training)
        if not self.learns:
            return loss
        loss = loss + self.entropy * spread
        if self.estimator == "expectation":
            return loss
        logs = y_pred["log_probs"]
        if sample_weight is not None:
            fixed = ops.stop_gradient(logs)
            logs = fixed + _weighed(logs - fixed, sample_weight)  # the gradient alone is weighed
        of = y_pred["scores" if self.reward == "image" else "patch_scores"]
        rewards = likelihood_rewards(of, y)
        if self.conditional and self.reward == "patch":
            logs = ops.cumsum(logs, axis=1)  # a patch's reward is owed to all draws up to its own
        surrogate = reinforce_surrogate(
            logs, rewards, self.baseline, self.repeats, self.conditional or self.sampler.replacement
        )
        return loss + _mean(ops.reshape(surrogate, (1,)))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if isinstance(y_pred, dict):
            y, sample_weight = self._repeated(y, sample_weight)
            y_pred = y_pred["scores"]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _pass(
        self, inputs: Any, rows: int = 1, first: int | None = None, training: bool = False
    ) -> dict[str, Any]:
        """All that the model makes of the images, in so many rows an image.

        The cells are drawn in training; by the numbers `first`, `first - 1`, ...; or chosen.
        """
        images, size, examples = unpacked(inputs)
        view, named = overview(images, self.stride, size), {}
        if size is not None:
            named["mask"] = cell_mask(size, ops.shape(view)[1:3], ops.shape(images)[1:3], self.stride)
        attention, maps = self._attend(view / 255, named, training)
        if len(attention.shape) != 3 or attention.shape[1:] != view.shape[1:3]:
            raise ValueError(
                "`attention` must answer a number for each cell of the overview. Received: "
                f"overview {tuple(view.shape)}, answer {tuple(attention.shape)}"
            )
        if self.conditional and examples is not None:  # of each row
            examples = ops.expand_dims(examples * rows, 1) + ops.arange(rows, dtype=examples.dtype)
            examples = ops.reshape(examples, (-1,))
        drawn_by = {"training": True} if examples is None else {"training": True, "examples": examples}
        calls: list[dict[str, Any]] = [drawn_by] * rows if training else [{}]
        if first is not None:
            calls = [{"draw": first - row} for row in range(rows)]
        elif not training and isinstance(self.attention, UniformAttention):
            # of an even map none is the most probable: the same cells for every image, drawn once
            calls = [{"draw": -1, "examples": ops.zeros(ops.shape(view)[:1], "int32")}]

        def score(patches: Any) -> Any:
            return self._score(patches, training)

        if self.conditional:
            geometry = self.patch_size, self.stride
            read = one_by_one(self.sampler, score, attention, maps, images, size, geometry, rows, calls[0])
        else:
            read = all_at_once(self.sampler, score, attention, images, size, calls)
        scores, cells, log_probs = read  # (B R, P, N), (B R, P), (B R, P)
        drawn = training or first is not None
        return {
            "scores": self._fuse(scores, self._probabilities(attention, cells, rows), drawn),
            "patch_scores": scores,
            "log_probs": log_probs,
            "cells": cells,
            "attention": attention,
        }

    def _attend(self, view: Any, named: dict[str, Any], training: bool) -> tuple[Any, Any]:
        """The attention `(B, h, w)`, and maps `(B, h, w, D)` for a sampler that looks at the cells."""
        if self.conditional and isinstance(self.attention, AttentionNetwork):
            maps = self.attention.maps(view, training=training, **named)
            return self.attention.weigh(maps, **named), maps
        return self.attention(view, training=training, **named), view

    def _score(self, patches: Any, training: bool) -> Any:
        """Class scores `(M, N)` of patches `(M, s, s, C)` in 0..255."""
        return self.temperature * wide(self.features(patches / 255, training=training))

    def _fuse(self, scores: Any, probabilities: Any, drawn: bool) -> Any:
        """Class scores of rows `(B R, N)` from those of their patches `(B R, P, N)`."""
        # draws in view of others are no draws from `a`: of those the mean is the plain one
        replacement = self.conditional or self.sampler.replacement
        return aggregate(scores, probabilities, self.aggregation, self.estimator, replacement, drawn)

    def _shares(self, probabilities: Any) -> Any:
        """What each of the chosen patches `(B, P)` counts."""
        return probabilities / ops.sum(probabilities, axis=1, keepdims=True)

    def _probabilities(self, attention: Any, cells: Any, repeats: int = 1) -> Any:
        """`a (B R, P)` of cells `(B R, P)`: not those given the draws before, which the sampler answers."""
        count = self.sampler.patches
        drawn = ops.reshape(cells, (-1, repeats * count))
        return ops.reshape(ops.exp(log_probabilities(attention, drawn, replacement=True)), (-1, count))

    def _repeated(self, *each: Any) -> list[Any]:
        """Labels and weights of images as those of their rows."""
        return [None if one is None else ops.repeat(one, self.repeats, axis=0) for one in each]

    def get_config(self):
        config, sampler = super().get_config(), self.sampler
        config.update(
            num_classes=self.num_classes,
            patches=sampler.patches,
            patch_size=self.patch_size,
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
            nms=self.nms,
            conditional=self.conditional,
            weights=None,
            **self._named,
            seed=sampler.seed,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("attention", "features"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


class MeanOfTerms(keras.losses.Loss):
    """Keras's own mean of terms over a batch: a share of it where replicas add theirs up."""

    def call(self, y_true, y_pred):
        return y_pred


def _mean(terms: Any, weight: Any = None) -> Any:
    return MeanOfTerms()(0.0, terms, weight)


def _weighed(terms: Any, weight: Any) -> Any:
    """Terms `(B, ...)` times a weight `(B,)` or None."""
    if weight is None:
        return terms
    return terms * ops.cast(ops.reshape(weight, (-1, *[1] * (len(terms.shape) - 1))), terms.dtype)
