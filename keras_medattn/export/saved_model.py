"""Write, verify and publish a SavedModel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from keras_medattn.data.manifest import Manifest
from keras_medattn.export import known_answers, verify
from keras_medattn.export.precision import float32
from keras_medattn.export.signatures import Exported
from keras_medattn.export.volumes import ExportedVolumes
from keras_medattn.files import write_json

TOLERANCE = 1e-4


class ExportError(ValueError):
    """An export that cannot be published; the message says why."""


def export(
    model,
    recipe,
    class_names: Sequence[str],
    to: Path | str,
    samples: Manifest,
    temperature: float = 1.0,
    threshold: float | None = None,
) -> tuple[Path, dict[str, float]]:
    """Write the next version of a SavedModel, compare it with the Keras model, and publish it.

    It is written aside and renamed, so that a server never sees half of it.

    Args:
        model: a trained model.
        recipe: of its run, for image size and intensity window.
        class_names: in the order of the scores.
        to: the model's folder; the version is one above the highest in it.
        samples: images on which the two are compared, from file to answer.
        temperature: of `medattn calibrate`, inside the model from now on.
        threshold: of two classes, the probability from which the second is the label; None: the likelier.

    Returns:
        The version's folder, and the largest difference in probabilities by signature.

    Raises:
        ExportError: the name is no model name, or the two differ by more than 1e-4; nothing is published.
    """
    to = Path(to)
    if to.name.startswith(".") or to.name.isdigit():
        raise ExportError(
            f"a model's folder needs a name that is no number and begins without a dot. Received: {to}"
        )
    to.mkdir(parents=True, exist_ok=True)
    versions = [int(path.name) for path in to.iterdir() if path.name.isdigit()]
    version = to / str(max(versions, default=0) + 1)
    aside = to / f".writing-{version.name}-{os.getpid()}"
    window = recipe.data.window or None
    model = model.snapshot() if hasattr(model, "snapshot") else model  # without what only training needs
    model = float32(model, recipe.data.image_size)
    try:
        kind = ExportedVolumes if recipe.data.slices else Exported
        exported = kind(
            model,
            class_names,
            recipe.data.image_size,
            window,
            recipe.data.max_pixels,
            temperature,
            threshold,
            recipe.data.scaled_decoding,
        )
        tf.saved_model.save(exported, str(aside), signatures=exported.signatures())
        extra = aside / "assets.extra"
        extra.mkdir()
        write_json(about(model, recipe, class_names, temperature, threshold), extra / "medattn.json")
        _write_warmup(extra / "tf_serving_warmup_requests", recipe.data.image_size, bool(recipe.data.slices))
        known_answers.write(
            aside,
            lambda path: verify.probabilities(path, model, recipe, temperature),
            bool(recipe.data.slices),
            TOLERANCE,
        )
        differences = verify.differences(aside, model, recipe, samples, temperature)
        worst = max(differences.values())
        if not worst <= TOLERANCE:
            raise ExportError(
                f"the exported model differs from the Keras model by {worst:.2e} in a probability, more than "
                f"{TOLERANCE:.0e}; it was not published. By signature: {differences}"
            )
        os.replace(aside, version)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return version, differences


def about(model, recipe, class_names: Sequence[str], temperature: float, threshold: float | None) -> dict:
    """What a client has to know of an exported model, whatever its format."""
    return {
        "system": type(model).__name__,
        "class_names": list(class_names),
        "image_size": list(recipe.data.image_size),
        "resize": "bilinear, antialiased, aspect ratio not kept, rounded to uint8",
        "window": list(recipe.data.window) or None,
        "max_pixels": recipe.data.max_pixels,
        "scaled_decoding": recipe.data.scaled_decoding,
        "central": recipe.data.central if recipe.data.slices else None,
        "temperature": temperature,
        "threshold": threshold,
    }


def _write_warmup(path: Path, image_size: tuple[int, int], volumes: bool) -> None:
    """Requests that a server replays at loading; a grey picture, so that no patient's image is in them."""
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    grey = tf.fill((*image_size, 3), tf.constant(128, tf.uint8))
    inputs = {"image_bytes": tf.make_tensor_proto([tf.io.encode_jpeg(grey).numpy()], tf.string)}
    if volumes:
        inputs = {"image": tf.make_tensor_proto(grey[None, None]), "mask": tf.make_tensor_proto([[True]])}
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature in ("tensor" if volumes else "serving_default", "explain"):
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = signature
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(value)
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request)
            writer.write(log.SerializeToString())
