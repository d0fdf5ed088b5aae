"""Patches of a large image, sampled where an attention map is high."""

import random
from typing import Any

import keras

from keras_medattn.ops.patches import cell_mask, cells_to_corners, gather_patches
from keras_medattn.ops.random import keys
from keras_medattn.ops.sampling import greedy_cells, log_probabilities, sample_cells

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class AttentionSampler(keras.layers.Layer):
    """Samples cells of an attention map and cuts the patches under them out of the image in full resolution.

    `cell_t ~ a`, `patch_t = image[square of s x s pixels around the centre of cell_t]` (Sinigaglia, Scaling
    mega-pixel images classification via attention sampling; Katharopoulos and Fleuret, Processing Megapixel
    Images with Deep Attention-Sampling Models). At the image's border the patch is reflected.

    In training the layer draws: each draw is a function of the seed, the number of training calls before and
    the example, and the same on every backend and device. Otherwise it takes the most probable cells, of
    which no two patches overlap while there are such (`nms=True`), or just the most probable ones. It draws
    there, too, where it is given `draw`.

    Patches carry no gradient to the attention, log-probabilities do: train the attention with
    `ops.reinforce_surrogate` or `ops.expectation`.

    Args:
        patches: P, the number of patches an image.
        patch_size: s, in pixels; more than a cell's side, or the patches leave pixels out.
        replacement: Whether a cell may be drawn again.
        stride: Pixels along the side of a cell, if the map is that of `ops.overview(image, stride)`. By
            default the map covers the whole image, and a cell is H / h x W / w pixels.
        nms: Whether cells that are not drawn are chosen so that their patches do not overlap.
        seed: Seed of the draws. By default one is drawn, and kept in the configuration.

    Call arguments:
        attention: Attention maps with sum 1.
        image: The images in full resolution, of any type: only the patches are converted to float.
        size: Integer tensor `(B, 2)`, the rows and columns of each image where the batch is padded to the
            largest. The images lie in the upper left corner. Cells that are not wholly inside get no
            attention (the others share it), and padding is never read.
        examples: Integer tensor `(B,)` that tells the examples of a step apart; by default their number in
            the batch. Replicas that get different examples must tell them apart here.
        draw: An int: draws with this number in place of that of the training call, in training or not.
        training: Whether to draw, and to count the call.

    Input shape:
        Attention `(B, h, w)`, image `(B, H, W, C)`, fewer than 2^31 pixels in all. Heights and widths may be
        unknown, with `nms` only if `stride` is given.

    Output shape:
        Patches `(B, P, s, s, C)`; cells `(B, P)` int32, flat indices `row * w + column`; and `log_probs (B,
        P)`: of a draw given the draws before it, of a chosen cell `log a`. All are 0 for an image that has no
        cell.

    Raises:
        ValueError: If an argument is not valid or an input has not the right rank.

    Example:

    >>> attention = keras.ops.convert_to_tensor([[[0.1, 0.5], [0.4, 0.0]]])
    >>> image = keras.ops.ones((1, 10, 10, 3))
    >>> patches, cells, log_probs = AttentionSampler(patches=2, patch_size=6, stride=5, nms=False)(
    ...     attention, image
    ... )
    >>> tuple(patches.shape), [int(cell) for cell in cells[0]]
    ((1, 2, 6, 6, 3), [1, 2])
    """

    def __init__(
        self,
        patches: int,
        patch_size: int,
        replacement: bool = True,
        stride: int | None = None,
        nms: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # 16 bits would round small attention to none
        if min(patches, patch_size) < 1 or (stride is not None and stride < 1):
            raise ValueError(
                "`patches`, `patch_size` and `stride` must be at least 1. "
                f"Received: patches={patches}, patch_size={patch_size}, stride={stride}"
            )
        self.patches = patches
        self.patch_size = patch_size
        self.replacement = replacement
        self.stride = stride
        self.nms = nms
        self.seed = random.randrange(2**31) if seed is None else seed

    def build(self, attention_shape: tuple, image_shape: tuple) -> None:
        """Makes the number of training calls."""
        self._check(attention_shape, image_shape)
        self.step = self.add_weight(
            (), "zeros", "int32", trainable=False, name="step", aggregation="only_first_replica"
        )

    def call(
        self,
        attention: Any,
        image: Any,
        size: Any = None,
        examples: Any = None,
        draw: Any = None,
        training: bool | None = None,
    ) -> tuple:
        """Answers the patches, their cells and their log-probabilities."""
        self._check(attention.shape, image.shape)
        exact = keras.backend.result_type(self.compute_dtype, "float32")
        attention = ops.cast(attention, exact)
        map_size, image_size = ops.shape(attention)[1:], ops.shape(image)[1:3]
        if size is not None:
            mask = cell_mask(size, map_size, image_size, self.stride)
            attention = ops.where(mask, attention, 0)
            total = ops.sum(attention, axis=(1, 2), keepdims=True)
            attention = attention / ops.where(total > 0, total, 1)
        if training and draw is None:
            draw = self.step + 0  # its value before the count
            self.step.assign(self.step + 1)
        if draw is None:
            cells = greedy_cells(attention, self.patches, self._distance(attention.shape, image.shape))
        else:
            examples = ops.arange(ops.shape(attention)[0], dtype="int32") if examples is None else examples
            own = keys(self.seed, draw, examples)
            cells = sample_cells(attention, self.patches, self.replacement, own)
        log_probs = log_probabilities(attention, cells, self.replacement or draw is None)
        corners = cells_to_corners(cells, map_size, image_size, self.patch_size, self.stride)
        patches = gather_patches(image, corners, self.patch_size, size)
        patches, log_probs = (ops.cast(each, self.compute_dtype) for each in (patches, log_probs))
        if size is None:
            return patches, cells, log_probs
        some = ops.squeeze(total > 0, 2)  # (B, 1)
        patches = ops.where(ops.expand_dims(some, (2, 3, 4)), patches, 0)
        return patches, ops.where(some, cells, 0), ops.where(some, log_probs, 0)

    def _distance(self, attention_shape: tuple, image_shape: tuple) -> int:
        """Cells apart at which two patches do not overlap."""
        if not self.nms:
            return 1
        if self.stride is not None:
            return -(-self.patch_size // self.stride)
        sides = zip(attention_shape[1:], image_shape[1:3], strict=True)
        return max(-(-self.patch_size * cells // pixels) for cells, pixels in sides)

    def compute_output_shape(self, attention_shape: tuple, image_shape: tuple) -> tuple:
        """The shapes of patches, cells and log-probabilities."""
        self._check(attention_shape, image_shape)
        chosen = (attention_shape[0], self.patches)
        return (*chosen, self.patch_size, self.patch_size, image_shape[-1]), chosen, chosen

    def compute_output_spec(
        self,
        attention: Any,
        image: Any,
        size: Any = None,
        examples: Any = None,
        draw: Any = None,
        training: bool | None = None,
    ) -> tuple:
        """The shapes and dtypes of the answer."""
        shapes = self.compute_output_shape(attention.shape, image.shape)
        dtypes = (self.compute_dtype, "int32", self.compute_dtype)
        return tuple(
            keras.KerasTensor(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "patches": self.patches,
            "patch_size": self.patch_size,
            "replacement": self.replacement,
            "stride": self.stride,
            "nms": self.nms,
            "seed": self.seed,
        }

    def _check(self, attention_shape: tuple, image_shape: tuple) -> None:
        if len(attention_shape) != 3 or len(image_shape) != 4:
            raise ValueError(
                f"{self.name} takes attention (B, h, w) and images (B, H, W, C). Received: "
                f"attention.shape={tuple(attention_shape)}, image.shape={tuple(image_shape)}"
            )
        if self.nms and self.stride is None and None in (*attention_shape[1:], *image_shape[1:3]):
            raise ValueError(
                f"Where sizes are unknown, {self.name} needs the side of a cell to keep patches apart: give "
                f"`stride`, or nms=False. Received: stride={self.stride}, nms={self.nms}, "
                f"attention.shape={tuple(attention_shape)}, image.shape={tuple(image_shape)}"
            )
