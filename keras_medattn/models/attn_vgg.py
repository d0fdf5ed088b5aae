"""VGG19 with attention over channels and over positions, of Wu et al. (2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.layers import ChannelAttn, SpatialAttn
from keras_medattn.models import backbones

ops: Any = keras.ops  # a type checker would infer its types from one backend

ATTENTION = {"none": None, "channel": ChannelAttn, "spatial": SpatialAttn}
_BLOCKS = 5


@keras.saving.register_keras_serializable("keras_medattn")
class AttnVGG(keras.Model):
    """VGG19 with an attention module after each of its five blocks, and its three dense layers.

    ```
    X_b = attention_b(block_b(X_(b-1)))              C-Attn after blocks 1 and 2, S-Attn after 3, 4 and 5
    scores = W_3 relu(W_2 relu(W_1 flatten(X_5)))    dropout behind each relu
    ```

    Wu et al., "Deep Attentive Feature Learning for Histopathology Image Classification". The paper does not
    say on which side of a block's max-pooling the module sits: here it is before it. Its ablations are
    `attention=("none",) * 5`, `("channel", "channel", "none", "none", "none")` and
    `("none", "none", "spatial", "spatial", "spatial")`.

    Args:
        num_classes: scores to answer.
        attention: `"none"`, `"channel"` or `"spatial"` for each block.
        weights: of the convolutions: `"imagenet"`, `None`, or a path; with `batch_norm` only `None` or the
            path of a file that holds it.
        batch_norm: batch normalisation behind each convolution.
        after_pool: put the modules behind the max-pooling, on maps of half the size.
        units: of the two hidden dense layers.
        dropout: share of the hidden units dropped in training.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; preprocessing is inside. The dense layers fix H and W
        when the model is built: 224 in the paper.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown module, or other than five of them.

    Example:
        >>> import numpy as np
        >>> model = AttnVGG(2, weights=None, units=16)
        >>> tuple(model(np.zeros((1, 64, 64, 3), "uint8")).shape)
        (1, 2)
    """

    stride = 32

    def __init__(
        self,
        num_classes: int,
        attention: Sequence[str] = ("channel", "channel", "spatial", "spatial", "spatial"),
        weights: str | None = "imagenet",
        batch_norm: bool = False,
        after_pool: bool = False,
        units: int = 4096,
        dropout: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_classes, self.attention = num_classes, tuple(attention)
        self.batch_norm, self.after_pool = batch_norm, after_pool
        self.units, self.dropout_rate = units, dropout
        if len(self.attention) != _BLOCKS or not set(self.attention) <= set(ATTENTION):
            raise ValueError(
                f"`attention` must name one of {tuple(ATTENTION)} for each of the {_BLOCKS} blocks. "
                f"Received: attention={attention!r}"
            )
        if batch_norm and weights == "imagenet":
            raise ValueError(
                "Keras has no ImageNet weights for VGG19 with batch normalisation: pass weights=None or the "
                "path of a .weights.h5 file. Received: weights='imagenet', batch_norm=True"
            )
        self.backbone, self.attended = _trunk(self.attention, weights, batch_norm, after_pool)
        layers: list[keras.layers.Layer] = [keras.layers.Flatten()]
        for number in (6, 7):  # the names that the paper's network has
            layers += [
                keras.layers.Dense(units, "relu", name=f"fc{number}"),
                keras.layers.Dropout(dropout, name=f"dropout{number}"),
            ]
        layers.append(keras.layers.Dense(num_classes, dtype="float32", name="fc8"))
        self.head = keras.Sequential(layers, name="head")

    def build(self, input_shape):
        self.head.build(self.backbone.compute_output_shape(input_shape))
        self.built = True

    def call(self, images, training=None):
        return self.score(self.features(images, training), training)

    def features(self, images, training=None):
        """Maps `(B, H / 32, W / 32, 512)` of images; the heatmap is taken on them."""
        return self.backbone(images, training=training)

    def score(self, maps, training=None):
        """Class scores `(B, num_classes)` from the maps."""
        return self.head(maps, training=training)

    def explain(self, images) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        Returns:
            `maps (B, h, w, 512)`, `scores (B, num_classes)`, and for each module `attention_b (B, h_b, w_b)`:
            the mean over the channels of what block b's module answers.
        """
        *attended, maps = self.attended(images, training=False)
        named = {"maps": maps, "scores": self.score(maps, training=False)}
        blocks = [block for block, kind in enumerate(self.attention, 1) if kind != "none"]
        for block, features in zip(blocks, attended, strict=True):
            named[f"attention_{block}"] = ops.mean(features, axis=-1)
        return named

    def get_config(self):
        config = super().get_config()
        config.update(
            num_classes=self.num_classes,
            attention=self.attention,
            weights=None,
            batch_norm=self.batch_norm,
            after_pool=self.after_pool,
            units=self.units,
            dropout=self.dropout_rate,
        )
        return config


def _trunk(
    attention: Sequence[str], weights: str | None, batch_norm: bool, after_pool: bool
) -> tuple[keras.Model, keras.Model]:
    """VGG19's convolutions with the modules, image to maps; and the same with the modules' answers, too."""
    plain = backbones.backbone("vgg19", 32, None if batch_norm else weights)
    attended = []

    def attend(pool: keras.layers.Layer, maps: Any) -> Any:
        """What the module of the block that ends in `pool` answers."""
        block = int(pool.name.removeprefix("block").removesuffix("_pool"))
        layer = ATTENTION[attention[block - 1]]
        if layer is None:
            return maps
        attended.append(layer(name=f"attention_{block}")(maps))
        return attended[-1]

    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, keras.layers.MaxPooling2D):
            return attend(layer, layer(x)) if after_pool else layer(attend(layer, x))
        if batch_norm and isinstance(layer, keras.layers.Conv2D):
            layer.activation = keras.activations.linear
            x = keras.layers.BatchNormalization(name=f"{layer.name}_bn")(layer(x))
            return keras.layers.ReLU(name=f"{layer.name}_relu")(x)
        return layer(x, *args, **kwargs)

    trunk: Any = keras.models.clone_model(plain, call_function=call)
    for layer in plain.layers:  # a clone has weights of its own
        trunk.get_layer(layer.name).set_weights(layer.get_weights())
    trunk = keras.Model(trunk.inputs[0], trunk.outputs[0], name="attn_vgg19")
    if batch_norm and weights:
        trunk.load_weights(weights)
    return trunk, keras.Model(trunk.inputs[0], [*attended, trunk.outputs[0]])
