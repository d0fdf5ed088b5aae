"""What is estimated from the cells that were drawn: features, and the gradient of the attention.

Shapes: B images, h x w cells of the map, P cells of each image, D features.
"""

from typing import Any

import keras

from keras_medattn.ops.comparison import wide
from keras_medattn.ops.draws import FLOOR, as_map

ops: Any = keras.ops  # a type checker would infer its types from one backend

BASELINES = ("leave_one_out", "batch_mean", "z_score")


def expectation(features: Any, probabilities: Any, replacement: bool) -> Any:
    """Estimates `sum_p a_p f_p` over all cells from those drawn, without bias in value and in gradient.

    With sg the stopped gradient and cum the exclusive cumulative sum over the draws: with replacement
    `mean_t(f_t a_t / sg(a_t))`, without it `mean_t(cum(a f)_t + sg(1 - cum(a)_t) (a_t / sg(a_t)) f_t)`. That
    is exact for anything linear in the estimate. A gradient of `1 - cum` would be a bias. (Katharopoulos and
    Fleuret, Processing Megapixel Images with Deep Attention-Sampling Models, estimate the same; their
    hand-written gradient without replacement is biased.)

    Args:
        features: Float tensor `(B, P, D)` of the drawn cells, in the order of drawing.
        probabilities: Float tensor `(B, P)`, `a` of the drawn cells.
        replacement: How the cells were drawn.

    Returns:
        Float tensor `(B, D)`, float32 or better.

    Example:

    >>> features = ops.convert_to_tensor([[[2.0], [4.0]]])
    >>> float(expectation(features, ops.convert_to_tensor([[0.5, 0.3]]), replacement=False)[0, 0])
    2.5
    """
    features, drawn = wide(features), wide(probabilities)
    fixed = ops.stop_gradient(drawn)
    one = ops.where(fixed > 0, drawn / ops.where(fixed > 0, fixed, 1), 1)  # 1, with the gradient of log a
    one = ops.expand_dims(one, 2)  # (B, P, 1)
    if replacement:
        return ops.mean(one * features, axis=1)
    weighted = ops.expand_dims(drawn, 2) * features
    left = ops.expand_dims(ops.maximum(1 - (ops.cumsum(fixed, axis=1) - fixed), 0), 2)  # (B, P, 1)
    return ops.mean(ops.cumsum(weighted, axis=1) - weighted + left * one * features, axis=1)


def aggregate(
    features: Any,
    probabilities: Any,
    aggregation: str = "self_weighted",
    estimator: str = "reinforce",
    replacement: bool = True,
    drawn: bool = True,
) -> Any:
    """The features of an image from those of its cells (Sinigaglia, Eq. 1).

    `"self_weighted"`: `sum_t a_t f_t / sum_t a_t`, the paper's. Over drawn cells it counts `a` twice: with
    replacement it tends to `sum_p a_p^2 f_p / sum_p a_p^2`. `"mean"`: the estimate of `sum_p a_p f_p` by
    `expectation`, which is without bias. Chosen cells, where nothing was drawn, get the weights `a / sum a`
    in either case.

    Args:
        features: Float tensor `(B, P, D)`.
        probabilities: Float tensor `(B, P)`, `a` of the cells.
        aggregation: `"self_weighted"` or `"mean"`.
        estimator: `"reinforce"`: `a` gets no gradient from here; `"expectation"`: the exact pathwise one.
        replacement: How the cells were drawn.
        drawn: Whether the cells were drawn, rather than chosen.

    Returns:
        Float tensor `(B, D)`, float32 or better.

    Raises:
        ValueError: If a name is unknown, or `"self_weighted"` meets `"expectation"`, which it would bias.

    Example:

    >>> features = ops.convert_to_tensor([[[2.0], [4.0]]])
    >>> float(aggregate(features, ops.convert_to_tensor([[0.75, 0.25]]))[0, 0])
    2.5
    """
    if aggregation not in ("self_weighted", "mean") or estimator not in ("reinforce", "expectation"):
        raise ValueError(
            "`aggregation` must be 'self_weighted' or 'mean', `estimator` 'reinforce' or 'expectation'. "
            f"Received: aggregation={aggregation!r}, estimator={estimator!r}"
        )
    if aggregation == "self_weighted" and estimator == "expectation":
        raise ValueError(
            "Weights `a` over cells drawn from `a` do not estimate the expectation: take aggregation='mean'. "
            f"Received: aggregation={aggregation!r}, estimator={estimator!r}"
        )
    features, weights = wide(features), wide(probabilities)
    if estimator == "reinforce":
        weights = ops.stop_gradient(weights)
    if drawn and aggregation == "mean":
        return expectation(features, weights, replacement)
    weights = ops.expand_dims(weights / ops.maximum(ops.sum(weights, axis=1, keepdims=True), FLOOR), 2)
    return ops.sum(weights * features, axis=1)


def reinforce_surrogate(
    log_probs: Any,
    rewards: Any,
    baseline: str = "leave_one_out",
    repeats: int = 1,
    replacement: bool = True,
) -> Any:
    """The loss whose gradient is the REINFORCE estimate: it raises the attention where the reward is high.

    With `A = sg(r - b)` for the reward r and the baseline b:

    - a reward for each patch, with replacement: `-mean(A_t log a_t)`;
    - a reward for each patch, without: `-mean_t(cum(a A)_t + sg(1 - cum(a)_t) (a_t / sg(a_t)) A_t)`, in which
      `a` is found again from the ordered log-probabilities. (`A_t log a_t` would be biased there);
    - a reward for each image: `-mean_b(A_b sum_t log_probs_t)`, with the log-probability of all its draws.

    For cells that were drawn one in view of another (`RecurrentSampler`), give a reward for each image, or
    `ops.cumsum(log_probs, axis=1)` with a reward for each patch.

    Args:
        log_probs: Float tensor `(B, P)`, as `log_probabilities` answers for the same `replacement`.
        rewards: Float tensor `(B, P)`, one for each patch, or `(B,)`, one for each image; no gradient enters.
        baseline: As in `advantages`.
        repeats: How often each image stands in the batch, in rows that follow each other.
        replacement: How the cells were drawn.

    Returns:
        Float tensor `()`, float32 or better.

    Raises:
        ValueError: If the shapes do not fit each other, or `baseline` is unknown.

    Example:

    >>> log_probs = ops.log(ops.convert_to_tensor([[0.5, 0.25]]))
    >>> loss = reinforce_surrogate(log_probs, ops.convert_to_tensor([[1.0, 0.0]]), "batch_mean")
    >>> round(float(loss), 4)
    -0.1733
    """
    if len(log_probs.shape) != 2 or len(rewards.shape) not in (1, 2):
        raise ValueError(
            "`log_probs` must have the shape (B, P), `rewards` (B, P) or (B,). "
            f"Received: log_probs.shape={tuple(log_probs.shape)}, rewards.shape={tuple(rewards.shape)}"
        )
    logs, gains = wide(log_probs), advantages(rewards, baseline, repeats)
    if len(rewards.shape) == 1:
        return -ops.mean(gains * ops.sum(logs, axis=1))
    if replacement:
        return -ops.mean(gains * logs)
    left = ops.log(ops.maximum(-ops.expm1(logs), FLOOR))  # 1 - cum(a)_t is the product of the earlier ones
    probabilities = ops.exp(logs + ops.cumsum(left, axis=1) - left)
    return -ops.mean(expectation(ops.expand_dims(gains, 2), probabilities, replacement=False))


def likelihood_rewards(scores: Any, y: Any) -> Any:
    """The probability that scores give to the true class: `exp(-cross entropy)` (Sinigaglia).

    Args:
        scores: Float tensor `(B, N)` of images, or `(B, P, N)` of patches.
        y: Labels of the images, ints `(B,)` or `(B, 1)`, or one-hot `(B, N)`.

    Returns:
        Float tensor `(B,)` or `(B, P)`, float32 or better.

    Example:

    >>> scores = ops.log(ops.convert_to_tensor([[0.25, 0.75]]))
    >>> round(float(likelihood_rewards(scores, ops.convert_to_tensor([1]))[0]), 4)
    0.75
    """
    scores = wide(scores)
    if len(y.shape) == 1 or y.shape[-1] == 1:
        y = ops.one_hot(ops.cast(ops.reshape(y, (-1,)), "int32"), scores.shape[-1])
    y = ops.cast(y, scores.dtype)
    y = ops.expand_dims(y, 1) if len(scores.shape) == 3 else y
    return ops.exp(ops.sum(y * ops.log_softmax(scores, axis=-1), axis=-1))


def advantages(rewards: Any, baseline: str = "leave_one_out", repeats: int = 1) -> Any:
    """Rewards less a baseline.

    - `"leave_one_out"`: `r - b` with b the mean reward of the image's other repeats. It takes the image's
      difficulty off and is without bias, for b does not depend on the draw. At 1 repeat: `"batch_mean"`.
    - `"batch_mean"`: `r - mean(r)` over the n rewards of the batch. The own reward is among them, so that the
      gradient shrinks by `1 - 1/n`. Of several replicas, it is the batch of all.
    - `"z_score"`: `(r - mean(r)) / sd(r)`, standardised; it changes the length of the gradient, too.

    Args:
        rewards: Float tensor `(B, P)` or `(B,)`.
        baseline: The name.
        repeats: How often each image stands in the batch, in rows that follow each other.

    Returns:
        Float tensor of the shape of `rewards`, float32 or better, without a gradient.

    Raises:
        ValueError: If `baseline` is unknown or `repeats` below 1.

    Example:

    >>> [float(each) for each in advantages(ops.convert_to_tensor([1.0, 0.0, 2.0, 6.0]), repeats=2)]
    [1.0, -1.0, -4.0, 4.0]
    """
    if baseline not in BASELINES or repeats < 1:
        raise ValueError(
            f"`baseline` must be one of {BASELINES}, `repeats` at least 1. "
            f"Received: baseline={baseline!r}, repeats={repeats}"
        )
    rewards = ops.stop_gradient(wide(rewards))
    if baseline == "leave_one_out" and repeats > 1:
        means = ops.reshape(rewards, (-1, repeats, *rewards.shape[1:]))
        means = ops.mean(means, axis=2) if len(rewards.shape) == 2 else means  # (B / R, R)
        others = (ops.sum(means, axis=1, keepdims=True) - means) / (repeats - 1)
        return rewards - ops.reshape(others, (-1, *[1] * (len(rewards.shape) - 1)))
    centred = rewards - _batch_mean(rewards)
    if baseline == "z_score":
        return centred / (ops.sqrt(_batch_mean(ops.square(centred))) + keras.config.epsilon())
    return centred


def negative_entropy(attention: Any) -> Any:
    """`sum_p a_p log a_p` of each map (Sinigaglia's H): added to a loss, it spreads the attention.

    A cell of probability 0 adds 0, and its gradient is finite.

    Args:
        attention: Float tensor `(B, h, w)` that sums to 1 over each map.

    Returns:
        Float tensor `(B,)`, float32 or better: 0 for a map of one cell, `-log(h w)` for an even one.

    Example:

    >>> attention = ops.convert_to_tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    >>> [round(float(value), 4) for value in negative_entropy(attention)]
    [-0.6931, 0.0]
    """
    attention = as_map(attention)
    return ops.sum(attention * ops.log(ops.maximum(attention, FLOOR)), axis=(1, 2))


def _batch_mean(values: Any) -> Any:
    """The mean over the batch, in a replica's context over that of all replicas, by Keras's own means."""
    everywhere = keras.backend.backend() == "tensorflow"  # the others have no such context
    return ops.moments(values, tuple(range(len(values.shape))), synchronized=everywhere)[0]
