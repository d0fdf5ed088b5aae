"""Attention sampling (Sinigaglia): geometry of cells and patches, overview, sampler, the two networks."""

import math
from fractions import Fraction

import numpy as np

from reference import Array, Weights
from reference.sampling import WORD, threefry, uniform


def overview(image: Array, stride: int) -> Array:
    """The mean of each whole square of pixels."""
    batch, height, width, channels = image.shape
    rows, columns = height // stride, width // stride
    whole = image[:, : rows * stride, : columns * stride].astype("float64")
    return whole.reshape(batch, rows, stride, columns, stride, channels).mean(axis=(2, 4))


def side(cells: int, pixels: int, stride: int | None) -> Fraction:
    """Pixels along the side of a cell."""
    return Fraction(pixels, cells) if stride is None else Fraction(stride)


def corner(index: int, side: Fraction, patch_size: int) -> int:
    """Where a patch centred on a cell begins, along one axis: the nearest whole pixel, of two the lower."""
    return math.ceil((index + Fraction(1, 2)) * side - Fraction(patch_size, 2) - Fraction(1, 2))


def patch(image: Array, row: int, column: int, size: int) -> Array:
    """The square of `image (H, W, C)` with this corner, the image reflected at its borders."""
    margin = size + max(abs(row), abs(column))
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return padded[row + margin : row + margin + size, column + margin : column + margin + size]


def greedy(attention: Array, patches: int, distance: int) -> list[int]:
    """The most probable cells, far enough from each other while there are such."""
    chosen: list[int] = []
    order = [int(cell) for cell in np.argsort(-attention.ravel(), kind="stable")]
    for _ in range(patches):
        left = [cell for cell in order if cell not in chosen]
        places = [divmod(cell, attention.shape[1]) for cell in chosen]
        far = [
            cell
            for cell in left
            if attention.flat[cell] > 0
            and all(
                max(abs(cell // attention.shape[1] - row), abs(cell % attention.shape[1] - column))
                >= distance
                for row, column in places
            )
        ]
        chosen.append((far or left)[0])
    return chosen


def draws(attention: Array, patches: int, key: tuple[int, int]) -> list[int]:
    """Cells with replacement: by the distribution of the rows, then by that of the cells of the row."""
    levels, cells = uniform(key, 2 * patches), []
    for of_row, of_column in zip(levels[:patches], levels[patches:], strict=True):
        rows = np.cumsum(attention.sum(axis=1))
        row = int(np.searchsorted(rows, of_row * rows[-1], side="right"))
        columns = np.cumsum(attention[row])
        column = int(np.searchsorted(columns, of_column * columns[-1], side="right"))
        cells.append(row * attention.shape[1] + column)
    return cells


def attention_sampler(
    weights: Weights,
    attention: Array,
    image: Array,
    size: Array | None = None,
    examples: Array | None = None,
    *,
    patches: int,
    patch_size: int,
    stride: int,
    seed: int,
    training: bool,
) -> list[Array]:
    """Patches, cells and log-probabilities, image by image."""
    answers, width = [], attention.shape[2]
    for b, (a, pixels) in enumerate(zip(attention, image, strict=True)):
        if size is not None:
            pixels = pixels[: size[b, 0], : size[b, 1]]
            whole = np.zeros_like(a)
            rows, columns = pixels.shape[0] // stride, pixels.shape[1] // stride
            whole[:rows, :columns] = a[:rows, :columns]
            a = whole / whole.sum()
        example = b if examples is None else int(examples[b])
        key = threefry((seed % WORD, int(weights["step"])), (example, 0))
        cells = draws(a, patches, key) if training else greedy(a, patches, math.ceil(patch_size / stride))
        corners = [[corner(i, Fraction(stride), patch_size) for i in divmod(cell, width)] for cell in cells]
        cut = np.stack([patch(pixels, row, column, patch_size) for row, column in corners])
        answers.append((cut.astype("float64"), np.array(cells, "int32"), np.log(a.ravel()[cells])))
    return [np.stack(each) for each in zip(*answers, strict=True)]


def convolve_same(x: Array, kernel: Array, bias: Array) -> Array:
    """3 x 3 cross-correlation of `(B, H, W, C)`, zeros around it."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return bias + sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def _leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.2 * x)


def attention_network(weights: Weights, x: Array, training: bool) -> Array:
    """The map of an overview: three convolutions with leaky ReLU and batch norm, one to the logits."""
    for i in range(3):
        x = _leaky(convolve_same(x, weights[f"conv_{i}/kernel"], weights[f"conv_{i}/bias"]))
        mean, variance = weights[f"bn_{i}/moving_mean"], weights[f"bn_{i}/moving_variance"]
        if training:
            mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        x = (x - mean) / np.sqrt(variance + 1e-3) * weights[f"bn_{i}/gamma"] + weights[f"bn_{i}/beta"]
    logits = convolve_same(x, weights["logits/kernel"], weights["logits/bias"])[..., 0]
    exponential = np.exp(logits - logits.max())
    return exponential / exponential.sum(axis=(1, 2), keepdims=True)


def feature_network(weights: Weights, x: Array) -> Array:
    """The scores of patches, of unit norm."""
    for i in range(4):
        x = _leaky(convolve_same(x, weights[f"conv_{i}/kernel"], weights[f"conv_{i}/bias"]))
    scores = x.max(axis=(1, 2)) @ weights["head/kernel"] + weights["head/bias"]
    return scores / np.sqrt((scores**2).sum(axis=-1, keepdims=True))
