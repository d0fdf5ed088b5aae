"""The multi-instance multi-scale CNN of Li et al. (2019), for images and for volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_medattn.layers import MSConv, TopKPool
from keras_medattn.models import backbones, mims_evidence, mims_slices
from keras_medattn.models.precision import at_own_precision, exact
from keras_medattn.ops.regions import per_position
from keras_medattn.ops.resize import resize_bilinear, scaled_size

ops: Any = keras.ops  # a type checker would infer its types from one backend

AGGREGATIONS = ("top_k", "max", "mean", "slice_mean", "slice_max")


@keras.saving.register_keras_serializable("keras_medattn")
class MIMS(keras.Model):
    """Multi-instance multi-scale CNN: backbone, multi-scale convolution, top-k pooling, a linear head.

    ```
    X = backbone(image or slice)                     (B S, h, w, C)
    y_ij = F_j(resize_i(X)), normalised              for each scale i and channel j; F_j tied over scales
    p_j = sum_r w_r a_r                              a_1 >= ... >= a_k: highest of channel j, over all
                                                     positions, scales and slices
    scores = W p + b
    ```

    Li et al., "Multi-Instance Multi-Scale CNN for Medical Image Classification", MICCAI 2019, section 2.
    With `kernels=()` the primary maps are pooled as they are and standardised in front of the head, as a
    linear probe's features are. The methods that the paper compares, beside `backbone="resnet101"`,
    `stride=32` (where it leaves the channels of a single kernel open, as many as MIMS has in all):

    | name | arguments |
    |---|---|
    | MIMS | `kernels=((2, 8), (3, 10))` OCT, `((2, 10), (3, 10))` fundus, `((1, 20), (2, 40))` histology |
    | MI-Pre | `kernels=()` |
    | Pyramid MI-Pre | `kernels=(), pyramid=True` |
    | MI-Pre-Conv | `kernels=((3, 18),), scales=(1,)` |
    | MIMS-NoResizing | `scales=(1,)` |
    | Pyramid MIMS | `pyramid=True` |
    | MI-Pre-Trident | `kernels=((3, 18),), scales=(1, 1, 1), dilations=(1, 2, 3)` |
    | FeatPyra-4,5 | `kernels=((3, 18),), scales=(1,), stride=16, second_stride=32` |
    | ResNet34-scratch | `backbone="resnet34", weights=None, freeze_batch_norm=False`, the mean of MI-Pre |
    | MIMS-patchcls, MI-Pre-Conv-patchcls | `aggregation="slice_mean"` |
    | mean, max, top-2 to top-5 | `aggregation="mean"`, `"max"`, `k=2` to `5` |
    | max-inst | `aggregation="slice_max"` |

    Args:
        num_classes: scores to answer.
        backbone: a name that `backbones.backbone` knows, or a Keras model from images in 0..255 to maps.
        stride: of the backbone's maps, in pixels; ignored when a model is given.
        weights: of a named backbone: `"imagenet"`, `None`, or a path.
        kernels: `(size, channels)` of each kernel group.
        scales: of the maps, the same in height and width.
        k: activations that are pooled a channel.
        aggregation: `"top_k"`; `"max"`: the highest activation; `"mean"`: of all of them; or of the classes
            that each slice gets alone, by the top k: `"slice_mean"`: of their probabilities;
            `"slice_max"`: those of the slice with the lowest probability of the first class, the negative
            one. On an image alone the last two are `"top_k"`.
        dropout: share of the pooled features dropped in training.
        freeze_batch_norm: keep the statistics and scales of a named backbone's batch norm.
        layer: of a named backbone, where to cut it, in place of the stride's layer.
        bottleneck: channels of a 1 x 1 convolution with ReLU over the standardised maps, in front of all the
            rest; not in the paper, it helps on frozen backbones. 0: none.
        pyramid: whether the scales are those of the image, each of which goes through the backbone, rather
            than those of the maps. It is resized bilinearly without antialiasing.
        dilations: of the kernels at each scale; none by default.
        second_stride: of a named backbone, a larger stride whose maps are convolved too, by kernels of their
            own, and pooled beside the others. 0: none.
        weights_from: path of a saved MIMS with the same arguments: training begins from its weights.

    Input shape:
        Images `(B, H, W, 3)` or volumes `(B, S, H, W, 3)`, RGB in 0..255, uint8 or float; preprocessing is
        inside. Or a dict of `image`, such volumes, and `mask (B, S)` bool, true for slices that exist: what
        the others hold never changes the answer, and enters no batch statistics.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown backbone or aggregation, maps smaller than a kernel, arguments that exclude
            each other, or weights of another model.

    Example:
        >>> import numpy as np
        >>> model = MIMS(2, "mobilenet_v3_small", stride=8, weights=None, kernels=((2, 4),), k=3)
        >>> tuple(model(np.zeros((1, 96, 64, 3), "uint8")).shape)
        (1, 2)
        >>> volumes = {"image": np.zeros((1, 2, 96, 64, 3), "uint8"), "mask": np.ones((1, 2), bool)}
        >>> tuple(model(volumes).shape)
        (1, 2)
    """

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        backbone: str | keras.Model | Sequence[keras.Model] = "efficientnet_lite0",
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
        pyramid: bool = False,
        dilations: Sequence[int] = (),
        second_stride: int = 0,
        weights_from: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"`aggregation` must be one of {AGGREGATIONS}. Received: {aggregation!r}")
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be 2 or more. Received: {num_classes}")
        if second_stride and (pyramid or bottleneck or second_stride <= stride):
            raise ValueError(
                "`second_stride` must be above `stride`, without `pyramid` or `bottleneck`. Received: "
                f"second_stride={second_stride}, stride={stride}, pyramid={pyramid}, bottleneck={bottleneck}"
            )
        if isinstance(backbone, str):
            weights = None if weights_from else weights
            backbone = backbones.backbone(
                backbone, second_stride or stride, weights, freeze_batch_norm, layer
            )
            backbone = backbones.split(backbone, stride) if second_stride else backbone
        self.backbone, self.upper = backbone if second_stride else (backbone, None)  # type: ignore[misc]
        self.num_classes, self.stride, self.k = num_classes, stride, k
        self.kernels = tuple((int(size), int(channels)) for size, channels in kernels)
        self.scales = tuple(float(scale) for scale in scales)
        self.aggregation, self.dropout_rate = aggregation, dropout
        self.freeze_batch_norm = freeze_batch_norm
        self.pyramid, self.second_stride = pyramid, second_stride
        self.dilations = tuple(int(rate) for rate in dilations)
        self.weights_from = weights_from
        self.ms_conv = self._ms_conv("ms_conv") if self.kernels else None
        self.upper_conv = self._ms_conv("upper_conv") if self.kernels and second_stride else None
        self.pool = None
        if aggregation != "mean":
            self.pool = TopKPool(1 if aggregation == "max" else k, name="pool")
        self.bottleneck_channels = bottleneck
        self.bottleneck = _bottleneck(bottleneck) if bottleneck else None
        self.standardise = None
        if not self.kernels:
            self.standardise = keras.layers.BatchNormalization(
                center=False, scale=False, momentum=0.9, name="standardise"
            )
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        self.head = keras.layers.Dense(num_classes, dtype=exact(), name="head")

    def _ms_conv(self, name: str) -> MSConv:
        return MSConv(self.kernels, self.scales, dilations=self.dilations or None, name=name)

    @property
    def backbones(self) -> list[keras.Model]:
        """The pretrained networks: one, or two that follow each other where there is a second stride."""
        return [self.backbone] if self.upper is None else [self.backbone, self.upper]

    def build(self, input_shape):
        """Make the weights that follow the backbone, for images or volumes of this shape."""
        shape = input_shape["image"] if isinstance(input_shape, Mapping) else input_shape
        # a pyramid's maps are rounded differently from scaled maps, so only their channels are told
        size = (None, None) if self.pyramid else tuple(shape[-3:-1])
        maps = self.backbone.compute_output_shape((None, *size, shape[-1]))
        self.build_head(maps)
        if self.weights_from:
            self._begin_from(self.weights_from)

    def build_head(self, maps_shape):
        """Build all that follows the backbone, for maps `(B, h, w, C)`."""
        if self.bottleneck is not None:
            self.bottleneck.build(maps_shape)
            maps_shape = (*maps_shape[:-1], self.bottleneck_channels)
        shapes = [maps_shape]
        if self.upper is not None:
            shapes.append(self.upper.compute_output_shape(maps_shape))
        channels = [shape[-1] for shape in shapes]
        own = self.dtype_policy
        self.flatten = [keras.layers.Reshape((-1, count), dtype=own) for count in channels]  # (B, S h w, C)
        for conv, shape in zip((self.ms_conv, self.upper_conv), shapes, strict=False):
            if conv is not None:
                conv.build(shape)
        if self.kernels:
            channels = [count for _, count in self.kernels] * len(shapes)
        if self.pool is not None:
            self.pool.build([(None, None, count) for count in channels])
        if self.standardise is not None:
            self.standardise.build((None, sum(channels)))
        self.head.build((None, sum(channels)))
        self.built = True

    def call(self, inputs, training=None):
        """Class scores `(B, num_classes)`."""
        return self.score(self.features(inputs, training), training, _mask(inputs))

    def features(self, inputs, training=None):
        """Primary maps of images `(B, h, w, C)` or volumes `(B, S, h, w, C)`; heatmaps are taken on them.

        Of a pyramid: a list of one for each scale. With a second stride: those at the first, on which the
        others are made by `score`.
        """
        images, mask = _image(inputs), _mask(inputs)
        if not self.pyramid:
            return mims_slices.through(self.backbone, images, mask, training)
        return [
            mims_slices.through(self.backbone, _scaled(images, scale), mask, training)
            for scale in self.scales
        ]

    def score(self, maps, training=None, mask=None):
        """Class scores `(B, num_classes)` from the primary maps, and of volumes the mask `(B, S)`."""
        if not self._slicewise(maps):
            return self._pooled(maps, mask, training)["scores"]
        scores, _ = self._over_slices(self._alone(maps, mask, training)["scores"], maps, mask)
        return scores

    def explain(self, inputs) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        A box's weight is its share of the predicted class's score, `W_cj w_r a_jr`; where slices are scored
        alone, of its slice's score, times the slice's share in the answer. The boxes are sorted by it, the
        highest first. A box of a rank that a bag does not fill is zeros.

        Args:
            inputs: as for the call.

        Returns:
            `maps`, `pooled (B, N)`, `scores (B, num_classes)`, and unless the aggregation is the mean: `boxes
            (B, K, 4)`, in pixels `(x0, y0, x1, y1)` of the model's input, and `weights (B, K)`. Of volumes
            also `slices (B, K)`, the slice that a box lies on, and `slice_scores (B, S, num_classes)`: each
            slice alone through pool and head. Where slices are scored alone, `pooled (B, S, N)`.
        """
        images, mask = _image(inputs), _mask(inputs)
        maps = self.features(inputs, training=False)
        volumes = len(images.shape) == 5
        batch = ops.shape(images)[0]
        alone = self._alone(maps, mask, training=False) if volumes else None
        if alone is not None and self._slicewise(maps):
            found = alone
            scores, shares = self._over_slices(found["scores"], maps, mask)
            pooled = ops.reshape(found["pooled"], (batch, -1, found["pooled"].shape[-1]))
        else:
            found, shares = self._pooled(maps, mask, training=False), None
            scores, pooled = found["scores"], found["pooled"]
        named = {"maps": maps, "pooled": pooled, "scores": scores}
        if alone is not None:
            named["slice_scores"] = ops.reshape(alone["scores"], (batch, -1, self.num_classes))
        if found["chosen"] is not None:
            evidence = mims_evidence.evidence(self, found["chosen"], scores, shares, maps, images)
            named |= evidence if volumes else {key: evidence[key] for key in ("boxes", "weights")}
        return named

    def _slicewise(self, maps) -> bool:
        maps = maps[0] if self.pyramid else maps
        return self.aggregation.startswith("slice_") and len(maps.shape) == 5

    def _alone(self, maps, mask, training) -> dict[str, Any]:
        """As `_pooled`, of each slice of volumes for itself: `(B S, ...)`."""
        levels = [mims_slices.alone(level, mask) for level in (maps if self.pyramid else [maps])]
        single = None if mask is None else ops.reshape(mask, (-1, 1))  # (B S, 1)
        return self._pooled(levels if self.pyramid else levels[0], single, training)

    def _over_slices(self, scores, maps, mask):
        batch, slices = ops.shape(maps[0] if self.pyramid else maps)[:2]
        scores = ops.reshape(scores, (batch, slices, self.num_classes))
        return mims_slices.OVER[self.aggregation](scores, mask)

    def _pooled(self, maps, mask, training) -> dict[str, Any]:
        """`scores`, `pooled (B, N)`, and what was `chosen`: None for the mean."""
        bags, chosen = self._bags(maps, mask, training), None
        if self.pool is None:
            pooled = ops.concatenate([mims_slices.mean(bag, valid) for bag, valid in bags], axis=-1)
        else:
            bags = [bag if valid is None else (bag, valid) for bag, valid in bags]
            pooled, chosen = self.pool(bags, return_attention_scores=True)
        features = pooled
        if self.standardise is not None:
            rows = None if mask is None else ops.any(mask, axis=1)
            features = self.standardise(pooled, training=training, mask=rows)
        return {
            "scores": self.head(self.dropout(features, training=training)),
            "pooled": pooled,
            "chosen": chosen,
        }

    def _bags(self, maps, mask, training) -> list[tuple[Any, Any]]:
        """Bags `(B, L, n)` with their masks `(B, L)` or None, in the order of the pooled channels."""
        levels = maps if self.pyramid else [maps]
        if self.bottleneck is not None:
            levels = [self._narrowed(level, mask, training) for level in levels]
        strides = [levels]  # maps at one stride, or at two
        if self.upper is not None:
            strides.append([mims_slices.through(self.upper, levels[0], mask, training)])
        bags = []
        for conv, flatten, found in zip((self.ms_conv, self.upper_conv), self.flatten, strides, strict=False):
            if conv is None:
                bag = ops.concatenate([flatten(level) for level in found], axis=1)
                cells = [ops.shape(level)[-3] * ops.shape(level)[-2] for level in found]
                valid = None
                if mask is not None:
                    valid = ops.concatenate([per_position(mask, count) for count in cells], axis=1)
                bags.append((bag, valid))
                continue
            if self.pyramid:
                answers = conv.of_pyramid(found, mask, training)
            else:
                answers = conv(found[0], mask=mask, training=training)
            bags += answers if mask is not None else [(bag, None) for bag in answers]
        return bags

    def _narrowed(self, maps, mask, training):
        """The bottleneck, whose batch norm reads no slice that is padding."""
        if len(maps.shape) == 4:
            return self.bottleneck(maps, training=training)  # type: ignore[misc]
        norm, convolution = self.bottleneck.layers  # type: ignore[union-attr]
        shape = ops.shape(maps)
        flat = ops.reshape(maps, (shape[0] * shape[1], *shape[2:]))  # (B S, h, w, C)
        counted = None
        if mask is not None:
            counted = ops.broadcast_to(ops.reshape(mask, (-1, 1, 1)), ops.shape(flat)[:3])
        normed = norm(flat, training=training, mask=counted)
        answers = convolution(ops.reshape(normed, ops.shape(flat)))  # without Keras's own note of the mask
        return ops.reshape(answers, (*shape[:-1], self.bottleneck_channels))

    def _begin_from(self, path: str) -> None:
        try:
            saved: Any = keras.saving.load_model(path, compile=False)
            self.set_weights(saved.get_weights())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`weights_from` must be a saved MIMS with the same arguments and classes "
                f"({str(error).splitlines()[0]}). Received: {path!r}"
            ) from error

    def get_config(self):
        config = super().get_config()
        networks = [keras.saving.serialize_keras_object(one) for one in self.backbones]
        config.update(
            num_classes=self.num_classes,
            backbone=networks if self.second_stride else networks[0],
            stride=self.stride,
            weights=None,
            kernels=self.kernels,
            scales=self.scales,
            k=self.k,
            aggregation=self.aggregation,
            dropout=self.dropout_rate,
            freeze_batch_norm=self.freeze_batch_norm,
            bottleneck=self.bottleneck_channels,
            pyramid=self.pyramid,
            dilations=self.dilations,
            second_stride=self.second_stride,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        return cls(**config)


def _image(inputs: Any) -> Any:
    return inputs["image"] if isinstance(inputs, Mapping) else inputs


def _mask(inputs: Any) -> Any:
    return ops.cast(inputs["mask"], "bool") if isinstance(inputs, Mapping) else None


def _scaled(images: Any, scale: float) -> Any:
    """Images or volumes at a scale of a pyramid."""
    if scale == 1:
        return images
    shape = ops.shape(images)
    height, width = (scaled_size(length, scale) for length in shape[-3:-1])
    flat = ops.reshape(images, (-1, *shape[-3:])) if len(shape) == 5 else images
    flat = resize_bilinear(ops.cast(flat, "float32"), height, width)
    return ops.reshape(flat, (*shape[:-3], height, width, shape[-1])) if len(shape) == 5 else flat


def _bottleneck(channels: int) -> keras.Model:
    layers = [
        keras.layers.BatchNormalization(center=False, scale=False, momentum=0.9),
        keras.layers.Conv2D(channels, 1, activation="relu"),
    ]
    return keras.Sequential(layers, name="bottleneck")
