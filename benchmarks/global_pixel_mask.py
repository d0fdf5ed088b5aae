"""Times GlobalPixelMask's mask, forward and backward, beside plain convolutions over all images at once.

Run from the project's folder: `python benchmarks/global_pixel_mask.py [--runs 5]`, with 12 GiB of memory.
413 images of 224 x 224 x 3, smooth ones with a common structure. All steps of a K take turns in one run.
Memory is the peak of a first step above what its process held before it, with the images in place: beside it
stands what a device must hold, the step's memory and, for `whole` alone, its images. The floor is the time
that the products alone take at the pace of one big matrix product: for `whole` those of the plain
convolution, for `tiles` the half of them that GlobalPixelMask takes.
"""

import argparse

import keras
import measure
import numpy as np
import tensorflow as tf

from keras_medattn.layers import GlobalPixelMask

SIDE, COUNT, PLANES = 224, 413, 3
HIDDEN, AXES, PRODUCT = (32, 128), 64, 2048


def images() -> np.ndarray:
    """Smooth images: a common one, ten ways to vary it, and noise."""
    rng = np.random.default_rng(0)
    coarse = tf.image.resize(rng.normal(size=(11, 14, 14, PLANES)), (SIDE, SIDE), "bicubic").numpy()
    weights = np.concatenate([np.ones((COUNT, 1)), 0.3 * rng.normal(size=(COUNT, 10))], axis=1)
    mixed = np.tensordot(weights.astype("float32"), coarse, 1)
    return mixed + 0.3 * rng.standard_normal(mixed.shape, "float32")


def pixel_cnn(channels: int) -> keras.Model:
    """The plain one, with weights from a fixed seed."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Conv2D(channels, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )
    model.build((None, None, None, COUNT * PLANES))
    return model


def step_of(mask, weights: list[tf.Variable]) -> measure.Step:
    """Mask, loss and gradients in one graph; all are answered, or the forward pass would be left out."""
    upstream = tf.random.stateless_normal((1, SIDE, SIDE, 1), (0, 1))

    @tf.function(jit_compile=False)
    def run(*arguments: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            answer = tf.cast(mask(*arguments), "float32")
            loss = tf.reduce_mean(answer * upstream)
        return answer, loss, *tape.gradient(loss, weights)

    def step(*arguments: tf.Tensor) -> list[np.ndarray]:
        return [tensor.numpy() for tensor in run(*arguments)]

    return step


def make_whole(channels: int) -> measure.Step:
    pixels = tf.constant(images().transpose(1, 2, 0, 3).reshape(1, SIDE, SIDE, -1))
    model = pixel_cnn(channels)
    step = step_of(model, [weight.value for weight in model.weights])
    return lambda: step(pixels)


def make_ours(channels: int, policy: str, reduce: tuple[str, int] | None = None) -> measure.Step:
    return ours(channels, policy, reduce)[1]


def ours(channels: int, policy: str, reduce: tuple[str, int] | None) -> tuple[GlobalPixelMask, measure.Step]:
    layer = GlobalPixelMask(channels, reduce=reduce, dtype=policy)
    layer.adapt(images())
    layer.build((None, SIDE, SIDE, PLANES))
    values = [weight.numpy() for weight in pixel_cnn(channels).weights]
    if reduce is not None:
        values[0] = np.einsum("fq,ijfk->ijqk", layer.projection.numpy(), values[0])
    for weight, value in zip(layer.trainable_weights, values, strict=True):
        weight.assign(value)
    return layer, step_of(layer.pixel_mask, [weight.value for weight in layer.trainable_weights])


def product(dtype: str) -> measure.Step:
    """One big matrix product: the pace of the floor."""
    one, other = (tf.cast(tf.random.normal((PRODUCT, PRODUCT)), dtype) for _ in range(2))
    run = tf.function(lambda: tf.linalg.matmul(one, other))
    return lambda: run().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    singles = {dtype: product(dtype) for dtype in ("float32", "bfloat16")}
    for channels in HIDDEN:
        kinds = {
            "tiles": ("float32", None),
            "tiles, bfloat16": ("mixed_bfloat16", None),
            f"tiles, {AXES} principal axes": ("float32", ("pca", AXES)),
        }
        steps, kept = {"whole": make_whole(channels)}, {"whole": 1.0}
        for name, (policy, reduce) in kinds.items():
            layer, steps[name] = ours(channels, policy, reduce)
            kept[name] = layer.variance_kept
        found = measure.times({**steps, **singles}, runs)
        paces = {dtype: PRODUCT**3 / found[dtype].min() for dtype in singles}  # a millisecond
        masks = {name: step()[0] for name, step in steps.items()}
        memory = {"whole": measure.memory(make_whole, channels)}
        for name, (policy, reduce) in kinds.items():
            memory[name] = measure.memory(make_ours, channels, policy, reduce)
        device = {**memory, "whole": memory["whole"] + 4 * SIDE**2 * COUNT * PLANES / 2**20}
        products = 2 * SIDE**2 * 9 * COUNT * PLANES * channels
        floors = {
            "whole": products / paces["float32"],
            "tiles": products / 2 / paces["float32"],
            "tiles, bfloat16": products / 2 / paces["bfloat16"],
            f"tiles, {AXES} principal axes": products / 2 * AXES / (COUNT * PLANES) / paces["float32"],
        }
        rows = [
            [
                name,
                float(np.median(found[name])),
                measure.ratio(found[name], found["whole"]),
                floors[name],
                memory[name],
                device[name],
                device[name] / device["whole"],
                float(np.abs(masks[name] - masks["whole"]).max()),
                float(np.abs(masks[name] - masks["whole"]).mean()),
                kept[name],
            ]
            for name in steps
        ]
        columns = [f"K = {channels}", "ms", "of whole", "floor ms", "step MiB", "device MiB", "of whole"]
        columns += ["mask off by", "on average", "variance"]
        measure.table(f"{COUNT} images {SIDE} x {SIDE} x {PLANES}, {runs} alternating runs", columns, rows)
        ratio = measure.ratio(found["tiles, bfloat16"], found["tiles"])
        print(f"  bfloat16 takes {ratio:.2f} of float32's time")


if __name__ == "__main__":
    main()
