"""Where a model looked: its own attention, or the gradient-times-input heatmap of Li et al. (2019)."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def evidence(
    model: Any, images: Any, classes: tf.Tensor | None = None, sign: int = 1
) -> dict[str, tf.Tensor]:
    """What argues for a class: where the model looked, and what it says of the places itself.

    Args:
        model: as every model of this package. Where its `explain(images)` names `attention (B, h, w)`, that
            is the map, for all classes the same; else the map is that of `contributions`.
        images: `(B, H, W, 3)` in 0..255.
        classes: `(B,)` int, the class to argue for; by default the predicted one.
        sign: of `contributions`.

    Returns:
        As `contributions`, and all that `explain` names: of several systems `boxes (B, K, 4)` and `weights
        (B, K)`, which are of the predicted class.

    Raises:
        ValueError: if what argues against a class is asked of a model that has an attention of its own.
    """
    named = model.explain(images)
    if "attention" in named:
        if sign < 0:
            raise ValueError(
                f"a {type(model).__name__} shows its own attention, which argues against no class. "
                f"Received: sign={sign}"
            )
        scores = named["scores"]
        classes = tf.argmax(scores, axis=-1) if classes is None else tf.cast(classes, tf.int64)
        found = {
            "contributions": tf.cast(named["attention"], tf.float32),
            "scores": scores,
            "classes": classes,
        }
    else:
        found = contributions(model, images, classes, sign)
    return named | found


def contributions(
    model: Any, images: Any, classes: tf.Tensor | None = None, sign: int = 1
) -> dict[str, tf.Tensor]:
    """How much each cell of the primary maps argues for a class.

    ```
    T_hw = sum_i X_ihw dy_c / dX_ihw
    ```

    Li et al., "Multi-Instance Multi-Scale CNN for Medical Image Classification", appendix C, where `X` are
    the model's primary maps and `y_c` the score of class c. The paper's text sets the class's loss to -1,
    which would keep the evidence against it: this is `+dy_c`. Where the primary maps are a list, of the
    levels of a pyramid, their maps are added.

    Args:
        model: has `features(images)`, which may answer maps at several scales, and `score(maps)`.
        images: `(B, H, W, 3)` in 0..255; or volumes, a dict of `image (B, S, H, W, 3)` and `mask (B, S)`.
        classes: `(B,)` int, the class to argue for; by default the predicted one.
        sign: 1; or -1, the paper's: positive is then what argues against the class.

    Returns:
        `contributions (B, h, w)`, of volumes `(B, S, h, w)`, float32, negative where a cell argues against
        the class; `scores (B, C)`; `classes (B,)` int64.
    """
    maps = model.features(images, training=False)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        scores = model.score(maps, training=False)
        if classes is None:
            classes = tf.argmax(scores, axis=-1)
        chosen = tf.gather(scores, classes, batch_dims=1)
    slopes, levels = tape.gradient(chosen, maps), maps
    if not isinstance(maps, list):
        slopes, levels = [slopes], [maps]
    argued = [
        sign * tf.reduce_sum(tf.cast(slope * level, tf.float32), axis=-1)
        for slope, level in zip(slopes, levels, strict=True)
    ]
    return {"contributions": _added(argued), "scores": scores, "classes": tf.cast(classes, tf.int64)}


def _added(argued: list[tf.Tensor]) -> tf.Tensor:
    """The maps `(B, h, w)` of a pyramid's levels on the largest one; each level keeps its sum, nearly."""
    largest = max(argued, key=lambda level: level.shape[1] or 0)
    size, total = tf.shape(largest)[1:], largest
    for level in argued:
        if level is not largest:
            resized = tf.image.resize(tf.expand_dims(level, -1), size, method="nearest")
            total += tf.squeeze(resized, -1) * tf.cast(tf.size(level) / tf.size(largest), tf.float32)
    return total


def attention(argued: tf.Tensor) -> tf.Tensor:
    """Keep what argues for the class and scale each image's map to `[0, 1]`; 0 everywhere stays 0.

    Example:
        >>> attention(tf.constant([[[-1.0, 1.0], [2.0, 4.0]]])).numpy().tolist()
        [[[0.0, 0.25], [0.5, 1.0]]]
    """
    kept = tf.nn.relu(argued)
    return tf.math.divide_no_nan(kept, tf.reduce_max(kept, axis=(1, 2), keepdims=True))
