"""A trunk of residual units under a soft mask that sees further."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.comparison import channel_mean, reduced
from keras_medattn.ops.resize import resize_bilinear

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class ResidualAttention(keras.layers.Layer):
    """Attention module of the residual attention network.

    `X' = after((1 + M) T)` with the trunk `T = trunk(before(X))` and the mask `M = sigmoid(mask(before(X)))`,
    a number from 0 to 1 for each position and channel (Wang et al., "Residual Attention Network for Image
    Classification", equation 3). `before` and `after` are p residual units, the trunk t. The mask branch goes
    down and up again: max pooling, r units, then r units and bilinear interpolation to the size before the
    pooling; with more than one level the next level lies between, beside a skip connection of one unit. Two
    1x1 convolutions follow it.

    The units are bottlenecks with pre-activation, `x + conv1(conv3(conv1(x)))` at a quarter of the channels,
    with batch normalisation and ReLU in front of each convolution. Convolutions have no biases.

    Args:
        units: The counts (p, t, r), each 0 or more; those of the paper by default.
        depth: Levels of the mask branch. The paper has 3 on maps of 56x56, 2 on 28x28 and 1 on 14x14, so that
            the lowest is 7x7.

    Call arguments:
        inputs: Feature maps.
        training: Whether to normalise by the statistics of the batch, and update the moving ones.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`, C at least 4. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the refined features over the channels, and `mask (B, H, W, C)`, the M.

    Raises:
        ValueError: If an argument is not valid, or the input is no map of 4 channels or more.

    Example:

    >>> maps = keras.random.normal((2, 7, 9, 16))
    >>> features, scores = ResidualAttention()(maps, return_attention_scores=True)
    >>> tuple(features.shape), tuple(scores["mask"].shape)
    ((2, 7, 9, 16), (2, 7, 9, 16))
    """

    def __init__(self, units: Sequence[int] = (1, 2, 1), depth: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = tuple(units)
        if len(self.units) != 3 or min(self.units) < 0:
            raise ValueError(f"`units` must be three counts, 0 or more. Received: units={units}")
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1. Received: depth={depth}")
        self.depth = depth
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the units and the mask's convolutions."""
        channels = input_shape[-1]
        width = reduced(channels, 4)

        def chains(name: str, count: int, *convolutions: tuple[int, int]) -> list[_Chain]:
            made = [_Chain(convolutions, dtype=self.dtype_policy, name=f"{name}_{i}") for i in range(count)]
            for chain in made:
                chain.build((None, None, None, channels))
            return made

        unit = ((width, 1), (width, 3), (channels, 1))
        p, t, r = self.units
        self.before, self.trunk, self.after = (
            chains(name, count, *unit) for name, count in (("before", p), ("trunk", t), ("after", p))
        )
        self.down, self.up = (chains(name, self.depth * r, *unit) for name in ("down", "up"))
        self.skip = chains("skip", self.depth - 1, *unit)
        [self.gate] = chains("gate", 1, (channels, 1), (channels, 1))

    def call(self, inputs: Any, training: bool | None = None, return_attention_scores: bool = False) -> Any:
        """Answers the refined features, and on request the maps."""
        x = _residual(self.before, inputs, training)
        trunk = _residual(self.trunk, x, training)
        mask = ops.sigmoid(self.gate(self._branch(x, 0, training), training=training))
        features = _residual(self.after, (1 + mask) * trunk, training)
        if not return_attention_scores:
            return features
        return features, {"attention": channel_mean(features), "mask": mask}

    def _branch(self, x: Any, level: int, training: bool | None) -> Any:
        """Down a level, through those below, and up again to the size of `x`."""
        _, height, width, _ = ops.shape(x)
        here = slice(level * self.units[2], (level + 1) * self.units[2])
        x = ops.max_pool(x, 3, strides=2, padding="same", data_format="channels_last")
        x = _residual(self.down[here], x, training)
        if level + 1 < self.depth:
            skipped = _residual(self.skip[level : level + 1], x, training)
            x = skipped + self._branch(x, level + 1, training)
        return resize_bilinear(_residual(self.up[here], x, training), height, width)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, return_attention_scores: bool = False
    ) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        return features, {
            "attention": keras.KerasTensor(inputs.shape[:3], dtype=self.compute_dtype),
            "mask": keras.KerasTensor(inputs.shape, dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "units": self.units, "depth": self.depth}


class _Chain(keras.layers.Layer):
    """Convolutions of the given `(filters, size)`, each behind batch normalisation and ReLU."""

    def __init__(self, convolutions: Sequence[tuple[int, int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.normalizations = [
            keras.layers.BatchNormalization(dtype=dtype, name=f"bn_{i}") for i in range(len(convolutions))
        ]
        self.convolutions = [
            keras.layers.Conv2D(
                filters,
                size,
                padding="same",
                use_bias=False,
                data_format="channels_last",
                dtype=dtype,
                name=f"conv_{i}",
            )
            for i, (filters, size) in enumerate(convolutions)
        ]

    def build(self, input_shape: tuple) -> None:
        shape = tuple(input_shape)
        for normalization, convolution in zip(self.normalizations, self.convolutions, strict=True):
            normalization.build(shape)
            convolution.build(shape)
            shape = (*shape[:-1], convolution.filters)

    def call(self, x: Any, training: bool | None = None) -> Any:
        for normalization, convolution in zip(self.normalizations, self.convolutions, strict=True):
            x = convolution(ops.relu(normalization(x, training=training)))
        return x


def _residual(chains: Sequence[_Chain], x: Any, training: bool | None) -> Any:
    for chain in chains:
        x = x + chain(x, training=training)
    return x
