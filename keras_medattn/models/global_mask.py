"""Any image CNN behind one mask for all images, of Xu et al. (2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_medattn.layers import GlobalPixelMask, PixelWeights
from keras_medattn.models import backbones
from keras_medattn.models.precision import at_own_precision, exact

ops: Any = keras.ops  # a type checker would infer its types from one backend

MASKS = ("global", "pixels", "none", "fixed")
_MEAN = np.array([0.485, 0.456, 0.406], "float32")  # of ImageNet's pixels in 0..1
_STDDEV = np.array([0.229, 0.224, 0.225], "float32")


@keras.saving.register_keras_serializable("keras_medattn")
class GlobalMask(keras.Model):
    """An image CNN that sees every image through one mask, which is learnt from all training images.

    ```
    X = (image / 255 - mean) / sd                    mean and sd of ImageNet
    M = sigmoid(W_1 * ReLU(W_0 * P + b_0) + b_1)     (1, H, W, 1); P: all training images, standardised
    maps = backbone(255 (sd M X + mean))             (B, h, w, C)
    scores = W GAP(maps) + b
    loss = CE(scores) + l1 |M|                       in epochs 1 to E; then M is a constant
    ```

    Xu et al., "A Novel Global Spatial Attention Mechanism in Convolutional Neural Network for Medical Image
    Classification", equation 1 and algorithm 1. Backbones standardise for themselves, so the masked image is
    put back into 0..255; there sd cancels, and M draws each pixel towards the mean colour:
    `255 mean + M (image - 255 mean)`.

    The first E epochs learn mask and image CNN together. After them the pixel CNN is not run any more: the
    mask that it last had is kept in the model, and whatever the optimizer's decay and momentum still do to
    its weights changes nothing. `fit` adds the callback, `MaskPhases`, that sees to it. Between
    two epochs the mask is kept, too, so that validation runs no pixel CNN.

    `snapshot()` answers the model to save and to export: its mask is a constant, and there is no image in it.

    Args:
        num_classes: scores to answer.
        backbone: a name that `backbones.backbone` knows, or a Keras model from images in 0..255 to maps.
        mask: `"global"`, the pixel CNN; `"pixels"`, a weight for each pixel that begins at 1, with the loss
            `l1 mean|w|`, the paper's L1 baseline; `"none"`, the plain CNN; `"fixed"`, a constant mask, what
            a snapshot has.
        joint_epochs: E, the epochs in which the mask is learnt.
        l1: lambda. Of the global mask times the sum of M in the paper's reading.
        reduction: `"sum"`, or `"mean"`, which needs a lambda H W times as large for the same.
        channels: K of the pixel CNN; several for more hidden layers.
        kernel_size: see `GlobalPixelMask`.
        last_kernel_size: see `GlobalPixelMask`.
        dense: see `GlobalPixelMask`.
        kernel_initializer: see `GlobalPixelMask`.
        reduce: see `GlobalPixelMask`.
        raw: mask the pixels in 0..1 as they are, in place of the standardised ones: what is masked is black.
        stride: of the maps of a named backbone, in pixels.
        weights: of a named backbone: `"imagenet"`, `None`, or a path.
        layer: of a named backbone, where to cut it, in place of the stride's layer.
        dropout: share of the pooled features dropped in training.
        freeze_batch_norm: keep the statistics and scales of a named backbone's batch norm.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; preprocessing is inside. H and W are fixed when the
        model is built, unless `mask="none"`. Or `{"maps": (B, h, w, C)}`, what `features` answered of images
        before: once mask and backbone rest, these need not be computed in every epoch.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown mask, reduction or backbone; if the global mask is built before `adapt`; if
            a model that still learns it is saved or exported.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3)).astype("uint8")
        >>> model = GlobalMask(2, "mobilenet_v3_small", weights=None, channels=4)
        >>> model.adapt([images])  # the training images, in batches
        >>> model.build((None, 64, 64, 3))
        >>> tuple(model(images[:2]).shape), tuple(model.pixel_mask().shape)
        ((2, 2), (1, 64, 64, 1))
    """

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        backbone: str | keras.Model = "efficientnet_lite0",
        mask: str = "global",
        joint_epochs: int = 60,
        l1: float = 0.001,
        reduction: str = "sum",
        channels: int | Sequence[int] = 32,
        kernel_size: int = 3,
        last_kernel_size: int = 1,
        dense: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        reduce: Sequence[Any] | None = None,
        raw: bool = False,
        stride: int = 32,
        weights: str | None = "imagenet",
        layer: str | None = None,
        dropout: float = 0.0,
        freeze_batch_norm: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if mask not in MASKS or reduction not in ("sum", "mean"):
            raise ValueError(
                f"`mask` must be one of {MASKS}, and `reduction` 'sum' or 'mean'. "
                f"Received: mask={mask!r}, reduction={reduction!r}"
            )
        if l1 < 0 or joint_epochs < 0:
            raise ValueError(
                "`l1` and `joint_epochs` must not be negative. "
                f"Received: l1={l1}, joint_epochs={joint_epochs}"
            )
        self.num_classes, self.stride, self.mask, self.raw = num_classes, stride, mask, raw
        self.joint_epochs, self.l1, self.reduction = joint_epochs, l1, reduction
        self.dropout_rate, self.freeze_batch_norm = dropout, freeze_batch_norm
        self.channels = channels if isinstance(channels, int) else tuple(channels)
        self.kernel_size, self.last_kernel_size = kernel_size, last_kernel_size
        self.dense, self.kernel_initializer = dense, keras.initializers.get(kernel_initializer)
        self.reduce: Any = None if reduce is None else tuple(reduce)
        self.learner: Any = None
        if mask == "global":
            self.learner = GlobalPixelMask(
                channels,
                kernel_size,
                last_kernel_size,
                dense,
                kernel_initializer=kernel_initializer,
                reduce=self.reduce,
                name="pixel_cnn",
            )
        if mask == "pixels":
            self.learner = PixelWeights(l1=0.0, name="pixels")  # the penalty is the model's: it ends with E
        if isinstance(backbone, str):
            backbone = backbones.backbone(backbone, stride, weights, freeze_batch_norm, layer)
        self.backbone = backbone
        self.pool = keras.layers.GlobalAveragePooling2D(name="pool")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        self.head = keras.layers.Dense(num_classes, dtype=exact(), name="head")
        self.learnt_from: dict[str, Any] | None = None

    @property
    def aligned(self) -> bool:
        """Whether pixels must stay where they are: an image may not move under its mask."""
        return self.mask != "none"

    @property
    def learns(self) -> bool:
        """Whether the mask can be learnt; of a snapshot it is a constant."""
        return self.learner is not None

    @property
    def slow_parts(self) -> list[keras.layers.Layer]:
        """What learns at the backbone's rate, not the head's: a step moves the weights of all images."""
        return [self.learner] if self.learns else []

    @property
    def settled_epoch(self) -> int:
        """From this epoch on, counted from 0, what a frozen backbone answers of an image does not change."""
        return self.joint_epochs if self.learns else 0

    def adapt(self, images: Iterable[Any]) -> None:
        """Takes the training images, before the model is built; only a global mask needs them.

        Args:
            images: batches `(B, H, W, 3)` in 0..255, unaugmented, in a fixed order. They stay in host memory.
                Their number and the hash of their order are kept in the model's configuration,
                `learnt_from`.

        Raises:
            ValueError: see `GlobalPixelMask.adapt`.
        """
        if self.mask == "global":
            self.learner.adapt(self._pixels(np.asarray(ops.convert_to_numpy(batch))) for batch in images)
            adapted = self.learner.get_config()["adapted"]
            self.learnt_from = {name: adapted[name] for name in ("images", "order", "variance_kept")}

    def build(self, input_shape):
        if self.aligned:
            if None in input_shape[1:3]:
                raise ValueError(
                    f"A mask has one size: height and width must be known. Received: {tuple(input_shape)}"
                )
            shape = (1, *input_shape[1:3], 1)
            for name, learnt in (("stored", "mask"), ("initial", "initial_mask")):
                weight = self.add_weight(
                    shape, initializer="ones", trainable=False, autocast=False, name=learnt
                )
                setattr(self, name, weight)
        if self.learns:
            self.joint = self.add_weight(
                (), initializer="ones", trainable=False, autocast=False, name="joint"
            )
            self.learner.build(input_shape)
        self.head.build((None, self.backbone.compute_output_shape(input_shape)[-1]))
        self.built = True

    def call(self, images, training=None):
        if isinstance(images, dict):
            for weight in self.learner.trainable_variables if self.learns else ():
                self.add_loss(ops.sum(0.0 * weight))  # a gradient of 0: Keras's MultiOptimizer wants one
            return self.score(images["maps"], training)
        mask = self.pixel_mask()
        if self.learns and self.l1:
            norm = ops.abs(mask)
            norm = ops.sum(norm) if (self.mask, self.reduction) == ("global", "sum") else ops.mean(norm)
            self.add_loss(self.joint * self.l1 * norm)
        return self.score(self._maps(images, mask, training), training)

    def features(self, images, training=None):
        """Maps `(B, h, w, C)` of the masked images; the heatmap is taken on them."""
        return self._maps(images, self.pixel_mask(), training)

    def score(self, maps, training=None):
        """Class scores `(B, num_classes)` from the maps."""
        return self.head(self.dropout(self.pool(maps), training=training))

    def pixel_mask(self):
        """The mask `(1, H, W, 1)`, float32: of the pixel CNN while it learns, else the kept one; or None."""
        if not self.aligned:
            return None
        if not self.learns:
            return ops.convert_to_tensor(self.stored)
        return ops.cond(self.joint > 0, self._learnt, lambda: ops.convert_to_tensor(self.stored))

    def rest(self) -> None:
        """Keeps the mask as it is now, and runs the pixel CNN no more."""
        if self.learns:
            self.stored.assign(self.pixel_mask())
            self.joint.assign(0.0)

    def explain(self, images) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        Returns:
            `maps (B, h, w, C)`, `scores (B, num_classes)`, and unless there is no mask: `mask (B, H, W)`,
            `normalised_mask (B, H, W)`, the same between its least and its highest value as 0 and 1, as the
            paper draws it, since the image CNN can absorb any scale of it; and `initial_mask (B, H, W)`, what
            `mask` was before training.
        """
        mask = self.pixel_mask()
        maps = self._maps(images, mask, training=False)
        named = {"maps": maps, "scores": self.score(maps, training=False)}
        if mask is not None:
            low, span = ops.min(mask), ops.max(mask) - ops.min(mask)
            masks = {
                "mask": mask,
                "normalised_mask": (mask - low) / ops.maximum(span, keras.config.epsilon()),
                "initial_mask": ops.convert_to_tensor(self.initial),
            }
            shape = ops.shape(images)[:3]
            named |= {name: ops.broadcast_to(ops.squeeze(one, -1), shape) for name, one in masks.items()}
        return named

    @property
    def callbacks(self) -> list[keras.callbacks.Callback]:
        """What a training loop must call before its own callbacks: the two phases of the mask."""
        return [MaskPhases()] if self.learns else []

    def fit(self, *args, callbacks=None, **kwargs):
        """As of any Keras model, with the two phases of the mask."""
        given = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        return super().fit(*args, callbacks=[*self.callbacks, *given], **kwargs)

    def snapshot(self, into: GlobalMask | None = None) -> GlobalMask:
        """The model as it is now, not compiled, with its mask as a constant: to be saved and exported.

        Args:
            into: an earlier snapshot of this model, to be brought up to date in place of a new one.
        """
        twin = into
        if twin is None:
            twin = type(self).from_config(self.get_config() | ({"mask": "fixed"} if self.aligned else {}))
            twin.build((None, *self.stored.shape[1:3], 3) if self.aligned else (None, None, None, 3))
        twin.backbone.set_weights(self.backbone.get_weights())
        twin.head.set_weights(self.head.get_weights())
        if self.aligned:
            twin.stored.assign(self.pixel_mask())
            twin.initial.assign(self.initial)
        return twin

    def save(self, *args, **kwargs):
        """As of any Keras model, once the mask is a constant."""
        self._check_constant()
        return super().save(*args, **kwargs)

    def export(self, *args, **kwargs):
        """As of any Keras model, once the mask is a constant."""
        self._check_constant()
        return super().export(*args, **kwargs)

    def _check_constant(self) -> None:
        if self.mask == "global":
            raise ValueError(
                f"{self.name} still computes its mask from the training images, which belong in no file: "
                f"save or export `snapshot()`. Received: mask={self.mask!r}"
            )

    def _learnt(self) -> Any:
        if self.mask == "global":
            return self.learner.pixel_mask()
        return ops.convert_to_tensor(self.learner.pixels)

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        """P's part of some images, as the mask is laid over them."""
        pixels = images.astype("float32") / np.float32(255)
        return pixels if self.raw else (pixels - _MEAN) / _STDDEV

    def _maps(self, images: Any, mask: Any, training: bool | None) -> Any:
        if mask is not None:
            centre = 0.0 if self.raw else 255 * _MEAN  # where a standardised pixel is 0
            images = centre + mask * (ops.cast(images, mask.dtype) - centre)
        return self.backbone(images, training=training)

    def get_config(self):
        config = super().get_config()
        config.update(
            num_classes=self.num_classes,
            backbone=keras.saving.serialize_keras_object(self.backbone),
            mask=self.mask,
            joint_epochs=self.joint_epochs,
            l1=self.l1,
            reduction=self.reduction,
            channels=self.channels,
            kernel_size=self.kernel_size,
            last_kernel_size=self.last_kernel_size,
            dense=self.dense,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            reduce=self.reduce,
            raw=self.raw,
            stride=self.stride,
            weights=None,
            dropout=self.dropout_rate,
            freeze_batch_norm=self.freeze_batch_norm,
            learnt_from=self.learnt_from,
        )
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        learnt_from = config.pop("learnt_from", None)
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        model = cls(**config)
        model.learnt_from = learnt_from
        return model


class MaskPhases(keras.callbacks.Callback):
    """Lets a `GlobalMask` learn its mask in the first epochs, and keeps it as it is between and after them.

    The phase is a function of the epoch's number alone, so that a run that goes on is in the right one.

    Example:
        >>> model = GlobalMask(2, "mobilenet_v3_small", mask="pixels", weights=None, joint_epochs=5)
        >>> model.build((None, 64, 64, 3))
        >>> phases = MaskPhases()
        >>> phases.set_model(model)
        >>> phases.on_epoch_begin(5)
        >>> float(model.joint)
        0.0
    """

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 0:
            self.model.initial.assign(self.model.pixel_mask())
        if epoch < self.model.joint_epochs:
            self.model.joint.assign(1.0)
        else:
            self.model.rest()

    def on_test_begin(self, logs=None):
        self.model.rest()

    def on_epoch_end(self, epoch, logs=None):
        self.model.rest()
