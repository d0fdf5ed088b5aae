"""Multi-scale convolution and top-k pooling (Li et al.)."""

from collections.abc import Sequence

import numpy as np

from reference import Array, Weights, convolve_valid, resize_bilinear


def ms_conv(
    weights: Weights,
    x: Array,
    mask: Array | None = None,
    *,
    kernels: Sequence[tuple[int, int]],
    scales: Sequence[float],
    dilations: Sequence[int] | None = None,
    training: bool = False,
    epsilon: float = 1e-3,
) -> list[tuple[Array, Array]]:
    """The bags of the multi-scale convolution and their masks: scales, then slices, rows, columns.

    A list of maps, one for each scale, is taken as it is: those of a pyramid.
    """
    levels = x if isinstance(x, list) else [x] * len(scales)
    levels = [level if level.ndim == 5 else level[:, None] for level in levels]
    batch, slices = levels[0].shape[:2]
    real = np.ones((batch, slices), bool) if mask is None else mask
    pairs, first = [], 0
    for group, (_, count) in enumerate(kernels):
        bags, masks = [], []
        for i, scale in enumerate(scales):
            height, width, channels = levels[i].shape[2:]
            maps = np.where(real[..., None, None, None], levels[i], 0).reshape(-1, height, width, channels)
            factor = 1 if isinstance(x, list) else scale
            resized = resize_bilinear(maps, int(height * factor + 1e-9), int(width * factor + 1e-9))
            kernel = _dilated(weights[f"conv_{group}/kernel"], dilations[i] if dilations else 1)
            answers = convolve_valid(resized, kernel, weights[f"conv_{group}/bias"])
            bag = answers.reshape(batch, -1, count)
            here = np.repeat(real, answers.shape[1] * answers.shape[2], axis=1)
            name = f"bn_{i}_{group}"
            mean, variance = weights[f"{name}/moving_mean"], weights[f"{name}/moving_variance"]
            if training:
                mean, variance = bag[here].mean(axis=0), bag[here].var(axis=0)
            bag = (bag - mean) / np.sqrt(variance + epsilon) + weights.get(f"{name}/beta", 0)
            bags.append(bag * weights["sw"][i, first : first + count])
            masks.append(here)
        pairs.append((np.concatenate(bags, axis=1), np.concatenate(masks, axis=1)))
        first += count
    return pairs


def _dilated(kernel: Array, rate: int) -> Array:
    """The kernel with `rate - 1` zeros between its cells."""
    size = (kernel.shape[0] - 1) * rate + 1
    grown = np.zeros((size, size, *kernel.shape[2:]))
    grown[::rate, ::rate] = kernel
    return grown


def top_k_pool(weights: Weights, bags: Sequence[tuple[Array, Array | None]]) -> dict[str, Array]:
    """The weighted sum of each channel's highest values, with what was chosen."""
    logits = weights["logits"]
    simplex = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    k = simplex.shape[-1]
    simplex = np.broadcast_to(simplex, (sum(bag.shape[-1] for bag, _ in bags), k))
    columns = [
        (bag[..., n], np.ones(bag.shape[:2], bool) if mask is None else mask)
        for bag, mask in bags
        for n in range(bag.shape[-1])
    ]
    batch = len(bags[0][0])
    indices = np.zeros((batch, len(columns), k), int)
    values, shares = np.zeros((batch, len(columns), k)), np.zeros((batch, len(columns), k))
    for b in range(batch):
        for n, (column, mask) in enumerate(columns):
            places = np.flatnonzero(mask[b])
            chosen = places[np.argsort(-column[b, places], kind="stable")][:k]
            indices[b, n, : len(chosen)] = chosen
            values[b, n, : len(chosen)] = column[b, chosen]
            if len(chosen):
                shares[b, n, : len(chosen)] = simplex[n, : len(chosen)] / simplex[n, : len(chosen)].sum()
    return {"pooled": (values * shares).sum(axis=-1), "indices": indices, "values": values, "weights": shares}
