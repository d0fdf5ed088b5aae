"""The system of attention sampling (Sinigaglia): a pass over images, drawn or chosen, and the loss."""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from reference import Array, Weights
from reference.sampler import attention_network, corner, draws, feature_network, greedy, overview, patch
from reference.sampling import WORD, draw_distinct, threefry


def forward(
    attend: Weights,
    features: Weights,
    images: Array,
    *,
    patches: int,
    patch_size: int,
    stride: int,
    temperature: float,
    aggregation: str = "self_weighted",
    replacement: bool = True,
    seed: int = 0,
    steps: list[int] | None = None,
) -> dict[str, Any]:
    """One pass with the draws of these training steps, or with chosen cells; a row for each draw or image."""
    attention = attention_network(attend, overview(images, stride) / 255, steps is not None)
    rows: list[tuple] = []
    for b, (a, image) in enumerate(zip(attention, images, strict=True)):
        for step in steps or [None]:
            if step is None:
                cells = greedy(a, patches, math.ceil(patch_size / stride))
            else:
                key = threefry((seed, step % WORD), (b, 0))
                cells = draws(a, patches, key) if replacement else draw_distinct(a, key, patches)
            corners = [
                [corner(i, Fraction(stride), patch_size) for i in divmod(int(cell), a.shape[1])]
                for cell in cells
            ]
            cut = np.stack([patch(image, *place, patch_size) for place in corners]).astype("float64")
            scores = temperature * feature_network(features, cut / 255)
            own = a.ravel()[np.array(cells)]
            if steps is None or aggregation == "self_weighted":
                fused = own @ scores / own.sum()
            else:
                fused = expected(scores, own, replacement)
            rows.append((np.array(cells), np.array(corners), own, scores, fused))
    names = ("cells", "corners", "probabilities", "patch_scores", "scores")
    return {"attention": attention} | dict(zip(names, map(np.stack, zip(*rows, strict=True)), strict=True))


def expected(values: Array, own: Array, replacement: bool) -> Array:
    """The estimate of `sum_p a_p f_p` from `values (P, ...)` of cells of probability `own (P,)`."""
    if replacement:
        return values.mean(axis=0)
    estimates = []
    for t in range(len(own)):  # what was drawn is known, the rest is estimated by this draw
        known = sum((own[s] * values[s] for s in range(t)), np.zeros_like(values[0]))
        estimates.append(known + (1 - own[:t].sum()) * values[t])
    return np.mean(estimates, axis=0)


def cross_entropy(scores: Array, label: int) -> Array:
    """Of scores `(..., N)`, in natural logarithms."""
    return np.log(np.exp(scores).sum(axis=-1)) - scores[..., label]


def loss(
    found: dict[str, Any],
    labels: Array,
    *,
    estimator: str = "reinforce",
    reward: str = "patch",
    baseline: str = "leave_one_out",
    replacement: bool = True,
    repeats: int = 1,
    entropy: float = 0.05,
    weights: Array | None = None,
) -> float:
    """The loss of a pass; `weights` of the images weigh all but the value of the surrogate."""
    weights = np.ones(len(labels)) if weights is None else weights
    a = found["attention"]
    spread = (a * np.log(a)).sum(axis=(1, 2))
    truth = np.repeat(labels, repeats)
    losses = [cross_entropy(*each) for each in zip(found["scores"], truth, strict=True)]
    total = np.mean(np.repeat(weights, repeats) * losses) + entropy * np.mean(weights * spread)
    if estimator == "expectation":
        return total
    of = "patch_scores" if reward == "patch" else "scores"
    rewards = np.stack([np.exp(-cross_entropy(*each)) for each in zip(found[of], truth, strict=True)])
    gains = rewards - rewards.mean()
    if baseline == "z_score":
        gains = gains / (rewards.std() + 1e-7)
    if baseline == "leave_one_out" and repeats > 1:
        for row in range(len(rewards)):
            first = row - row % repeats
            others = [rewards[i] for i in range(first, first + repeats) if i != row]
            gains[row] = rewards[row] - np.mean(others)
    own = found["probabilities"]
    left = np.ones_like(own) if replacement else 1 - (np.cumsum(own, axis=1) - own)
    if reward == "image":
        return total - np.mean(gains * np.log(own / left).sum(axis=1))
    if replacement:
        return total - np.mean(gains * np.log(own))
    return total - np.mean([expected(*each, False) for each in zip(gains, own, strict=True)])
