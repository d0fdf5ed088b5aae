"""The parity matrix: a small model of every system in every format, from file to answer.

`python -m keras_medattn.export.parity` prints it as the table of `docs/export.md`, row by row, in minutes;
names of rows print those alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_medattn import models
from keras_medattn.data import readers
from keras_medattn.data.headers import MAX_PIXELS
from keras_medattn.data.manifest import Manifest
from keras_medattn.export import formats, saved_model
from keras_medattn.export.precision import float32
from keras_medattn.models.cnns import small_cnn

SIZE = (64, 80)
COLUMNS = (
    *("serving_default", "tensor", "explain"),
    *("litert", "litert_batch1", "litert_float16", "litert_int8", "onnx"),
)
_SAMPLING: dict[str, Any] = {"patches": 3, "patch_size": 12, "stride": 5, "temperature": 0.3}


def _mims() -> keras.Model:
    return models.MIMS(3, small_cnn(), 8, kernels=((1, 3), (2, 4)), k=3)


def _global_mask() -> keras.Model:
    return models.GlobalMask(3, small_cnn(), mask="pixels")


def _mixed(made: Callable[[], Any]) -> keras.Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return made()
    finally:
        keras.config.set_dtype_policy(before)


def _patch_classifier() -> keras.Model:
    layers = [small_cnn(), keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(3)]
    found = models.AttentionSampling(3, **_SAMPLING)
    return models.with_classifier(found, keras.Sequential(layers))


ROWS: dict[str, Callable[[], Any]] = {
    "AttentionSampling": lambda: models.AttentionSampling(3, **_SAMPLING),
    "PatchClassifier": _patch_classifier,
    "AttnVGG": lambda: models.AttnVGG(3, backbone="resnet18", weights=None, units=16),
    "GatedFusion": lambda: models.GatedFusion(
        3, "gated", small_cnn(), small_cnn(), None, overview_size=48, crop_size=32, k=2, filters=8
    ),
    "GlobalMask": _global_mask,
    "GlobalMask in mixed_bfloat16": lambda: _mixed(_global_mask),
    "MIMS": _mims,
    "MIMS in mixed_bfloat16": lambda: _mixed(_mims),
    "MIMS of volumes": _mims,
}
# it crops where the attention is above a threshold: what is rounded may choose other crops
ABSENT = {("GatedFusion", "litert_float16"), ("GatedFusion", "litert_int8")}


def row(name: str, folder: Path, columns: Sequence[str] = COLUMNS) -> dict[str, float]:
    """Export one system and compare it with Keras on five files, one by one and in one batch.

    The scores are divided by a temperature of .1, so that the answers of untrained weights differ.

    Args:
        name: of `ROWS`.
        folder: gets the pictures, `files/1` and `1`.
        columns: signatures of the SavedModel, of which one means all of them, and formats.

    Returns:
        The largest difference in a probability by column.
    """
    keras.utils.set_random_seed(0)
    slices = (1, 3) if name.endswith("volumes") else ()
    recipe: Any = SimpleNamespace(data=plain_data(SIZE, slices))
    data = recipe.data
    model = ROWS[name]()
    model.build((None, *SIZE, 3))
    names = ("a", "b", "c")
    table = pictures(folder / "data", bool(slices))
    found = {}
    if wanted := [one for one in columns if one in formats.FILES and (name, one) not in ABSENT]:
        found |= formats.export(model, recipe, names, folder, table, table, wanted, 0.1)[1]
    if not set(columns) <= set(formats.FILES):
        version, signatures = saved_model.export(model, recipe, names, folder, table, 0.1)
        found |= signatures
        if not slices:
            plain = float32(model.snapshot() if hasattr(model, "snapshot") else model, SIZE)
            together = _together(version, formats.deployable(plain, data, 0.1), data, table)
            found |= {key: max(value, together[key]) for key, value in signatures.items()}
    return {column: found[column] for column in columns if column in found}


def plain_data(image_size: tuple[int, int], slices: tuple[int, ...] = ()) -> Any:
    """A recipe's `[data]` of plain images, or of volumes, as far as an export asks for it."""
    return SimpleNamespace(
        image_size=image_size,
        window=(),
        max_pixels=MAX_PIXELS,
        slices=slices,
        central=0,
        scaled_decoding=False,
    )


def table(names: Sequence[str]) -> Iterator[str]:
    """The matrix as lines of Markdown, one after the other as they are measured."""
    yield f"| | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = row(name, Path(folder) / "model")
        cells = [f"{found[column]:.1e}" if column in found else "-" for column in COLUMNS]
        yield f"| {name} | {' | '.join(cells)} |"


def pictures(folder: Path, volumes: bool) -> Manifest:
    """Write five images of noise on a ramp, or volumes of two of them and of three."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(5):
        inside = (
            [f"{number}/{piece}.png" for piece in range(2 + number % 2)] if volumes else [f"{number}.png"]
        )
        for path in inside:
            light = np.linspace(0, 40 * number, 60)[:, None, None]
            pixels = (rng.integers(0, 90, (60, 70, 3)) + light).astype("uint8")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(folder / path, pixels, scale=False)
        names.append(str(number) if volumes else inside[0])
    return Manifest(folder, tuple(names), np.arange(5) % 3, ("a", "b", "c"))


def _together(version: Path, plain: keras.Model, data: Any, table: Manifest) -> dict[str, float]:
    """The signatures' largest differences on all images in one batch."""
    served: Any = tf.saved_model.load(str(version))  # kept in a variable, or its graph is collected
    sized = np.concatenate([each["image"] for each in formats.examples(table, data)])
    expected = plain({"image": sized})["probabilities"]
    encoded = tf.constant([path.read_bytes() for path in table.paths])
    pixels = tf.constant(np.stack([readers.read(path) for path in table.paths]))
    return {
        name: float(
            tf.reduce_max(tf.abs(run(pixels if name == "tensor" else encoded)["probabilities"] - expected))
        )
        for name, run in served.signatures.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows that are named, or all."""
    names = list(sys.argv[1:] if arguments is None else arguments) or list(ROWS)
    for line in table(names):
        print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
