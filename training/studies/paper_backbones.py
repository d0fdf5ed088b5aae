"""Builds each paper's system on the backbone that the paper used, and trains it for two steps.

    python training/studies/paper_backbones.py [WORD ...]

Prints a table: parameters, and seconds an image of the second step (batch of two, random weights and pixels,
this machine). With words only the rows whose names hold one of them. It says what is built as the papers have
it, not what it would score: ImageNet weights of most of these networks are not inside any package.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import keras
import numpy as np

from keras_medattn import models

BATCH = 2
MODULES = ("gated", "non_local", "channel", "dual", "squeeze_excite", "global_context")
PLACES = {
    "none": ("none",) * 5,
    "C": ("channel", "channel", "none", "none", "none"),
    "S": ("none", "none", "spatial", "spatial", "spatial"),
    "both": ("channel", "channel", "spatial", "spatial", "spatial"),
}
Row = tuple[str, Callable[[], keras.Model], tuple[int, int]]


def masked(backbone: str) -> keras.Model:
    """A mask of all training images, here 16: the joint phase."""
    model = models.system("GlobalMask")(3, backbone=backbone, weights=None)
    model.adapt([np.random.default_rng(1).integers(0, 256, (16, 224, 224, 3), np.uint8)])
    return model


def rows() -> list[Row]:
    """Name, how to build it, and the size of its images."""
    found: list[Row] = [
        (
            f"GatedFusion {module}, ResNet-18 + ResNet-50",
            lambda one=module: models.GatedFusion(4, one, weights=None),
            (1536, 2048),
        )
        for module in MODULES
    ]
    for name, attention in PLACES.items():
        for norm in (False, True):
            found.append(
                (
                    f"AttnVGG {name}, VGG19{' with batch norm' * norm}",
                    lambda places=attention, norm=norm: models.AttnVGG(
                        2, places, weights=None, batch_norm=norm
                    ),
                    (224, 224),
                )
            )
    tissue = {"kernels": ((1, 20), (2, 40)), "stride": 32, "weights": None}
    found.append(("MIMS, ResNet-101", lambda: models.MIMS(2, "resnet101", **tissue), (224, 224)))
    found.append(("MIMS, ResNet-34", lambda: models.MIMS(2, "resnet34", **tissue), (224, 224)))
    found += [
        (f"GlobalMask, {name}", lambda one=name: masked(one), (224, 224))
        for name in ("googlenet", "vgg16", "resnet152", "densenet161")
    ]
    found.append(
        ("AttentionSampling, the paper's networks", lambda: models.AttentionSampling(3), (1040, 1388))
    )
    return found


def trained(model: keras.Model, size: tuple[int, int]) -> float:
    """Two steps; the seconds an image of the second one."""
    if isinstance(model, models.GatedFusion):
        model.balance.assign(0.5)  # both losses count, as in most of its epochs
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, *size, 3), np.uint8)
    labels = np.eye(model.num_classes, dtype="float32")[np.arange(BATCH) % model.num_classes]
    model.compile(
        keras.optimizers.SGD(1e-4),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # pyright: ignore[reportArgumentType]
    )
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        loss = float(model.train_on_batch(images, labels))  # pyright: ignore[reportArgumentType]
        seconds = (time.perf_counter() - began) / BATCH
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
    return seconds


def main(words: list[str]) -> None:
    """Print the table, a row as soon as it is known."""
    print("| system and backbone | image | parameters | seconds an image |\n|---|---|---|---|", flush=True)
    for name, build, size in rows():
        if words and not any(word.lower() in name.lower() for word in words):
            continue
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        try:
            model = build()
            model.build((None, *size, 3))
            figures = f"{model.count_params():,} | {trained(model, size):.2f}"
        except Exception as error:  # the other rows are worth having
            figures = f"skipped | {type(error).__name__}: {error}".splitlines()[0]
        print(f"| {name} | {size[0]} x {size[1]} | {figures} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
