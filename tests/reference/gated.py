"""Gated attention and instance crops (Fan et al.)."""

from collections.abc import Sequence

import numpy as np

from reference import Array, Weights, resize_bilinear


def convolve_dilated(x: Array, kernel: Array, rate: int) -> Array:
    """Cross-correlation `(B, H, W, C) * (3, 3, C, n)`, dilated, with zeros around: the size stays."""
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (rate, rate), (rate, rate), (0, 0)))
    return sum(
        padded[:, i * rate : i * rate + height, j * rate : j * rate + width] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def gated_attention(
    weights: Weights,
    x: Array,
    *,
    dilations: Sequence[int] = (2, 4),
    sequential: bool = False,
    reduce: str = "mean",
    training: bool = False,
    epsilon: float = 1e-3,
) -> dict[str, Array]:
    """The gated features and the maps."""
    blocks, features = [], x
    for d, rate in enumerate(dilations):
        z = convolve_dilated(features if sequential else x, weights[f"kernel_{d}"], rate)
        mean, variance = weights[f"bn_{d}/moving_mean"], weights[f"bn_{d}/moving_variance"]
        if training:
            mean, variance = z.mean(axis=(0, 1, 2)), z.var(axis=(0, 1, 2))
        z = (z - mean) / np.sqrt(variance + epsilon) * weights[f"bn_{d}/gamma"] + weights[f"bn_{d}/beta"]
        features = np.maximum(z, 0)
        blocks.append(features)
    total = blocks[-1] if sequential else sum(blocks)
    m = total.sum(axis=3) if reduce == "sum" else weights["temperature"] * total.mean(axis=3)
    e = np.exp(m - m.max(axis=(1, 2), keepdims=True))
    s = e / e.sum(axis=(1, 2), keepdims=True)
    c = np.einsum("bijk,bij->bk", x, s)
    g = np.maximum(np.tanh(c), 0)
    omega = np.einsum("bk,bijk->bij", g, x) / x.shape[3]
    return {"gated": x * g[:, None, None], "semantic": s, "gates": g, "attention": omega}


def components(mask: Array) -> Array:
    """`(H, W)` int: 0 outside, 1, 2, ... for the 8-connected components, by walking from cell to cell."""
    labels, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start], edge = count, [start]
        while edge:
            row, column = edge.pop()
            for r in range(max(row - 1, 0), min(row + 2, mask.shape[0])):
                for c in range(max(column - 1, 0), min(column + 2, mask.shape[1])):
                    if mask[r, c] and not labels[r, c]:
                        labels[r, c] = count
                        edge.append((r, c))
    return labels


def crop(image: Array, box: Sequence[float], size: int) -> Array:
    """The part of `(H, W, C)` under `(x0, y0, x1, y1)`, read pixel by pixel."""
    (height, width, channels), (x0, y0, x1, y1) = image.shape, box
    answer = np.zeros((size, size, channels))
    for i in range(size):
        for j in range(size):
            y = min(max(y0 + (i + 0.5) * (y1 - y0) / size - 0.5, 0), height - 1)
            x = min(max(x0 + (j + 0.5) * (x1 - x0) / size - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            for row, down in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                for column, across in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                    answer[i, j] += down * across * image[row, column]
    return answer


def instance_crops(
    attention: Array, images: Array, size: Array | None, *, k: int, crop_size: int, label_size: int
) -> tuple[Array, Array, Array]:
    """Crops, boxes and mask of what lies above the mean."""
    maps = resize_bilinear(attention[..., None], label_size, label_size)[..., 0]
    crops = np.zeros((len(maps), k, crop_size, crop_size, images.shape[3]))
    boxes, real = np.zeros((len(maps), k, 4)), np.zeros((len(maps), k), bool)
    for b, omega in enumerate(maps):
        rows, columns = images.shape[1:3] if size is None else size[b]
        image = images[b, :rows, :columns].astype("float64")
        labels = components(omega - omega.min() > (omega - omega.min()).mean())
        mass = [omega[labels == n].sum() for n in range(1, labels.max() + 1)]
        for slot, n in enumerate(np.argsort(-np.array(mass), kind="stable")[:k]):
            y, x = np.nonzero(labels == n + 1)
            edges = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            boxes[b, slot] = edges * np.array([columns, rows, columns, rows]) / label_size
            crops[b, slot] = crop(image, boxes[b, slot], crop_size)
            real[b, slot] = True
    return crops, boxes, real
