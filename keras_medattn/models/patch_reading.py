"""Patches of images, read where attention says, and the scores of each: all at once, or one after another.

Shapes: B images, R rows an image, P patches a row of s x s pixels, N scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_medattn.layers import AttentionSampler, RecurrentSampler
from keras_medattn.ops.patches import cell_mask, cells_to_corners, gather_patches

ops: Any = keras.ops  # a type checker would infer its types from one backend

Score = Callable[[Any], Any]  # patches (M, s, s, C) -> scores (M, N)


def unpacked(inputs: Any) -> tuple[Any, Any, Any]:
    """The images of a batch, and where it is a dict their sizes and numbers; else None."""
    if not isinstance(inputs, dict):
        return inputs, None, None
    return inputs["image"], inputs.get("size"), inputs.get("examples")


def all_at_once(
    sampler: AttentionSampler,
    score: Score,
    attention: Any,
    images: Any,
    size: Any,
    calls: Sequence[dict[str, Any]],
) -> tuple[Any, Any, Any]:
    """Score the patches of every call of the sampler in one batch.

    Args:
        sampler: draws or chooses.
        score: of patches.
        attention: `(B, h, w)`.
        images: `(B, H, W, C)` of any type.
        size: `(B, 2)` or None, the rows and columns of each image.
        calls: arguments of each call: a row an image comes of each.

    Returns:
        Scores `(B R, P, N)`, cells and log-probabilities `(B R, P)`, an image's rows after each other.
    """
    drawn = [sampler(attention, images, size, **call) for call in calls]
    patches, cells, log_probs = (
        ops.reshape(ops.stack(each, axis=1), (-1, *each[0].shape[1:])) for each in zip(*drawn, strict=True)
    )  # (B R, P, ...)
    scores = score(ops.reshape(patches, (-1, *patches.shape[2:])))
    return ops.reshape(scores, (-1, sampler.patches, scores.shape[-1])), cells, log_probs


def one_by_one(
    sampler: RecurrentSampler,
    score: Score,
    attention: Any,
    maps: Any,
    images: Any,
    size: Any,
    geometry: tuple[int, int],
    rows: int,
    call: dict[str, Any],
) -> tuple[Any, Any, Any]:
    """Score each patch before the sampler draws the next one in view of it.

    Args:
        sampler: draws or chooses; its `patch_features` are N.
        score: of patches; the sampler is shown its answers, without a gradient.
        attention: `(B, h, w)`.
        maps: `(B, h, w, D)`, what the sampler sees of the cells.
        images: `(B, H, W, C)` of any type.
        size: `(B, 2)` or None, the rows and columns of each image.
        geometry: a patch's side and a cell's side, in pixels.
        rows: R, independent rows of draws an image.
        call: further arguments of the sampler's call.

    Returns:
        As `all_at_once`.
    """
    patch, stride = geometry
    map_size, image_size = ops.shape(attention)[1:], ops.shape(images)[1:3]
    if size is not None:
        attention = ops.where(cell_mask(size, map_size, image_size, stride), attention, 0)
    attention, maps = (ops.repeat(each, rows, axis=0) for each in (attention, maps))
    scores = []

    def read(cells: Any) -> Any:  # (B R,)
        corners = cells_to_corners(ops.reshape(cells, (-1, rows)), map_size, image_size, patch, stride)
        patches = ops.cast(gather_patches(images, corners, patch, size), "float32")  # (B, R, s, s, C)
        scores.append(score(ops.reshape(patches, (-1, *patches.shape[2:]))))
        return ops.stop_gradient(scores[-1])

    _, cells, log_probs = sampler(attention, maps, read=read, **call)
    return ops.stack(scores, axis=1), cells, log_probs


def boxes(cells: Any, attention: Any, images: Any, size: Any, patch_size: int, stride: int) -> Any:
    """The patches of cells, cut to their images, in pixels.

    Args:
        cells: `(B, P)`.
        attention: `(B, h, w)`.
        images: `(B, H, W, C)`.
        size: `(B, 2)` or None, the rows and columns of each image.
        patch_size: s.
        stride: pixels along the side of a cell.

    Returns:
        `(x0, y0, x1, y1)`: `(B, P, 4)` float32.
    """
    pixels = ops.shape(images)[1:3]
    corners = cells_to_corners(cells, ops.shape(attention)[1:], pixels, patch_size, stride)
    low, high = [], []
    for axis in (1, 0):
        end = pixels[axis] if size is None else ops.cast(size[:, axis : axis + 1], "int32")
        low.append(ops.maximum(corners[:, :, axis], 0))
        high.append(ops.minimum(corners[:, :, axis] + patch_size, end))
    return ops.cast(ops.stack(low + high, axis=-1), "float32")
