"""Gated attention and instance fusion of Fan et al. (2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_medattn.layers import (
    ChannelSelfAttention,
    DualAttention,
    GatedAttention,
    GlobalContext,
    InstanceCrops,
    NonLocal,
    SqueezeExcite,
)
from keras_medattn.models import backbones
from keras_medattn.models.precision import at_own_precision, exact
from keras_medattn.ops.comparison import wide

ops: Any = keras.ops  # a type checker would infer its types from one backend

ATTENTION: dict[str, Callable[..., keras.layers.Layer]] = {
    "gated": GatedAttention,
    "non_local": NonLocal,
    "channel": ChannelSelfAttention,
    "dual": DualAttention,
    "squeeze_excite": SqueezeExcite,
    "global_context": GlobalContext,
}
_SAMPLES = 8  # places read along an axis for each pixel of the overview


@keras.saving.register_keras_serializable("keras_medattn")
class GatedFusion(keras.Model):
    """Attention on an overview finds instances; the image's and the instances' features decide together.

    ```
    X = backbone(overview(image))                    (B, h, w, C)
    X', Omega = attention(X)                         Omega (B, h, w): the mean of X' over the channels
    Y_g = W_g GAP(X') + b_g
    f_k = GAP(instances(crop_k(image, Omega)))       (B, K, D), 0 in the slots without an instance
    Y_f = W_f [GAP(X'), f_1, ..., f_K] + b_f         the answer
    loss = lambda CE(Y_g) + (1 - lambda) CE(Y_f)     in training; CE(Y_f) in evaluation
    ```

    Fan et al., "Microscopic Fine-Grained Instance Classification Through Deep Attention", section 2 and
    equation 3. Lambda is the weight `balance`; `fit` lowers it as the epochs pass. As long as it is 1, for 20
    epochs in the paper, Y_f learns nothing.

    The backbones are the paper's as the arguments stand. Where the paper is read literally the gates reach
    the loss through a threshold alone, and get no gradient: here Y_g and Y_f are taken from the gated
    features.

    The overview averages 8 x 8 places for each of its pixels, which an exported graph can do as well; it is
    a plain bilinear resize where it enlarges.

    Args:
        num_classes: scores to answer.
        attention: `"gated"`, a `GatedAttention` of `filters`; or of the paper's Table 2 `"non_local"`,
            `"channel"`, `"dual"`, `"squeeze_excite"` or `"global_context"`; or a layer that answers as these.
        backbone: of the overview: a name that `backbones.backbone` knows, or a Keras model from images in
            0..255 to maps.
        instance_backbone: of the crops, likewise.
        weights: of named backbones: `"imagenet"`, `None`, or a path; or two of them, one for each, as of
            ResNet-18, for which Keras has no weights.
        stride: of the maps of named backbones, in pixels.
        overview_size: rows and columns of the overview.
        k: crops an image.
        crop_size: rows and columns of each crop.
        threshold: see `InstanceCrops`.
        level: see `InstanceCrops`.
        gate_global: `False` takes Y_g and Y_f from X in place of X', as the paper has it; then the attention
            module is not trained.
        schedule: of lambda: the arguments of the `LossBalance` that `fit` adds to its callbacks. Empty: none,
            lambda stays what `balance` is set to.
        freeze_batch_norm: keep the statistics and scales of named backbones' batch norm. Otherwise the
            slots without an instance enter the statistics as black crops.
        filters: of each dilated block of `"gated"`: 512, as many as the paper's maps have channels. On a
            frozen backbone they are most of what training costs.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float, in full resolution; preprocessing is inside. Height
        and width may be unknown.

    Output shape:
        `(B, num_classes)`, the class scores Y_f before the softmax, float32. With `training=True` a dict of
        `scores`, Y_f, and `global_scores`, Y_g.

    Raises:
        ValueError: for an unknown attention module or backbone.

    Example:
        >>> import numpy as np
        >>> small = {"backbone": "mobilenet_v3_small", "instance_backbone": "mobilenet_v3_small"}
        >>> model = GatedFusion(2, weights=None, overview_size=64, crop_size=32, k=2, **small)
        >>> tuple(model(np.zeros((1, 300, 200, 3), "uint8")).shape)
        (1, 2)
    """

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        attention: str | keras.layers.Layer = "gated",
        backbone: str | keras.Model = "resnet18",
        instance_backbone: str | keras.Model = "resnet50",
        weights: str | Sequence[str | None] | None = "imagenet",
        stride: int = 32,
        overview_size: int = 224,
        k: int = 4,
        crop_size: int = 336,
        threshold: str = "mean",
        level: float = 0.5,
        gate_global: bool = True,
        schedule: Sequence[float] = (0.1, 20, 0.0),
        freeze_batch_norm: bool = True,
        filters: int = 512,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if isinstance(attention, str) and attention not in ATTENTION:
            raise ValueError(
                f"`attention` must be one of {tuple(ATTENTION)}, or a layer. Received: {attention!r}"
            )
        if overview_size < 1:
            raise ValueError(f"`overview_size` must be at least 1. Received: {overview_size}")
        self.num_classes, self.stride, self.overview_size = num_classes, stride, overview_size
        self.gate_global, self.freeze_batch_norm = gate_global, freeze_batch_norm
        self.schedule, self.filters = tuple(schedule), filters
        pair = (weights, weights) if weights is None or isinstance(weights, str) else tuple(weights)
        self.backbone, self.instance_backbone = (
            backbones.backbone(one, stride, its, freeze_batch_norm) if isinstance(one, str) else one
            for one, its in zip((backbone, instance_backbone), pair, strict=True)
        )
        if isinstance(attention, str):
            first = (filters,) if attention == "gated" else ()
            attention = ATTENTION[attention](*first, name="attention")
        self.attention = attention
        self.crops = InstanceCrops(k, crop_size, threshold=threshold, level=level, name="crops")
        self.global_head = keras.layers.Dense(num_classes, dtype=exact(), name="global_head")
        self.head = keras.layers.Dense(num_classes, dtype=exact(), name="head")

    @property
    def backbones(self) -> list[keras.Model]:
        """The networks that begin with weights of their own."""
        return [self.backbone, self.instance_backbone]

    @property
    def ready_epoch(self) -> int:
        """The first epoch, from 0, in which Y_f learns: `schedule` leaves lambda at 1 until then."""
        return math.ceil(LossBalance(*self.schedule).every) if self.schedule else 0

    def build(self, input_shape):
        maps = self.backbone.compute_output_shape((None, self.overview_size, self.overview_size, 3))
        crop_size, instances = self.crops.crop_size, self.crops.k
        features = self.instance_backbone.compute_output_shape((None, crop_size, crop_size, 3))[-1]
        if not self.attention.built:  # one that was given or reloaded may be
            self.attention.build(maps)
        self.global_head.build((None, maps[-1]))
        self.head.build((None, maps[-1] + instances * features))
        self.balance = self.add_weight(
            (), initializer="ones", trainable=False, name="balance", autocast=False
        )
        self.built = True

    def call(self, images, training=None):
        found = self._found(images, self.features(images, training), training)
        if training:
            return {name: found[name] for name in ("scores", "global_scores")}
        return found["scores"]

    def features(self, images, training=None):
        """Maps `(B, h, w, C)` of the images' overviews."""
        return self.backbone(overview(images, self.overview_size), training=training)

    def explain(self, images) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        An instance's weight is what it adds to the predicted class's score; the instances are sorted by it,
        highest first, in front of the empty slots.

        Returns:
            `maps (B, h, w, C)`; what the attention module has: `attention (B, h, w)` always, and
            `semantic (B, h, w)` and `gates (B, C)` of the gated one; `boxes (B, K, 4)` in pixels
            `(x0, y0, x1, y1)` of the images, `weights (B, K)`, `shares (B, K)` of the instances in the
            attention above the threshold, and `mask (B, K)`, true where there is an instance; `above (B, L,
            L)`, true where the attention is above the threshold; `scores` and `global_scores (B,
            num_classes)`.
        """
        found = self._found(images, self.features(images, training=False), training=False)
        features = found.pop("instances")  # (B, K, D)
        slots = features.shape[1:]
        kernel: Any = ops.transpose(self.head.kernel)[:, -slots[0] * slots[1] :]
        kernel = ops.take(ops.reshape(kernel, (-1, *slots)), ops.argmax(found["scores"], axis=-1), axis=0)
        weights = ops.sum(features * kernel, axis=-1)  # (B, K)
        order = ops.argsort(ops.where(found["mask"], -weights, float("inf")), axis=-1)
        found["boxes"] = ops.take_along_axis(found["boxes"], ops.expand_dims(order, -1), axis=1)
        for name, values in {"weights": weights, "shares": found["shares"], "mask": found["mask"]}.items():
            found[name] = ops.take_along_axis(values, order, axis=1)
        return found

    @property
    def callbacks(self) -> list[keras.callbacks.Callback]:
        """What a training loop must call before its own callbacks: the schedule of lambda."""
        return [LossBalance(*self.schedule)] if self.schedule else []

    def fit(self, *args, callbacks=None, **kwargs):
        """As of any Keras model, with the schedule of lambda."""
        given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        return super().fit(*args, callbacks=[*self.callbacks, *given], **kwargs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Equation 3 in training, and in evaluation the loss of the answer."""
        compiled = super().compute_loss
        if not isinstance(y_pred, dict):
            return compiled(x, y, y_pred, sample_weight, training)
        fused, whole = (
            compiled(x, y, y_pred[name], sample_weight, training) for name in ("scores", "global_scores")
        )
        return self.balance * whole + (1 - self.balance) * fused  # the shares of added losses sum to 1, too

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        scores = y_pred["scores"] if isinstance(y_pred, dict) else y_pred
        return super().compute_metrics(x, y, scores, sample_weight)

    def _found(self, images: Any, maps: Any, training: bool | None) -> dict[str, Any]:
        refined, attended = self.attention(maps, training=training, return_attention_scores=True)
        crops, boxes, mask, of_crops = self.crops(attended["attention"], images, return_attention_scores=True)
        pooled = _pool(refined if self.gate_global else maps)  # (B, C)
        count, size = self.crops.k, self.crops.crop_size
        features = _pool(self.instance_backbone(ops.reshape(crops, (-1, size, size, 3)), training=training))
        features = ops.reshape(features, (-1, count, features.shape[-1]))  # (B, K, D)
        features = ops.where(ops.expand_dims(mask, -1), features, 0)
        return {
            **attended,
            "maps": maps,
            "instances": features,
            "boxes": boxes,
            "mask": mask,
            "shares": of_crops["weights"],
            "above": of_crops["above"],
            "scores": self.fuse(pooled, features),
            "global_scores": self.global_head(pooled),
        }

    def fuse(self, pooled, features):
        """Class scores from the image's features `(B, C)` and the instances' `(B, K, D)`."""
        flat = ops.reshape(features, (-1, features.shape[1] * features.shape[2]))  # (B, K D)
        return self.head(ops.concatenate([pooled, flat], axis=-1))

    def get_config(self):
        config = super().get_config()
        config.update(
            num_classes=self.num_classes,
            attention=keras.saving.serialize_keras_object(self.attention),
            backbone=keras.saving.serialize_keras_object(self.backbone),
            instance_backbone=keras.saving.serialize_keras_object(self.instance_backbone),
            weights=None,
            stride=self.stride,
            overview_size=self.overview_size,
            k=self.crops.k,
            crop_size=self.crops.crop_size,
            threshold=self.crops.threshold,
            level=self.crops.level,
            gate_global=self.gate_global,
            schedule=self.schedule,
            freeze_batch_norm=self.freeze_batch_norm,
            filters=self.filters,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for name in ("attention", "backbone", "instance_backbone"):
            config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects)
        return cls(**config)


class LossBalance(keras.callbacks.Callback):
    """Lowers the share lambda of the global loss of a `GatedFusion` as the epochs pass.

    `lambda = max(floor, 1 - drop (epoch // every))`, epochs counted from 0; by default as in Fan et al. The
    model's `fit` adds it by the model's `schedule`.

    Args:
        drop: taken off each time.
        every: epochs between two drops.
        floor: the least lambda.

    Example:
        >>> model = GatedFusion(2, backbone="vgg16", instance_backbone="vgg16", weights=None)
        >>> model.build((None, 512, 512, 3))
        >>> schedule = LossBalance()
        >>> schedule.set_model(model)
        >>> schedule.on_epoch_begin(40)
        >>> round(float(model.balance), 6)
        0.8
    """

    def __init__(self, drop: float = 0.1, every: float = 20, floor: float = 0.0):
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` must be at least 1. Received: every={every}")
        self.drop, self.every, self.floor = drop, every, floor

    def on_epoch_begin(self, epoch, logs=None):
        self.model.balance.assign(max(self.floor, 1 - self.drop * (epoch // self.every)))


def overview(images: Any, size: int) -> Any:
    """Resizes images to `size` x `size`, each pixel the mean of what it covers.

    Along an axis that shrinks by s, a pixel is the mean of 8 places spread evenly over `s - 1` pixels around
    its centre, each read bilinearly: a single bilinear read where s is 1 or less, nearly the mean over its
    area up to 16. The image is converted to float piece by piece.

    Args:
        images: tensor `(B, H, W, C)` of any type.
        size: rows and columns of the answer.

    Returns:
        Tensor `(B, size, size, C)`, float32, or float64 where the images are.

    Example:
        >>> images = ops.reshape(ops.arange(16, dtype="float32"), (1, 1, 16, 1))
        >>> [float(value) for value in ops.reshape(overview(images, 2)[0, 0], (-1,))]
        [3.5, 11.5]
    """
    return _shrink(_shrink(images, 1, size), 2, size)


def _shrink(images: Any, axis: int, size: int) -> Any:
    dtype = keras.backend.result_type(images.dtype, "float32")
    length = ops.convert_to_tensor(ops.shape(images)[axis], "int32")
    step = ops.cast(length, "float32") / size
    centres = (ops.arange(size, dtype="float32") + 0.5) * step - 0.5
    shape = [1, 1, 1, 1]
    shape[axis] = size
    total = 0
    for sample in range(_SAMPLES):
        places = centres + ((sample + 0.5) / _SAMPLES - 0.5) * ops.maximum(step - 1, 0)
        places = ops.clip(places, 0, ops.cast(length - 1, "float32"))
        low = ops.cast(ops.floor(places), "int32")
        share = ops.cast(ops.reshape(places - ops.cast(low, "float32"), shape), dtype)
        before, after = (
            ops.cast(ops.take(images, index, axis=axis), dtype)
            for index in (low, ops.minimum(low + 1, length - 1))
        )
        total = total + before + (after - before) * share
    return total / _SAMPLES


def _pool(maps: Any) -> Any:
    """The mean over the positions."""
    return ops.mean(wide(maps), axis=(1, 2))
