"""Times the top k, forward and backward, beside transpose + `tf.math.top_k`, alternating in one run.

Run from the project's folder: `python benchmarks/top_k_pool.py [--runs 15]`.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from keras_medattn.ops import top_k

SHAPE, K = (8, 10_000, 512), 5


def plain(x: tf.Tensor) -> tf.Tensor:
    return tf.math.top_k(tf.transpose(x, (0, 2, 1)), K)[0]


def ours(x: tf.Tensor) -> tf.Tensor:
    return top_k(x, K)[0]


def step(values: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Loss and gradient in one graph; both are answered, or the forward pass would be left out."""

    @tf.function(jit_compile=False)
    def forward_and_backward(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(values(x)))
        return loss, tape.gradient(loss, x)

    return forward_and_backward


def milliseconds(function: Callable, x: tf.Tensor) -> float:
    start = time.perf_counter()
    loss, gradient = function(x)
    loss.numpy(), gradient[0, 0, 0].numpy()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    x = tf.random.stateless_normal(SHAPE, (0, 1))
    ties = tf.round(x)
    for bag in (x, ties):
        np.testing.assert_array_equal(ours(bag), plain(bag))
    steps = {"transpose + tf.math.top_k": step(plain), "keras_medattn.ops.top_k": step(ours)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 2):
        for name, function in steps.items():
            elapsed = milliseconds(function, x)
            if run >= 2:  # the first ones trace and warm up
                times[name].append(elapsed)
    print(f"bag {SHAPE}, k = {K}, forward and backward, {runs} alternating runs; values equal, with ties too")
    print(f"{'':28}{'median ms':>10}{'fastest':>10}")
    for name, elapsed in times.items():
        print(f"{name:28}{np.median(elapsed):10.1f}{min(elapsed):10.1f}")
    baseline, own = times.values()
    print(f"{'median of the ratios':28}{np.median(np.array(baseline) / own):9.2f}x")


if __name__ == "__main__":
    main()
