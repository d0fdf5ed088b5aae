"""VGG19, or another backbone, with attention over channels and over positions, of Wu et al. (2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.layers import ChannelAttn, SpatialAttn
from keras_medattn.models import backbones
from keras_medattn.models.precision import at_own_precision, exact

ops: Any = keras.ops  # a type checker would infer its types from one backend

ATTENTION = {"none": None, "channel": ChannelAttn, "spatial": SpatialAttn}
_BLOCKS = 5


@keras.saving.register_keras_serializable("keras_medattn")
class AttnVGG(keras.Model):
    """VGG19 with an attention module after each of its five blocks, and its three dense layers.

    It is the paper's system with the arguments as they stand; other backbones have the modules at the ends of
    their strides 2, 4, 8, 16 and 32.

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
        attention: `"none"`, `"channel"` or `"spatial"` for each block, or for each stride. A module begins
            with random weights, and adds to its input: where the layers below one are to be frozen
            (`train.frozen_stride`), no module may stand among them.
        backbone: a name that `backbones.backbone` knows.
        weights: of the convolutions: `"imagenet"`, `None`, or a path; with `batch_norm` only `None` or the
            path of a file that holds it.
        layer: where the backbone ends, in place of its last layer; see `backbones.backbone`.
        batch_norm: of VGG16 and VGG19: batch normalisation behind each convolution.
        after_pool: of VGG16 and VGG19: put the modules behind the max-pooling, on maps of half the size.
        units: of the two hidden dense layers; 0: the mean over the positions in place of both.
        dropout: share of what the hidden layers answer, or of the means, dropped in training.

    Input shape:
        `(B, H, W, 3)`, RGB in 0..255, uint8 or float; preprocessing is inside. The dense layers fix H and W
        when the model is built: 224 in the paper. With `units=0` any H and W will do.

    Output shape:
        `(B, num_classes)`, class scores before the softmax, float32.

    Raises:
        ValueError: for an unknown module, or other than five of them, an unknown backbone, or an argument
            that only VGGs have.

    Example:
        >>> import numpy as np
        >>> model = AttnVGG(2, weights=None, units=16)
        >>> tuple(model(np.zeros((1, 64, 64, 3), "uint8")).shape)
        (1, 2)
    """

    stride = 32

    @at_own_precision
    def __init__(
        self,
        num_classes: int,
        attention: Sequence[str] = ("channel", "channel", "spatial", "spatial", "spatial"),
        backbone: str = "vgg19",
        weights: str | None = "imagenet",
        layer: str | None = None,
        batch_norm: bool = False,
        after_pool: bool = False,
        units: int = 4096,
        dropout: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_classes, self.attention = num_classes, tuple(attention)
        self.backbone_name, self.layer = backbone, layer
        self.batch_norm, self.after_pool = batch_norm, after_pool
        self.units, self.dropout_rate = units, dropout
        if len(self.attention) != _BLOCKS or not set(self.attention) <= set(ATTENTION):
            raise ValueError(
                f"`attention` must name one of {tuple(ATTENTION)} for each of the {_BLOCKS} blocks. "
                f"Received: attention={attention!r}"
            )
        if (batch_norm or after_pool) and not backbone.startswith("vgg"):
            raise ValueError(
                "`batch_norm` and `after_pool` are for backbone='vgg16' or 'vgg19'. "
                f"Received: backbone={backbone!r}, batch_norm={batch_norm}, after_pool={after_pool}"
            )
        if batch_norm and weights == "imagenet":
            raise ValueError(
                "Keras has no ImageNet weights for VGG19 with batch normalisation: pass weights=None or the "
                "path of a .weights.h5 file. Received: weights='imagenet', batch_norm=True"
            )
        plain = backbones.backbone(backbone, 32, None if batch_norm else weights, layer=layer)
        self.backbone, self.attended = _trunk(plain, self.attention, batch_norm, after_pool)
        if batch_norm and weights:
            self.backbone.load_weights(weights)
        layers: list[keras.layers.Layer] = [keras.layers.Flatten()]
        if not units:
            layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dropout(dropout)]
        for number in (6, 7) if units else ():  # the names that the paper's network has
            layers += [
                keras.layers.Dense(units, "relu", name=f"fc{number}"),
                keras.layers.Dropout(dropout, name=f"dropout{number}"),
            ]
        layers.append(keras.layers.Dense(num_classes, dtype=exact(), name="fc8"))
        self.head = keras.Sequential(layers, name="head")

    def build(self, input_shape):
        self.head.build(self.backbone.compute_output_shape(input_shape))
        self.built = True

    def call(self, images, training=None):
        return self.score(self.features(images, training), training)

    def features(self, images, training=None):
        """Maps `(B, H / 32, W / 32, C)` of images; the heatmap is taken on them."""
        return self.backbone(images, training=training)

    def score(self, maps, training=None):
        """Class scores `(B, num_classes)` from the maps."""
        return self.head(maps, training=training)

    def explain(self, images) -> dict[str, Any]:
        """Name the intermediates of a forward pass.

        Returns:
            `maps (B, h, w, C)`, `scores (B, num_classes)`, and for each module `attention_b (B, h_b, w_b)`:
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
            backbone=self.backbone_name,
            weights=None,
            layer=self.layer,
            batch_norm=self.batch_norm,
            after_pool=self.after_pool,
            units=self.units,
            dropout=self.dropout_rate,
        )
        return config


def _trunk(
    plain: keras.Model, attention: Sequence[str], batch_norm: bool, after_pool: bool
) -> tuple[keras.Model, keras.Model]:
    """The backbone with the modules, image to maps; and the same with the modules' answers, too."""
    places, attended = _places(plain, after_pool), []
    for block, kind in enumerate(attention, 1):
        if kind != "none" and block not in places.values():
            raise ValueError(
                f"The backbone has no layer at stride {2**block} for attention[{block - 1}]: make it 'none'. "
                f"Received: attention={tuple(attention)}, a backbone with layer={plain.operations[-1].name!r}"
            )

    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if batch_norm and isinstance(layer, keras.layers.Conv2D):
            layer.activation = keras.activations.linear
            x = keras.layers.BatchNormalization(name=f"{layer.name}_bn")(layer(x))
            answer = keras.layers.ReLU(name=f"{layer.name}_relu")(x)
        else:
            answer = layer(x, *args, **kwargs)
        block = places.get(layer.name)
        module = ATTENTION[attention[block - 1]] if block else None
        if module is None:
            return answer
        attended.append(module(name=f"attention_{block}")(answer))
        return attended[-1]

    trunk: Any = keras.models.clone_model(plain, call_function=call)
    for layer in plain.layers:  # a clone has weights of its own
        trunk.get_layer(layer.name).set_weights(layer.get_weights())
    trunk = keras.Model(trunk.inputs[0], trunk.outputs[0], name=f"attn_{plain.name}")
    return trunk, keras.Model(trunk.inputs[0], [*attended, trunk.outputs[0]])


def _places(plain: keras.Model, after_pool: bool) -> dict[str, int]:
    """The operations behind which the modules stand, each with the number of its block."""
    if not plain.name.startswith("vgg"):
        return {end.name: stride.bit_length() - 1 for stride, end in backbones.ends(plain).items()}
    kind = "pool" if after_pool else "conv"
    names = (layer.name for layer in plain.layers if kind in layer.name)  # as block1_conv2
    last = {int(name[len("block")]): name for name in names}
    return {name: block for block, name in last.items()}
