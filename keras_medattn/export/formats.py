"""Files for other runtimes: LiteRT and ONNX, beside the versions of the SavedModel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.export import litert, onnx, tensorrt
from keras_medattn.export.precision import float32, int8_kernels
from keras_medattn.export.saved_model import TOLERANCE, ExportError, about
from keras_medattn.files import write_json
from keras_medattn.models import AttentionSampling

FILES = {
    "litert": "model.tflite",
    "litert_batch1": "model_batch1.tflite",
    "litert_float16": "model_float16.tflite",
    "litert_int8": "model_int8.tflite",
    "onnx": "model.onnx",
    "tensorrt": "model.engine",
}
FORMATS = ("saved_model", *FILES)
# of smaller numbers; int8's finds broken files alone: what it costs in AUROC is for held-out images to say
TOLERANCES = {"litert_float16": 0.01, "litert_int8": 0.25}


def export(
    model: Any,
    recipe: Any,
    class_names: Sequence[str],
    to: Path | str,
    samples: Manifest,
    training: Manifest,
    formats: Sequence[str],
    temperature: float = 1.0,
    threshold: float | None = None,
    batches: tuple[int, int, int] = (1, 8, 32),
) -> tuple[Path, dict[str, float]]:
    """Write files for other runtimes, compare each with the Keras model, and publish them together.

    They take the image at the model's size, `image (B, H, W, 3)` uint8, and of volumes `image (B, S, H, W,
    3)` and `mask (B, S)`; they answer `probabilities (B, C)` float32. How an image gets its size, the classes
    and the rest stands in `medattn.json` beside them.

    Args:
        model: a trained model.
        recipe: of its run.
        class_names: in the order of the scores.
        to: the model's folder; the files get `files/N` in it, N one above the highest there.
        samples: images on which each file is compared with the Keras model, one by one and together.
        training: the images from which int8 takes the ranges of the activations.
        formats: of `FILES`.
        temperature: divides the scores before the softmax.
        threshold: of two classes, the probability from which the second is the label, for `medattn.json`.
        batches: of a TensorRT engine, the least, the one to tune for, and the largest.

    Returns:
        The folder, and the largest difference in a probability by format.

    Raises:
        ExportError: a format is unknown, its converter or runtime fails, or it differs by more than its
            tolerance: 1e-4 in float32, .01 in float16, .25 in int8. Nothing is published.
    """
    unknown = [name for name in formats if name not in FILES]
    if unknown:
        raise ExportError(f"`formats` must be of {', '.join(FILES)}. Received: {', '.join(unknown)}")
    if "tensorrt" in formats:  # it is built from the ONNX file
        formats = [*(name for name in formats if name != "tensorrt"), "tensorrt"]
        formats = formats if "onnx" in formats else ["onnx", *formats]
    home = Path(to) / "files"
    home.mkdir(parents=True, exist_ok=True)
    version = home / str(
        max((int(path.name) for path in home.iterdir() if path.name.isdigit()), default=0) + 1
    )
    aside = home / f".writing-{version.name}-{os.getpid()}"
    aside.mkdir()
    model = float32(model.snapshot() if hasattr(model, "snapshot") else model, recipe.data.image_size)
    inputs = list(examples(samples, recipe.data))
    try:
        found = {}
        for name in formats:
            if name == "tensorrt":  # it answers on a GPU alone
                tensorrt.build(aside / FILES["onnx"], aside / FILES[name], batches)
                continue
            with _blamed(name):
                write(model, recipe.data, aside / FILES[name], name, temperature, training)
                plain = deployable(model, recipe.data, temperature)
                found[name] = difference(reader(aside / FILES[name]), plain, inputs, name != "litert_batch1")
            limit = TOLERANCES.get(name, TOLERANCE)
            if not found[name] <= limit:
                raise ExportError(
                    f"{FILES[name]} differs from the Keras model by {found[name]:.2e} in a probability, more "
                    f"than {limit:.0e}; nothing was published"
                )
        facts = about(model, recipe, class_names, temperature, threshold)
        facts["files"] = {name: FILES[name] for name in formats}
        if "onnx" in formats:
            facts["onnx_operators"] = sorted(onnx.operators(aside / FILES["onnx"]))
            facts["not_in_tensorrt"] = sorted(set(facts["onnx_operators"]) - tensorrt.OPERATORS)
        write_json(facts, aside / "medattn.json")
        os.replace(aside, version)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return version, found


def deployable(model: Any, data: Any, temperature: float = 1.0, batch: int | None = None) -> keras.Model:
    """The model from pixels at its size to `probabilities`, with named inputs.

    Args:
        model: at float32.
        data: the recipe's `[data]`.
        temperature: divides the scores.
        batch: None: any.
    """
    size = (*data.image_size, 3)
    shape = (None, *size) if data.slices else size
    inputs = {"image": keras.Input(shape, batch, "uint8", name="image")}
    if data.slices:
        inputs["mask"] = keras.Input((None,), batch, "bool", name="mask")
    scores: Any = model(inputs if data.slices else inputs["image"], training=False)
    return keras.Model(inputs, {"probabilities": keras.ops.softmax(scores / temperature)})


def write(model: Any, data: Any, path: Path, name: str, temperature: float, training: Manifest) -> None:
    """Write one file; see `export`."""
    if name == "litert_int8":
        model = int8_kernels(model, data.image_size)
    plain = deployable(model, data, temperature, 1 if name == "litert_batch1" else None)
    if name == "onnx":
        onnx.write(plain, path)
    else:
        # which cells it reads must not be decided in 256 steps: int8 is of the weights alone
        steps = name == "litert_int8" and not isinstance(model, AttentionSampling)
        litert.write(plain, path, name, examples(training, data) if steps else ())


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Turn what a converter or a runtime raises, each its own kinds, into a line that says what to do."""
    try:
        yield
    except (ExportError, ImportError, OSError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = [line for line in lines if "ops:" in line] or lines[-1:]  # LiteRT lists what it has no form of
        raise ExportError(
            f"{FILES[name]} cannot be made of this model: {'; '.join(told)[:500]}. Nothing was published. "
            f"Leave {name} out of the formats; `medattn --traceback export` shows where it failed"
        ) from error


def reader(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """What answers `probabilities` of inputs by name from a LiteRT or ONNX file."""
    return (onnx if path.suffix == ".onnx" else litert).reader(path)


def difference(answer: Any, plain: keras.Model, inputs: Sequence[dict], together: bool = True) -> float:
    """The largest difference in a probability between a file and the Keras model.

    Args:
        answer: of `reader`.
        plain: of `deployable`.
        inputs: examples of batch 1.
        together: also all of one shape in one batch.
    """
    batches = list(inputs)
    shape = inputs[0]["image"].shape
    same = [each for each in inputs if each["image"].shape == shape]
    if together:
        batches.append({key: np.concatenate([each[key] for each in same]) for key in same[0]})
    found = [np.abs(answer(batch) - np.asarray(plain(batch)["probabilities"])).max() for batch in batches]
    return float(max(found))


def examples(manifest: Manifest, data: Any) -> Iterator[dict[str, np.ndarray]]:
    """What a deployed model takes of each file: batches of 1 at the model's size."""
    window = data.window or None
    for path in manifest.paths:
        if data.slices:
            stack = pipeline.read_sized_volume(path, data.image_size, window, data.max_pixels, data.central)
            yield pipeline.padded([stack])
        else:
            read = data.image_size, window, data.max_pixels, data.scaled_decoding
            yield {"image": pipeline.read_sized(path, *read)[None]}
