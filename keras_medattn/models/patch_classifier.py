"""Any classifier on the patches that a trained attention finds (Sinigaglia, section XI.A)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras

from keras_medattn.models.attention_sampling import AttentionSampling
from keras_medattn.models.precision import at_own_precision
from keras_medattn.models.sampling_networks import backbone_classifier
from keras_medattn.ops.comparison import wide
from keras_medattn.ops.sampling import aggregate

ops: Any = keras.ops  # a type checker would infer its types from one backend

FUSIONS = ("attention", "mean", "vote")
_READING = ("patches", "patch_size", "stride", "replacement", "nms")  # how patches are read


@keras.saving.register_keras_serializable("keras_medattn")
class PatchClassifier(AttentionSampling):
    """A classifier of one's own on the patches that the attention of an `AttentionSampling` finds.

    ```
    scores = sum_t a_t f(patch_t) / sum_t a_t       fuse="attention"
    scores = mean_t f(patch_t)                      "mean"
    scores = log (share of the patches with the highest score in that class)     "vote"
    ```

    Sinigaglia, Scaling mega-pixel images classification via attention sampling, section XI.A. The attention
    is frozen, its batch norm too. In training the patches are drawn from it, and the classifier learns from
    the loss of the scores, or where it votes, from that of each patch with the image's label. `sample` and
    `explain` are those of `AttentionSampling`.

    Args:
        num_classes: scores to answer.
        attention_from: a trained `AttentionSampling`, or the path of one (`RUN/best.keras`), or an attention
            network. In a study of folds it must have been trained without this fold's test images.
        classifier: a name that `backbones.backbone` knows, with a dense layer on its averaged maps; or a
            Keras model, patches `(N, s, s, 3)` in 0..255 to `(N, num_classes)`.
        fuse: `"attention"`, `"mean"` or `"vote"`.
        patches: P. By default, as those below: that of the `AttentionSampling`.
        patch_size: in pixels.
        stride: pixels along the side of a cell.
        weights: of a named classifier: `"imagenet"`, `None`, or a path.
        feature_stride: of a named classifier's maps, in pixels.
        layer: of a named classifier, where to cut it, in place of the stride's layer.
        seed: of the draws.

    Call arguments, input and output shapes: as of `AttentionSampling`.

    Raises:
        ValueError: for an unknown name, a file that holds no `AttentionSampling`, or one whose attention
            depends on what its own features show.

    Example:
        >>> import numpy as np
        >>> trained = AttentionSampling(2, patches=3, patch_size=32, stride=8)
        >>> model = with_classifier(trained, "mobilenet_v3_small", weights=None)
        >>> tuple(model(np.zeros((1, 60, 80, 3), "uint8")).shape)
        (1, 2)
    """

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        attention_from: str | os.PathLike[str] | keras.layers.Layer,
        classifier: str | keras.layers.Layer = "efficientnet_lite0",
        fuse: str = "attention",
        patches: int | None = None,
        patch_size: int | None = None,
        stride: int | None = None,
        weights: str | None = "imagenet",
        feature_stride: int = 32,
        layer: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if fuse not in FUSIONS:
            raise ValueError(f"`fuse` must be one of {FUSIONS}. Received: {fuse!r}")
        source = attention_from
        if isinstance(source, str | os.PathLike):
            source = _load(Path(source))
        reading: dict[str, Any] = {"patches": patches, "patch_size": patch_size, "stride": stride}
        reading = {key: value for key, value in reading.items() if value is not None}
        if isinstance(source, AttentionSampling):
            if source.conditional:
                raise ValueError(
                    "The attention must not depend on what its own features show: train it with "
                    f"conditional=False. Received: {attention_from!r}"
                )
            own = source.get_config()
            reading = {key: own[key] for key in _READING} | reading
            source = source.attention
        if isinstance(classifier, str):
            classifier = backbone_classifier(classifier, num_classes, feature_stride, weights, layer)
        super().__init__(
            num_classes,
            **reading | kwargs,
            attention=source,
            features=classifier,
            repeats=1,
            temperature=1.0,
            entropy=0.0,
            seed=seed,
        )
        self.fuse = fuse
        self._named = {"feature_stride": feature_stride, "layer": layer}

    def build(self, input_shape):
        super().build(input_shape)
        for trainable in (True, False):  # only a change reaches the parts of a reloaded network
            self.attention.trainable = trainable

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The compiled loss of the scores; in training, where they are votes, of each patch."""
        if isinstance(y_pred, dict) and self.fuse == "vote":  # a count of votes has no gradient
            count = self.sampler.patches
            y, sample_weight = (
                None if one is None else ops.repeat(one, count, axis=0) for one in (y, sample_weight)
            )
            y_pred = ops.reshape(y_pred["patch_scores"], (-1, self.num_classes))
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def _score(self, patches: Any, training: bool) -> Any:
        return wide(self.features(patches, training=training))

    def _fuse(self, scores: Any, probabilities: Any, drawn: bool) -> Any:
        if self.fuse == "attention":
            return aggregate(scores, probabilities)
        if self.fuse == "mean":
            return ops.mean(scores, axis=1)
        votes = ops.squeeze(ops.top_k(scores, 1)[1], -1)  # (B R, P); an argmax of floats has no LiteRT form
        share = ops.mean(ops.one_hot(votes, self.num_classes), axis=1)
        return ops.log(ops.maximum(share, 1e-6))

    def _shares(self, probabilities: Any) -> Any:
        if self.fuse == "attention":
            return super()._shares(probabilities)
        return ops.ones_like(probabilities) / self.sampler.patches

    def get_config(self):
        config = super().get_config()
        kept = ("name", "trainable", "dtype", "num_classes", "weights", "seed", *_READING)
        return {key: config[key] for key in kept} | {
            "attention_from": config["attention"],
            "classifier": config["features"],
            "fuse": self.fuse,
            **self._named,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("attention_from", "classifier"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


def with_classifier(
    model: AttentionSampling,
    classifier: str | keras.layers.Layer,
    fuse: str = "attention",
    **arguments: Any,
) -> PatchClassifier:
    """Put a stronger classifier on the patches that a trained model finds; the attention stays as it is.

    Args:
        model: a trained `AttentionSampling`. Its attention network is shared, and frozen.
        classifier: see `PatchClassifier`.
        fuse: `"attention"`, `"mean"` or `"vote"`.
        **arguments: further ones of `PatchClassifier`, such as `patches` or `weights`.

    Example:
        >>> small = keras.Sequential([keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(3)])
        >>> with_classifier(AttentionSampling(3, patches=5), small, fuse="vote").sampler.patches
        5
    """
    return PatchClassifier(model.num_classes, model, classifier, fuse, **arguments)


def _load(path: Path) -> AttentionSampling:
    if not path.is_file():
        raise ValueError(f"attention_from: there is no file {path}. Give RUN/best.keras of a trained run")
    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(model, AttentionSampling):
        raise ValueError(
            f"attention_from must be an AttentionSampling. Received: {path}, a {type(model).__name__}"
        )
    return model
