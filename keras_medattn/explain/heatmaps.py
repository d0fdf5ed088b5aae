"""Where a model looked: its own attention, or the gradient-times-input heatmap of Li et al. (2019)."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def evidence(model: Any, images: tf.Tensor, classes: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
    """What argues for a class: where the model looked, and what it says of the places itself.

    Args:
        model: as every model of this package. Where its `explain(images)` names `attention (B, h, w)`, that
            is the map, for all classes the same; else the map is that of `contributions`.
        images: `(B, H, W, 3)` in 0..255.
        classes: `(B,)` int, the class to argue for; by default the predicted one.

    Returns:
        As `contributions`, and where the model has them `boxes (B, K, 4)` and `weights (B, K)`, of the
        predicted class.
    """
    named = model.explain(images)
    if "attention" in named:
        scores = named["scores"]
        classes = tf.argmax(scores, axis=-1) if classes is None else tf.cast(classes, tf.int64)
        found = {
            "contributions": tf.cast(named["attention"], tf.float32),
            "scores": scores,
            "classes": classes,
        }
    else:
        found = contributions(model, images, classes)
    return found | {key: named[key] for key in ("boxes", "weights") if key in named}


def contributions(model: Any, images: tf.Tensor, classes: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
    """How much each cell of the primary maps argues for a class.

    ```
    T_hw = sum_i X_ihw dy_c / dX_ihw
    ```

    Li et al., "Multi-Instance Multi-Scale CNN for Medical Image Classification", appendix C, where `X` are
    the model's primary maps and `y_c` the score of class c. The paper's text sets the class's loss to -1,
    which would keep the evidence against it: this is `+dy_c`.

    Args:
        model: has `features(images)` and `score(maps)`.
        images: `(B, H, W, 3)` in 0..255.
        classes: `(B,)` int, the class to argue for; by default the predicted one.

    Returns:
        `contributions (B, h, w)` float32, negative where a cell argues against the class; `scores (B, C)`;
        `classes (B,)` int64.
    """
    maps = model.features(images, training=False)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        scores = model.score(maps, training=False)
        if classes is None:
            classes = tf.argmax(scores, axis=-1)
        chosen = tf.gather(scores, classes, batch_dims=1)
    slope = tape.gradient(chosen, maps)
    argued = tf.reduce_sum(tf.cast(slope * maps, tf.float32), axis=-1)
    return {"contributions": argued, "scores": scores, "classes": tf.cast(classes, tf.int64)}


def attention(argued: tf.Tensor) -> tf.Tensor:
    """Keep what argues for the class and scale each image's map to `[0, 1]`; 0 everywhere stays 0.

    Example:
        >>> attention(tf.constant([[[-1.0, 1.0], [2.0, 4.0]]])).numpy().tolist()
        [[[0.0, 0.25], [0.5, 1.0]]]
    """
    kept = tf.nn.relu(argued)
    return tf.math.divide_no_nan(kept, tf.reduce_max(kept, axis=(1, 2), keepdims=True))
