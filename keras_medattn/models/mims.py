"""The multi-instance multi-scale CNN of Li et al. (2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_medattn.layers import MSConv, TopKPool
from keras_medattn.models import backbones
from keras_medattn.ops.regions import position_to_box

AGGREGATIONS = ("top_k", "max", "mean")


@keras.saving.register_keras_serializable("keras_medattn")
class MIMS(keras.Model):
    """Multi-instance multi-scale CNN: backbone, multi-scale convolution, top-k pooling, a linear head.

    ```
    X = backbone(image)                              (B, h, w, C)
    y_ij = F_j(resize_i(X)), normalised              for each scale i and channel j; F_j tied over scales
    p_j = sum_r w_r a_r                              a_1 >= ... >= a_k: highest of channel j, all scales
    scores = W p + b
    ```

    Li et al., "Multi-Instance Multi-Scale CNN for Medical Image Classification", MICCAI 2019, section 2.
    With `kernels=()` the primary maps are pooled as they are (the paper's MI-Pre) and standardised in front
    of the head, as a linear probe's features are; with `aggregation="mean"` besides, it is the plain
    global-average-pooling classifier.

    Args:
        num_classes: scores to answer.
        backbone: a name that `backbones.backbone` knows, or a Keras model from images in 0..255 to maps.
        stride: of the backbone's maps, in pixels; ignored when a model is given.
        weights: of a named backbone: `"imagenet"`, `None`, or a path.
        kernels: `(size, channels)` of each kernel group.
        scales: of the maps, the same in height and width.
        k: activations that are pooled a channel.
        aggregation: `"top_k"`; `"max"`: the highest activation; `"mean"`: of all of them.
        dropout: share of the pooled features dropped in training.
        freeze_batch_norm: keep the statistics and scales of a named backbone's batch norm.
        layer: of a named backbone, where to cut it, in place of the stride's layer.
        bottleneck: channels of a 1 x 1 convolution with ReLU over the standardised maps, in front of all the
            rest; not in the paper, it helps on frozen backbones. 0: none.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; preprocessing is inside.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown backbone or aggregation, or maps smaller than a kernel.

    Example:
        >>> import numpy as np
        >>> model = MIMS(2, "mobilenet_v3_small", stride=8, weights=None, kernels=((2, 4),), k=3)
        >>> tuple(model(np.zeros((1, 96, 64, 3), "uint8")).shape)
        (1, 2)
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | keras.Model = "efficientnet_lite0",
        stride: int = 16,
        weights: str | None = "imagenet",
        kernels: Sequence[Sequence[int]] = ((2, 8), (3, 10)),
        scales: Sequence[float] = (0.5, 0.75, 1.0),
        k: int = 5,
        aggregation: str = "top_k",
        dropout: float = 0.0,
        freeze_batch_norm: bool = True,
        layer: str | None = None,
        bottleneck: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"`aggregation` must be one of {AGGREGATIONS}. Received: {aggregation!r}")
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be 2 or more. Received: {num_classes}")
        if isinstance(backbone, str):
            backbone = backbones.backbone(backbone, stride, weights, freeze_batch_norm, layer)
        self.backbone = backbone
        self.num_classes, self.stride, self.k = num_classes, stride, k
        self.kernels = tuple((int(size), int(channels)) for size, channels in kernels)
        self.scales = tuple(float(scale) for scale in scales)
        self.aggregation, self.dropout_rate = aggregation, dropout
        self.freeze_batch_norm = freeze_batch_norm
        self.ms_conv = MSConv(self.kernels, self.scales, name="ms_conv") if self.kernels else None
        ranks = {"top_k": k, "max": 1, "mean": None}[aggregation]
        self.pool = None if ranks is None else TopKPool(ranks, name="pool")
        self.bottleneck_channels = bottleneck
        self.bottleneck = _bottleneck(bottleneck) if bottleneck else None
        self.standardise = None
        if not self.kernels:
            self.standardise = keras.layers.BatchNormalization(
                center=False, scale=False, momentum=0.9, name="standardise"
            )
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        self.head = keras.layers.Dense(num_classes, dtype="float32", name="head")

    def build(self, input_shape):
        maps = self.backbone.compute_output_shape(input_shape)
        self.build_head(maps)

    def build_head(self, maps_shape):
        """Build all that follows the backbone, for maps `(B, h, w, C)`."""
        if self.bottleneck is not None:
            self.bottleneck.build(maps_shape)
            maps_shape = (*maps_shape[:-1], self.bottleneck_channels)
        channels = maps_shape[-1]
        self.flatten = keras.layers.Reshape((-1, channels), name="flatten")  # (B, h w, C)
        if self.ms_conv is not None:
            self.ms_conv.build(maps_shape)
            channels = sum(count for _, count in self.kernels)
        if self.pool is not None:
            self.pool.build((None, None, channels))
        if self.standardise is not None:
            self.standardise.build((None, channels))
        self.head.build((None, channels))
        self.built = True

    def call(self, images, training=None):
        return self.score(self.features(images, training), training)

    def features(self, images, training=None):
        """Primary maps `(B, h, w, C)` of images; the heatmap is taken on them."""
        return self.backbone(images, training=training)

    def score(self, maps, training=None):
        """Class scores `(B, num_classes)` from the primary maps."""
        return self._scores(self._bags(maps, training), training)[0]

    def explain(self, images) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        A box's weight is its share of the predicted class's score, `W_cj w_r a_jr`; the boxes are sorted by
        it, highest first.

        Args:
            images: as for the call.

        Returns:
            `maps (B, h, w, C)`, `pooled (B, N)`, `scores (B, num_classes)`, and unless the aggregation is
            the mean: `boxes (B, N k, 4)`, in pixels `(x0, y0, x1, y1)` of the model's input, and
            `weights (B, N k)`.
        """
        maps = self.features(images, training=False)
        bags = self._bags(maps, training=False)
        scores, pooled, chosen = self._scores(bags, training=False)
        named = {"maps": maps, "pooled": pooled, "scores": scores}
        if chosen is not None:
            named["boxes"], named["weights"] = self._evidence(chosen, scores, maps, images)
        return named

    def _evidence(self, chosen: dict[str, Any], scores: Any, maps: Any, images: Any) -> tuple[Any, Any]:
        """Boxes `(B, N k, 4)` of the pooled activations and what each adds to the predicted class's score."""
        head: Any = ops.take(ops.transpose(self.head.kernel), ops.argmax(scores, axis=-1), axis=0)  # (B, N)
        if self.standardise is not None:
            variance: Any = self.standardise.moving_variance
            head = head / ops.sqrt(variance + self.standardise.epsilon)
        shares: Any = ops.cast(chosen["weights"] * chosen["values"], "float32") * head[..., None]  # (B, N, k)
        count = shares.shape[1] * shares.shape[2]
        shares = ops.reshape(shares, (-1, count))  # (B, N k)
        boxes = ops.reshape(self._boxes(chosen["indices"], maps, images), (-1, count, 4))
        order: Any = ops.argsort(-shares, axis=-1)
        by_weight = ops.take_along_axis(boxes, order[..., None], axis=1)
        return by_weight, ops.take_along_axis(shares, order, axis=1)

    def _bags(self, maps, training):
        if self.bottleneck is not None:
            maps = self.bottleneck(maps, training=training)
        if self.ms_conv is not None:
            return self.ms_conv(maps, training=training)
        return [self.flatten(maps)]

    def _boxes(self, indices: Any, maps: Any, images: Any) -> Any:
        """Boxes `(B, N, k, 4)` under the kernel windows at these positions, in pixels of the images."""
        groups, scales = (self.kernels, self.scales) if self.kernels else (((1, indices.shape[1]),), (1.0,))
        maps_shape: Any = ops.shape(maps)
        image_shape: Any = ops.shape(images)
        boxes, first = [], 0
        for size, channels in groups:
            part = indices[:, first : first + channels]
            boxes.append(position_to_box(part, size, scales, maps_shape[1:3], image_shape[1:3]))
            first += channels
        return ops.concatenate(boxes, axis=1)

    def _scores(self, bags, training):
        chosen = None
        if self.pool is None:
            pooled = ops.concatenate([ops.mean(bag, axis=1) for bag in bags], axis=-1)
        else:
            pooled, chosen = self.pool(bags, return_attention_scores=True)
        features = pooled if self.standardise is None else self.standardise(pooled, training=training)
        return self.head(self.dropout(features, training=training)), pooled, chosen

    def get_config(self):
        config = super().get_config()
        config.update(
            num_classes=self.num_classes,
            backbone=keras.saving.serialize_keras_object(self.backbone),
            stride=self.stride,
            weights=None,
            kernels=self.kernels,
            scales=self.scales,
            k=self.k,
            aggregation=self.aggregation,
            dropout=self.dropout_rate,
            freeze_batch_norm=self.freeze_batch_norm,
            bottleneck=self.bottleneck_channels,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        return cls(**config)


def _bottleneck(channels: int) -> keras.Model:
    layers = [
        keras.layers.BatchNormalization(center=False, scale=False, momentum=0.9),
        keras.layers.Conv2D(channels, 1, activation="relu"),
    ]
    return keras.Sequential(layers, name="bottleneck")
