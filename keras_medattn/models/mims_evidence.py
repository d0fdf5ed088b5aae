"""The places in an image or a volume that MIMS's pooled activations looked at, and what each adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_medattn.ops.regions import position_to_box, position_to_cell

ops: Any = keras.ops  # a type checker would infer its types from one backend


def evidence(
    model: Any, chosen: dict[str, Any], scores: Any, shares: Any, maps: Any, images: Any
) -> dict[str, Any]:
    """Boxes with their weights in the predicted class's score, the highest first.

    Args:
        model: a MIMS.
        chosen: what its pooling chose: `indices`, `values` and `weights (B, N, k)`, or `(B S, N, k)` where
            slices are scored alone.
        scores: `(B, num_classes)`.
        shares: `(B, S)` of the slices in the answer where they are scored alone, or None.
        maps: as the model's `features` answers.
        images: `(B, H, W, 3)` or `(B, S, H, W, 3)`.

    Returns:
        `boxes (B, K, 4)`, `weights (B, K)` and `slices (B, K)`.
    """
    batch = ops.shape(images)[0]
    head: Any = ops.take(ops.transpose(model.head.kernel), ops.argmax(scores, axis=-1), axis=0)  # (B, N)
    if model.standardise is not None:
        variance: Any = model.standardise.moving_variance
        head = head / ops.sqrt(variance + model.standardise.epsilon)
    weights = ops.cast(chosen["weights"] * chosen["values"], "float32")  # (B, N, k)
    boxes, slices = _places(model, chosen["indices"], maps, images, slicewise=shares is not None)
    boxes = ops.where(ops.expand_dims(chosen["weights"] > 0, -1), boxes, 0)
    if shares is None:
        weights = weights * head[..., None]
    else:
        count = ops.shape(shares)[1]
        weights = ops.reshape(weights, (batch, count, *weights.shape[1:]))  # (B, S, N, k)
        weights = weights * head[:, None, :, None] * shares[:, :, None, None]
        slices = ops.broadcast_to(ops.arange(count, dtype="int32")[:, None, None], ops.shape(weights))
    weights = ops.reshape(weights, (batch, -1))  # (B, K)
    order: Any = ops.argsort(-weights, axis=-1)
    return {
        "boxes": ops.take_along_axis(ops.reshape(boxes, (batch, -1, 4)), order[..., None], axis=1),
        "weights": ops.take_along_axis(weights, order, axis=1),
        "slices": ops.take_along_axis(ops.reshape(slices, (batch, -1)), order, axis=1),
    }


def _places(model: Any, indices: Any, maps: Any, images: Any, slicewise: bool) -> tuple[Any, Any]:
    """Boxes `(B, N, k, 4)` under the kernel windows, in pixels of the images, and slices `(B, N, k)`."""
    size = ops.shape(images)[-3:-1]
    count = ops.shape(images)[1] if len(images.shape) == 5 and not slicewise else 1
    boxes, slices, first = [], [], 0
    for channels, extents, scales, feature_size in _windows(model, maps):
        part = indices[:, first : first + channels]
        boxes.append(position_to_box(part, extents, scales, feature_size, size, count))
        slices.append(position_to_cell(part, extents, scales, feature_size, count)[1])
        first += channels
    return ops.concatenate(boxes, axis=1), ops.concatenate(slices, axis=1)


def _windows(model: Any, maps: Any) -> list[tuple[int, list[int], Sequence[float], Any]]:
    """For each bag its channels, the cells that a kernel spans at each scale, the scales, the map sizes."""
    sizes = [ops.shape(level)[-3:-1] for level in (maps if model.pyramid else [maps])]
    strides: list[Any] = [sizes if model.pyramid else sizes[0]]
    if model.upper is not None:
        strides.append(model.upper.compute_output_shape((None, *sizes[0], maps.shape[-1]))[1:3])
    if model.kernels:
        dilations = model.dilations or (1,) * len(model.scales)
        groups = [
            (channels, [(size - 1) * rate + 1 for rate in dilations]) for size, channels in model.kernels
        ]
        return [(*group, model.scales, size) for size in strides for group in groups]
    scales = model.scales if model.pyramid else (1.0,)
    counts = [flatten.target_shape[-1] for flatten in model.flatten]
    return [(count, [1] * len(scales), scales, size) for count, size in zip(counts, strides, strict=True)]
