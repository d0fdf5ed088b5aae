"""Times SpatialAttn, forward and backward, beside the plain form that holds all scores, and beside PyTorch's.

Run from the project's folder: `python benchmarks/spatial_attn.py [--runs 7]`, in the environment of `make
setup-benchmarks` for the rows of PyTorch. All steps take turns in one run; memory is the peak of a first step
above what its process held before.
"""

import argparse
import importlib.util
from collections.abc import Callable

import measure
import numpy as np
import tensorflow as tf

from keras_medattn.layers import SpatialAttn

CHANNELS, RATIO = 256, 8
CASES = {"N = 12544, batch 2": (2, 112), "N = 3136, batch 8": (8, 56)}
KERNELS = {"key": CHANNELS // RATIO, "query": CHANNELS // RATIO, "value": CHANNELS}


def arrays(batch: int, side: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Maps, and kernels that give scores of about unit variance."""
    rng = np.random.default_rng(0)
    scale = {"key": 0.026, "query": 0.026, "value": 0.06}
    maps = rng.normal(size=(batch, side, side, CHANNELS)).astype("float32")
    return maps, {
        name: (scale[name] * rng.normal(size=(CHANNELS, width))).astype("float32")
        for name, width in KERNELS.items()
    }


def plain(maps: tf.Tensor, key: tf.Tensor, query: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """The equations as they stand."""
    flat = tf.reshape(maps, (tf.shape(maps)[0], -1, CHANNELS))
    key, query, value = (tf.einsum("bnc,cd->bnd", flat, kernel) for kernel in (key, query, value))
    scores = tf.nn.softmax(tf.einsum("bnd,bmd->bnm", key, query))
    return maps + tf.reshape(tf.einsum("bnm,bmd->bnd", scores, value), tf.shape(maps))


def tensorflow_step(function: Callable, maps: tf.Tensor, kernels: list[tf.Variable]) -> measure.Step:
    """Loss and gradients in one graph; all are answered, or the forward pass would be left out."""

    @tf.function(jit_compile=False)
    def run(maps: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            tape.watch(maps)
            loss = tf.reduce_mean(tf.square(function(maps)))
        return loss, *tape.gradient(loss, [maps, *kernels])

    return lambda: [tensor.numpy() for tensor in run(maps)]


def make_plain(batch: int, side: int) -> measure.Step:
    maps, kernels = arrays(batch, side)
    variables = [tf.Variable(kernels[name]) for name in KERNELS]
    return tensorflow_step(lambda maps: plain(maps, *variables), tf.constant(maps), variables)


def make_ours(batch: int, side: int) -> measure.Step:
    maps, kernels = arrays(batch, side)
    layer = SpatialAttn(RATIO)
    layer.build(maps.shape)
    for name, kernel in kernels.items():
        getattr(layer, name).assign(kernel)
    return tensorflow_step(layer, tf.constant(maps), [getattr(layer, name).value for name in KERNELS])


def make_torch(batch: int, side: int) -> measure.Step:
    import torch

    maps, kernels = arrays(batch, side)
    watched = [
        torch.tensor(array, requires_grad=True) for array in (maps, *(kernels[name] for name in KERNELS))
    ]

    def step() -> list[np.ndarray]:
        maps, key, query, value = watched
        flat = maps.reshape(batch, side * side, CHANNELS)
        attended = torch.nn.functional.scaled_dot_product_attention(
            flat @ key, flat @ query, flat @ value, scale=1.0
        )
        loss = (maps + attended.reshape(maps.shape)).square().mean()
        gradients = torch.autograd.grad(loss, watched)
        return [tensor.detach().numpy() for tensor in (loss, *gradients)]

    return step


def multiply_adds(batch: int, side: int, blocks: bool) -> int:
    """Of the products of a step: each forward product has two backward, blocks compute the scores again."""
    positions, widths = side * side, sum(KERNELS.values())
    scores = 3 * (CHANNELS // RATIO + CHANNELS) + (CHANNELS // RATIO if blocks else 0)
    return batch * positions * (3 * CHANNELS * widths + positions * scores)


def rate(size: int = 2048) -> tuple[measure.Step, int]:
    """A large product, and its multiply-adds."""
    a = tf.random.stateless_normal((size, size), (0, 1))
    product = tf.function(lambda: tf.matmul(a, a), jit_compile=False)
    return lambda: product().numpy(), size**3


MAKERS = {"plain einsum": make_plain, "SpatialAttn": make_ours, "torch sdpa": make_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    makers = {name: make for name, make in MAKERS.items() if name != "torch sdpa"}
    if importlib.util.find_spec("torch"):
        makers = MAKERS
    for title, case in CASES.items():
        memory = {name: measure.memory(make, *case) for name, make in makers.items()}
        steps = {name: make(*case) for name, make in makers.items()}
        first, *others = ([np.asarray(array) for array in step()] for step in steps.values())
        for answer in others:
            for array, expected in zip(answer, first, strict=True):
                np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        product, work = rate()
        times = measure.times({**steps, "product": product}, runs)
        each = times.pop("product").min() / work  # ms a multiply-add
        rows = [
            [
                name,
                np.median(times[name]),
                measure.ratio(times[name], times["plain einsum"]),
                memory[name],
                memory[name] / memory["plain einsum"],
            ]
            for name in makers
        ]
        rows += [
            [f"floor, {name}", multiply_adds(*case, blocks) * each, "", "", ""]
            for name, blocks in (("all scores", False), ("blocks", True))
        ]
        if "torch sdpa" not in makers:
            rows.append(["torch sdpa: torch is not installed", "", "", "", ""])
        title = f"C = {CHANNELS}, r = {RATIO}, {title}, forward and backward, {runs} runs in turn"
        measure.table(title, ["", "median ms", "x plain", "MiB", "x plain"], rows)
        print(f"  floor: multiply-adds at the {1e-6 / each:.0f} G a second of a {2048}-square product here\n")


if __name__ == "__main__":
    main()
