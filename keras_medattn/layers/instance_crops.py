"""Crops of the high-resolution image where an attention map is high."""

from typing import Any

import keras

from keras_medattn.ops.components import (
    THRESHOLDS,
    above_threshold,
    bounding_boxes,
    heaviest_components,
    label_components,
)
from keras_medattn.ops.crops import crop_bilinear
from keras_medattn.ops.resize import resize_bilinear

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class InstanceCrops(keras.layers.Layer):
    """Cuts the k instances that an attention map points at out of the image in full resolution.

    The map is resized to `label_size` x `label_size` and compared with a threshold; of the 8-connected
    components above it, the k with the greatest sum of attention give a box each, heaviest first, and the
    image under each box is resized to `crop_size` x `crop_size` (Fan et al., Microscopic Fine-Grained
    Instance Classification Through Deep Attention: "we threshold the attention map to generate a binary mask,
    crop these patches from the input image, resize them to a predefined size").

    It has no weights. The places of the crops carry no gradient, their pixels do.

    Args:
        k: Number of boxes an image.
        crop_size: Rows and columns of each crop.
        label_size: Rows and columns of the grid on which components are found: a box's edges lie on its
            lines. The search takes time in proportion to the longest path inside a component.
        threshold: "mean" of the map, "max" for `level` times its maximum, "quantile" for its
            `level`-quantile, or "otsu".
        level: See `threshold`.

    Call arguments:
        attention: Attention maps. A map covers the whole of its image.
        images: The images in full resolution, of any type: only the crops are converted to float.
        size: Int tensor `(B, 2)`, the rows and columns of each image where the batch is padded to the
            largest. The images lie in the upper left corner, and padding is never read.
        return_attention_scores: Whether to answer what was found on the map, too.

    Input shape:
        Attention `(B, h, w)`, images `(B, H, W, C)`, fewer than 2^31 pixels in all. Heights and widths may be
        unknown.

    Output shape:
        Crops `(B, k, crop_size, crop_size, C)`; boxes `(B, k, 4)` of `(x0, y0, x1, y1)` in pixels of the
        image, never in less than float32; and a boolean mask `(B, k)`, true where there is an instance. The
        other slots hold crops and boxes of 0. With `return_attention_scores=True` also a dict of `above (B,
        label_size, label_size)` bool, the cells above the threshold; `components`, of the same shape, int32,
        the slot number from 1 of each cell and 0 elsewhere; and `weights (B, k)`, the share of each component
        in the attention of all cells above the threshold.

    Raises:
        ValueError: If an input has not the right rank, or an argument is not valid.

    Example:

    >>> attention = keras.ops.convert_to_tensor([[[0.0, 0.0, 0.0, 9.0], [5.0, 0.0, 0.0, 9.0]]])
    >>> layer = InstanceCrops(k=3, crop_size=2, label_size=8)
    >>> crops, boxes, mask = layer(attention, keras.ops.ones((1, 32, 64, 3)))
    >>> [[int(edge) for edge in box] for box in boxes[0]], [bool(real) for real in mask[0]]
    ([[48, 0, 64, 32], [0, 16, 16, 32], [0, 0, 0, 0]], [True, True, False])
    """

    def __init__(
        self,
        k: int = 4,
        crop_size: int = 336,
        label_size: int = 56,
        threshold: str = "mean",
        level: float = 0.5,
        **kwargs: Any,
    ) -> None:
        # Whether a cell is above the threshold must not depend on the precision of what follows.
        super().__init__(autocast=False, **kwargs)
        if crop_size < 1:
            raise ValueError(f"`crop_size` must be at least 1. Received: crop_size={crop_size}")
        if not 1 <= label_size < 4096:
            raise ValueError(f"`label_size` must be from 1 to 4095. Received: label_size={label_size}")
        if not 1 <= k <= label_size**2:
            raise ValueError(f"`k` must be from 1 to the number of cells. Received: k={k}")
        if threshold not in THRESHOLDS:
            raise ValueError(f"`threshold` must be one of {THRESHOLDS}. Received: threshold={threshold!r}")
        if not 0 <= level <= 1:
            raise ValueError(f"`level` must be from 0 to 1. Received: level={level}")
        self.k = k
        self.crop_size = crop_size
        self.label_size = label_size
        self.threshold = threshold
        self.level = level

    def call(
        self, attention: Any, images: Any, size: Any = None, return_attention_scores: bool = False
    ) -> Any:
        """Answers crops, boxes and mask, and on request the components."""
        self._check(attention.shape, images.shape)
        attention = ops.cast(ops.stop_gradient(attention), self._box_dtype)
        cells = self.label_size
        attention = ops.squeeze(resize_bilinear(ops.expand_dims(attention, -1), cells, cells), -1)
        above = above_threshold(attention, self.threshold, self.level)
        members, sums, mask = heaviest_components(label_components(above), attention, self.k)
        edges = ops.cast(bounding_boxes(members), self._box_dtype)  # (B, k, 4), in cells
        boxes = edges * self._extent(images, size) / cells
        crops = crop_bilinear(images, boxes, self.crop_size, size)
        crops = ops.where(ops.expand_dims(mask, (2, 3, 4)), crops, 0)
        answer = ops.cast(crops, self.compute_dtype), boxes, mask
        if not return_attention_scores:
            return answer
        slots = ops.reshape(ops.arange(1, self.k + 1, dtype="int32"), (1, self.k, 1, 1))
        total = ops.sum(ops.where(above, attention, 0), axis=(1, 2))  # (B,)
        share = sums / ops.expand_dims(ops.where(total > 0, total, 1), -1)
        components = ops.max(ops.where(members, slots, 0), axis=1)
        return *answer, {"above": above, "components": components, "weights": share}

    def _extent(self, images: Any, size: Any) -> Any:
        """The images' extent in pixels along x, y, x, y: `(B or 1, 1, 4)`."""
        if size is None:
            size = ops.expand_dims(ops.stack([ops.convert_to_tensor(n) for n in ops.shape(images)[1:3]]), 0)
        height, width = (ops.reshape(ops.cast(size[:, axis], self._box_dtype), (-1, 1)) for axis in (0, 1))
        return ops.stack([width, height, width, height], axis=-1)

    @property
    def _box_dtype(self) -> str:
        return keras.backend.result_type(self.compute_dtype, "float32")

    def compute_output_shape(
        self, attention_shape: tuple, images_shape: tuple, size_shape: tuple | None = None
    ) -> tuple:
        """The shapes of crops, boxes and mask."""
        self._check(attention_shape, images_shape)
        slots = (attention_shape[0], self.k)
        return (*slots, self.crop_size, self.crop_size, images_shape[-1]), (*slots, 4), slots

    def compute_output_spec(
        self, attention: Any, images: Any, size: Any = None, return_attention_scores: bool = False
    ) -> Any:
        """The shapes and dtypes of the answer."""
        shapes = self.compute_output_shape(attention.shape, images.shape)
        dtypes = (self.compute_dtype, self._box_dtype, "bool")
        answer = [keras.KerasTensor(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        if not return_attention_scores:
            return tuple(answer)
        grid = (attention.shape[0], self.label_size, self.label_size)
        weights = keras.KerasTensor(shapes[2], dtype=self._box_dtype)
        above, components = (keras.KerasTensor(grid, dtype=dtype) for dtype in ("bool", "int32"))
        return *answer, {"above": above, "components": components, "weights": weights}

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "k": self.k,
            "crop_size": self.crop_size,
            "label_size": self.label_size,
            "threshold": self.threshold,
            "level": self.level,
        }

    def _check(self, attention_shape: tuple, images_shape: tuple) -> None:
        if len(attention_shape) != 3 or len(images_shape) != 4:
            raise ValueError(
                f"{self.name} takes attention (B, h, w) and images (B, H, W, C). Received: "
                f"attention.shape={tuple(attention_shape)}, images.shape={tuple(images_shape)}"
            )
