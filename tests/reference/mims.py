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
    training: bool = False,
    epsilon: float = 1e-3,
) -> list[tuple[Array, Array]]:
    """The bags of the multi-scale convolution and their masks: scales, then slices, rows, columns."""
    volumes = x if x.ndim == 5 else x[:, None]
    batch, slices, height, width, channels = volumes.shape
    real = np.ones((batch, slices), bool) if mask is None else mask
    maps = np.where(real[..., None, None, None], volumes, 0).reshape(-1, height, width, channels)
    pairs, first = [], 0
    for group, (_, count) in enumerate(kernels):
        bags, masks = [], []
        for i, scale in enumerate(scales):
            resized = resize_bilinear(maps, int(height * scale + 1e-9), int(width * scale + 1e-9))
            answers = convolve_valid(resized, weights[f"conv_{group}/kernel"], weights[f"conv_{group}/bias"])
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
