"""Attention sampling beside the same feature network on the whole image, and beside a plain PyTorch version.

Run from the project's folder, in the environment of `make setup-benchmarks`:
`.venv-benchmarks/bin/python benchmarks/attention_sampling.py [--runs 9] [--part time|memory|large]`.

8 images of 1388 x 1040, no repeats, overview by 5, 20 patches of 50, the networks of 1,513 and 7,459
parameters. Inference chooses the most probable cells without overlap. A training step draws with
replacement; its loss is the cross entropy of the weighted scores, plus the REINFORCE surrogate, plus 0.05
of the negative entropy; Adam. PyTorch does the same work, written plainly with its own layers,
channels last; at inference it takes the plain top 20, which is less work. Memory is that above the
state before the first step.
"""

import argparse
from collections.abc import Callable
from typing import Any

import measure  # first: it quietens TensorFlow
import numpy as np

BATCH, HEIGHT, WIDTH = 8, 1040, 1388
STRIDE, PATCHES, SIZE, CLASSES = 5, 20, 50, 3
TEMPERATURE, ENTROPY = 3.0, 0.05
PEAK = 2 * 32 * 3e9  # multiply-adds a second of two cores: two registers of 16 numbers a cycle, 3 GHz


def images(dtype: str, batch: int = BATCH, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), "uint8")
    return pixels if dtype == "uint8" else pixels.astype(dtype)


def labels(batch: int = BATCH) -> np.ndarray:
    return (np.arange(batch) % CLASSES).astype("int32")


def sampling(
    training: bool, dtype: str = "uint8", batch: int = BATCH, height: int = HEIGHT, width: int = WIDTH
) -> measure.Step:
    """Attention sampling in Keras on TensorFlow."""
    import keras
    import tensorflow as tf

    from keras_medattn import ops
    from keras_medattn.layers import AttentionSampler
    from keras_medattn.models import attention_network, feature_network

    attend, features = attention_network(), feature_network(CLASSES)
    sampler = AttentionSampler(PATCHES, SIZE, stride=STRIDE, seed=0)
    pixels, truth = tf.constant(images(dtype, batch, height, width)), tf.constant(labels(batch))
    weights = attend.trainable_weights + features.trainable_weights
    optimizer = keras.optimizers.Adam()
    optimizer.build(weights)

    def forward() -> tuple:
        attention = attend(ops.overview(pixels, STRIDE) / 255, training=training)
        patches, _, log_probs = sampler(attention, pixels, training=training)
        scores = features(tf.reshape(patches / 255, (batch * PATCHES, SIZE, SIZE, 3)), training=training)
        return tf.reshape(scores, (batch, PATCHES, CLASSES)), attention, log_probs

    def fused(scores: Any, log_probs: Any) -> Any:
        return TEMPERATURE * ops.aggregate(scores, tf.exp(log_probs), drawn=training)

    @tf.function
    def infer() -> Any:
        scores, _, log_probs = forward()
        return tf.nn.softmax(fused(scores, log_probs))

    @tf.function
    def train() -> Any:
        with tf.GradientTape() as tape:
            scores, attention, log_probs = forward()
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(truth, fused(scores, log_probs))
            chances = tf.nn.softmax(TEMPERATURE * scores)
            rewards = tf.gather(chances, tf.tile(truth[:, None], (1, PATCHES)), batch_dims=2)
            surrogate = ops.reinforce_surrogate(log_probs, rewards)
            entropy = tf.reduce_mean(ops.negative_entropy(attention))
            loss = tf.reduce_mean(losses) + surrogate + ENTROPY * entropy
        optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
        return loss

    step = train if training else infer
    return lambda: step().numpy()


def whole(training: bool) -> measure.Step:
    """The same feature network on the whole images, in Keras on TensorFlow."""
    import keras
    import tensorflow as tf

    from keras_medattn.models import feature_network

    features = feature_network(CLASSES)
    pixels, truth = tf.constant(images("float32") / 255), tf.constant(labels())
    weights = features.trainable_weights
    optimizer = keras.optimizers.Adam()
    optimizer.build(weights)

    @tf.function
    def infer() -> Any:
        return tf.nn.softmax(TEMPERATURE * features(pixels))

    @tf.function
    def train() -> Any:
        with tf.GradientTape() as tape:
            scores = TEMPERATURE * features(pixels, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(truth, scores))
        optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
        return loss

    step = train if training else infer
    return lambda: step().numpy()


def pytorch(training: bool, dtype: str = "uint8") -> measure.Step:
    """Attention sampling in plain PyTorch, channels last. Its layers take no bytes: a step converts them."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2)]

    width = (3, 8, 8, 8)
    attend = nn.Sequential(
        *[
            layer
            for i in range(3)
            for layer in (*convolution(*width[i : i + 2]), nn.BatchNorm2d(8, eps=1e-3, momentum=0.01))
        ],
        nn.Conv2d(8, 1, 3, padding=1),
    )
    width = (3, 16, 16, 16, 16)
    features = nn.Sequential(
        *[layer for i in range(4) for layer in convolution(*width[i : i + 2])],
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    for network in (attend, features):
        network.to(memory_format=torch.channels_last).train(training)
    weights = [*attend.parameters(), *features.parameters()]
    assert [sum(w.numel() for w in network.parameters()) for network in (attend, features)] == [1513, 7459]
    optimizer = torch.optim.Adam(weights)
    given = torch.from_numpy(images(dtype)).permute(0, 3, 1, 2)  # channels last
    if dtype != "uint8":
        given /= 255
    truth = torch.from_numpy(labels()).long()

    def forward() -> tuple:
        pixels = given.float() / 255 if dtype == "uint8" else given
        logits = attend(functional.avg_pool2d(pixels, STRIDE))
        columns = logits.shape[3]
        log_attention = functional.log_softmax(logits.flatten(1), 1)
        if training:
            cells = torch.multinomial(log_attention.detach().exp(), PATCHES, replacement=True)
        else:
            cells = log_attention.topk(PATCHES).indices
        log_probs = log_attention.gather(1, cells)

        def places(index: Any, length: int) -> Any:
            start = index * STRIDE + (STRIDE - SIZE) // 2
            inside = (start[..., None] + torch.arange(SIZE)).abs()
            return torch.minimum(inside, 2 * (length - 1) - inside)

        down, across = places(cells // columns, HEIGHT), places(cells % columns, WIDTH)
        which = torch.arange(BATCH)[:, None, None, None]
        patches = pixels.permute(0, 2, 3, 1)[which, down[..., :, None], across[..., None, :]]
        patches = patches.flatten(0, 1).permute(0, 3, 1, 2)  # (B P, C, s, s), channels last
        scores = functional.normalize(features(patches)).view(BATCH, PATCHES, CLASSES)
        return scores, log_attention, log_probs

    def fused(scores: Any, log_probs: Any) -> Any:
        shares = log_probs.detach().softmax(1)
        return TEMPERATURE * (shares[..., None] * scores).sum(1)

    def infer() -> Any:
        with torch.inference_mode():
            scores, _, log_probs = forward()
            return fused(scores, log_probs).softmax(1).numpy()

    def train() -> Any:
        optimizer.zero_grad()
        scores, log_attention, log_probs = forward()
        loss = functional.cross_entropy(fused(scores, log_probs), truth)
        rewards = (TEMPERATURE * scores.detach()).softmax(2)
        rewards = rewards.gather(2, truth[:, None, None].expand(-1, PATCHES, 1))[..., 0]
        loss = loss - ((rewards - rewards.mean()) * log_probs).mean()
        loss = loss + ENTROPY * (log_attention.exp() * log_attention).sum(1).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return train if training else infer


def floor(training: bool, whole_image: bool) -> float:
    """Milliseconds that the multiply-adds take at the processor's best."""
    of_feature = 9 * (3 * 16 + 3 * 16 * 16)
    if whole_image:
        count = BATCH * HEIGHT * WIDTH * of_feature
    else:
        cells = BATCH * (HEIGHT // STRIDE) * (WIDTH // STRIDE)
        count = BATCH * PATCHES * SIZE**2 * of_feature + cells * 9 * (3 * 8 + 2 * 64 + 8)
    return 1e3 * (3 if training else 1) * count / PEAK


def timings(runs: int) -> None:
    for training in (False, True):
        steps: dict[str, Callable] = {
            "sampling, uint8": sampling(training),
            "sampling, float32": sampling(training, "float32"),
            "PyTorch, uint8": pytorch(training),
            "PyTorch, float32": pytorch(training, "float32"),
            "whole image": whole(training),
        }
        own, *others = (found := measure.times(steps, runs)).values()
        rows = [["sampling, uint8", float(np.median(own)), 1.0, floor(training, False)]]
        for name, other in zip([*steps][1:], others, strict=True):
            rows.append(
                [name, float(np.median(other)), measure.ratio(own, other), floor(training, "whole" in name)]
            )
        title = "training step" if training else "inference"
        measure.table(f"{title}, {runs} turns", ["", "median ms", "sampling / it", "floor ms"], rows)
        del steps, found


def memories() -> None:
    for training in (False, True):
        own, other, peer = (measure.memory(make, training) for make in (sampling, whole, pytorch))
        rows = [
            ["sampling, uint8", own, 1.0],
            ["whole image", other, own / other],
            ["PyTorch, uint8", peer, own / peer],
        ]
        title = "training step" if training else "inference"
        measure.table(f"memory of a first {title}", ["", "MiB", "sampling / it"], rows)


def large() -> None:
    """One image of 64 megapixels."""
    side = 8000
    as_float = side * side * 3 * 4 / 2**20
    rows = []
    for training in (False, True):
        used = measure.memory(sampling, training, "uint8", 1, side, side)
        rows.append(["training step" if training else "inference", used, used / as_float])
    measure.table(f"memory, one image of {side} x {side}", ["", "MiB", "of the image as float32"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--part", choices=["time", "memory", "large"])
    arguments = parser.parse_args()
    if arguments.part in (None, "time"):
        timings(arguments.runs)
    if arguments.part in (None, "memory"):
        memories()
    if arguments.part in (None, "large"):
        large()


if __name__ == "__main__":
    main()
