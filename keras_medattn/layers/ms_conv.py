"""Multi-scale convolution with one set of kernels for all scales."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.regions import per_position
from keras_medattn.ops.resize import resize_bilinear, scaled_size

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class MSConv(keras.layers.Layer):
    """Multi-scale convolution of MIMS: the same kernels over a feature map at several scales.

    `y_ij = sw_ij * BN_ij(F_j(resize_i(x)))` for scale i and kernel group j (Li et al., Multi-Instance
    Multi-Scale CNN for Medical Image Classification). The kernels F_j are tied over the scales; batch
    normalisation and the learnable magnitude `sw` belong to a scale and a channel, so that no scale wins the
    shared top k by its magnitude alone.

    The maps are resized bilinearly to `floor(h s), floor(w s)` without antialiasing, and the kernels go over
    them with valid padding. The batch norm has no gamma, which would repeat `sw`. Its statistics come from
    all positions of a batch: train with several volumes a batch, or one volume decides alone what is normal.

    Args:
        kernels: `(size, channels)` of each kernel group. The original uses ((2, 8), (3, 10)) for OCT, ((2,
            10), (3, 10)) for fundus photographs and ((1, 20), (2, 40)) for histology.
        scales: Factors by which the maps are resized.
        activation: Activation after the normalisation; none by default.
        center: Whether the batch norm adds a learnable beta (a plain batch norm). Without it no scale gets a
            bias over another.
        momentum: Momentum of the batch norm's moving statistics.
        dilations: Of the kernels at each scale; 1 everywhere by default. With `scales=(1, 1, 1)` and
            `dilations=(1, 2, 3)` the branches are those of Scale-Aware Trident Networks (Li et al., 2019).

    Call arguments:
        inputs: Feature maps of images or of volumes.
        mask: Boolean tensor `(B, S)` for volumes, true for slices that exist. What the others hold is never
            read: it enters neither the answer nor the batch statistics.
        training: Whether to normalise by the statistics of the batch, and update the moving ones.

    Input shape:
        `(B, h, w, C)`, or `(B, S, h, w, C)` for S slices a volume. Height and width may be unknown.

    Output shape:
        A list with one bag `(B, L, n)` for each kernel group of n channels: the scales one after another,
        within a scale the slices, within a slice the rows (`keras_medattn.ops.position_to_box` maps a
        position back). Given a mask, a list of pairs of such a bag and its mask `(B, L)`. A map smaller than
        a kernel, where its size is known only at run time, gives no positions at that scale.

    Raises:
        ValueError: If a map whose size is known is smaller than a kernel at some scale, or an argument is not
            valid.

    Example:

    >>> maps = keras.random.normal((2, 8, 8, 16))
    >>> bags = MSConv(kernels=((2, 8), (3, 10)), scales=(0.5, 1.0))(maps)
    >>> [tuple(bag.shape) for bag in bags]
    [(2, 58, 8), (2, 40, 10)]
    """

    def __init__(
        self,
        kernels: Sequence[tuple[int, int]] = ((2, 8), (3, 10)),
        scales: Sequence[float] = (0.5, 0.75, 1.0),
        activation: Any = None,
        center: bool = False,
        momentum: float = 0.95,
        dilations: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kernels = tuple((int(size), int(channels)) for size, channels in kernels)
        self.scales = tuple(float(scale) for scale in scales)
        if not self.kernels or min(min(kernel) for kernel in self.kernels) < 1:
            raise ValueError(
                f"`kernels` must be pairs (size, channels) of at least 1. Received: kernels={kernels}"
            )
        if not self.scales or min(self.scales) < 0.001:
            raise ValueError(f"`scales` must be factors of at least 0.001. Received: scales={scales}")
        self.dilations = tuple(int(rate) for rate in dilations or (1,) * len(self.scales))
        if len(self.dilations) != len(self.scales) or min(self.dilations) < 1:
            raise ValueError(
                "`dilations` must be a rate of at least 1 for each scale. "
                f"Received: dilations={dilations}, scales={scales}"
            )
        self.activation = keras.activations.get(activation)
        self.center = center
        self.momentum = momentum
        self.convolutions = [
            keras.layers.Conv2D(
                channels, size, data_format="channels_last", dtype=self.dtype_policy, name=f"conv_{group}"
            )
            for group, (size, channels) in enumerate(self.kernels)
        ]
        self.normalizations = [  # of scale i and group j at [i * groups + j]
            keras.layers.BatchNormalization(
                scale=False, center=center, momentum=momentum, dtype=self.dtype_policy, name=f"bn_{i}_{j}"
            )
            for i in range(len(self.scales))
            for j in range(len(self.kernels))
        ]

    def build(self, input_shape: tuple) -> None:
        """Makes the kernels, the statistics and `sw`."""
        self._check_maps(input_shape)
        for convolution in self.convolutions:
            convolution.build((None, None, None, input_shape[-1]))
        for index, normalization in enumerate(self.normalizations):
            normalization.build((None, None, self.kernels[index % len(self.kernels)][1]))
        channels = sum(channels for _, channels in self.kernels)
        self.sw = self.add_weight((len(self.scales), channels), initializer="ones", name="sw")

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> list:
        """Answers one bag for each kernel group, or with a mask the pairs of bag and mask."""
        self._check_maps(inputs.shape)
        return self._bags([inputs] * len(self.scales), self.scales, mask, training)

    def of_pyramid(self, levels: Sequence[Any], mask: Any = None, training: bool | None = None) -> list:
        """Answers the bags of maps that have their scales already, as a pyramid of images gives them.

        Args:
            levels: Maps for each scale, `(B, h_i, w_i, C)` or `(B, S, h_i, w_i, C)`.
            mask: As in the call.
            training: As in the call.
        """
        return self._bags(levels, (1,) * len(levels), mask, training)

    def _bags(self, levels: Sequence[Any], factors: Sequence[float], mask: Any, training: Any) -> list:
        found = [
            self._at_scale(index, maps, factor, mask, training)
            for index, (maps, factor) in enumerate(zip(levels, factors, strict=True))
        ]
        pairs = [tuple(zip(*group, strict=True)) for group in zip(*found, strict=True)]
        bags = [ops.concatenate(bags, axis=1) for bags, _ in pairs]  # (B, L, n)
        if mask is None:
            return bags
        return [(bag, ops.concatenate(masks, axis=1)) for bag, (_, masks) in zip(bags, pairs, strict=True)]

    def _at_scale(
        self, index: int, maps: Any, factor: float, mask: Any, training: bool | None
    ) -> list[tuple[Any, Any]]:
        """Each kernel group's positions at one scale, `(B, S rows columns, n)`, and which of them count."""
        shape = ops.shape(maps)
        batch, slices, counted = shape[0], 1, None
        if mask is not None:
            _check_mask(mask, maps.shape)
            counted = ops.cast(mask, "bool")
            maps = ops.where(ops.expand_dims(counted, (2, 3, 4)), maps, 0)
        if len(shape) == 5:
            slices = shape[1]
            maps = ops.reshape(maps, (batch * slices, *shape[2:]))  # (B S, h, w, C)
        if mask is None and None in maps.shape[1:3]:
            # A scale without positions would turn the batch statistics into NaN, but for a mask.
            counted = ops.ones((batch, slices), "bool")
        if factor != 1:
            height, width = (scaled_size(size, factor) for size in ops.shape(maps)[1:3])
            maps = resize_bilinear(maps, height, width)
        answers, first = [], 0
        for group, (_, channels) in enumerate(self.kernels):
            bag = _convolve(self.convolutions[group], maps, self.dilations[index])  # (B S, rows, columns, n)
            cells = ops.shape(bag)[1] * ops.shape(bag)[2]
            bag = ops.reshape(bag, (batch, slices * cells, channels))  # (B, S rows columns, n)
            valid = None if counted is None else per_position(counted, cells)
            bag = self.normalizations[index * len(self.kernels) + group](bag, training=training, mask=valid)
            bag = self.activation(bag * self.sw[index, first : first + channels])
            answers.append((bag, valid))
            first += channels
        return answers

    def compute_output_shape(self, input_shape: tuple, mask_shape: tuple | None = None) -> list:
        """The bags' shapes, or with a mask those of the pairs."""
        self._check_maps(input_shape)
        slices = input_shape[1] if len(input_shape) == 5 else 1
        height, width = input_shape[-3:-1]
        shapes = []
        for size, channels in self.kernels:
            positions = None
            if None not in (slices, height, width):
                positions = slices * sum(
                    (scaled_size(height, scale) - reach) * (scaled_size(width, scale) - reach)
                    for scale, reach in zip(
                        self.scales, [(size - 1) * rate for rate in self.dilations], strict=True
                    )
                )
            shapes.append((input_shape[0], positions, channels))
        return shapes if mask_shape is None else [(shape, shape[:2]) for shape in shapes]

    def compute_output_spec(self, inputs: Any, mask: Any = None, training: bool | None = None) -> list:
        """The bags' shapes and dtypes, or with a mask those of the pairs."""
        shapes = self.compute_output_shape(inputs.shape)
        bags = [keras.KerasTensor(shape, dtype=self.compute_dtype) for shape in shapes]
        if mask is None:
            return bags
        _check_mask(mask, inputs.shape)
        return [(bag, keras.KerasTensor(bag.shape[:2], dtype="bool")) for bag in bags]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """None: the bags' masks are part of the answer."""
        return None

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "kernels": self.kernels,
            "scales": self.scales,
            "activation": keras.activations.serialize(self.activation),
            "center": self.center,
            "momentum": self.momentum,
            "dilations": self.dilations,
        }

    def _check_maps(self, shape: tuple) -> None:
        if len(shape) not in (4, 5):
            raise ValueError(
                f"{self.name} takes maps (B, h, w, C) or volumes (B, S, h, w, C). "
                f"Received: shape={tuple(shape)}"
            )
        for scale, rate in zip(self.scales, self.dilations, strict=True):
            largest = (max(size for size, _ in self.kernels) - 1) * rate + 1
            for length in shape[-3:-1]:
                if length is not None and scaled_size(length, scale) < largest:
                    raise ValueError(
                        f"At scale {scale} the map is smaller than the kernel of size {largest}: give a "
                        f"larger image, a smaller stride, or leave the scale out. "
                        f"Received: shape={tuple(shape)}, scales={self.scales}"
                    )


def _check_mask(mask: Any, shape: tuple) -> None:
    if len(shape) != 5 or len(mask.shape) != 2:
        raise ValueError(
            "`mask` (B, S) goes with volumes (B, S, h, w, C). "
            f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(shape)}"
        )


def _convolve(convolution: Any, maps: Any, rate: int) -> Any:
    """The convolution, without an error where a map of unknown size turns out smaller than the kernel.

    Such a map is padded to one position, which is cut off again: TensorFlow's convolutions answer nonsense
    where they should answer no position.
    """
    size = convolution.kernel_size[0]
    if rate > 1 and size > 1:
        return _dilated(convolution, maps, size, rate)
    if None not in maps.shape[1:3]:
        return convolution(maps)
    batch, height, width, channels = ops.shape(maps)
    missing = [(0, ops.maximum(size - length, 0)) for length in (height, width)]
    padded = ops.pad(maps, ((0, 0), *missing, (0, 0)))
    known = (
        batch,
        ops.maximum(height, size),
        ops.maximum(width, size),
        channels,
    )  # tells C to the static shape
    answers = convolution(ops.reshape(padded, known))
    return answers[:, : ops.maximum(height - size + 1, 0), : ops.maximum(width - size + 1, 0)]


def _dilated(convolution: Any, maps: Any, size: int, rate: int) -> Any:
    """The valid convolution with dilation, `y_p = sum_o x_(p + rate o) K_o + b`.

    Products of moved maps: TensorFlow's own gradient of a dilated convolution is slow.
    """
    kernel, answers = convolution.kernel, convolution.bias
    _, height, width, _ = ops.shape(maps)
    reach = (size - 1) * rate
    rows, columns = (  # a length that is known was checked
        length - reach if isinstance(length, int) else ops.maximum(length - reach, 0)
        for length in (height, width)
    )
    for i in range(size):
        for j in range(size):
            moved = maps[:, i * rate : i * rate + rows, j * rate : j * rate + columns]
            answers = answers + ops.matmul(moved, kernel[i, j])
    return answers
