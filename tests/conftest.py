"""What every test shares: two logical CPUs, one strategy for the whole run, fixed seeds."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _two_cpus() -> None:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    _two_cpus()  # before TensorFlow starts, or it is too late


@pytest.fixture(scope="session")
def mirrored():
    """The one MirroredStrategy of the run: a second one breaks TensorFlow's collectives."""
    from keras_medattn.train import strategy

    return strategy.get("mirrored")


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _applies(request):
    """Skips a conformance check that does not apply to its row, with the row's reason."""
    call = getattr(request.node, "callspec", None)
    row = call.params.get("row") if call else None
    for key, reason in getattr(row, "skipped", {}).items():
        name, _, part = key.partition("[")
        if request.node.originalname == name and part.rstrip("]") in call.id:
            pytest.skip(reason)


TINY = {
    "data": {"image_size": [64, 80]},
    "model": {
        "backbone": "mobilenet_v3_small",
        "weights": None,
        "stride": 8,
        "kernels": [[1, 3], [2, 4]],
        "scales": [0.5, 1.0],
        "k": 3,
        "dropout": 0.2,
    },
    "train": {"epochs": 3, "batch_size": 6, "learning_rate": 0.01},
    "augment": [{"layer": "RandomFlip"}, {"layer": "RandomBrightness", "factor": 0.1}],
}


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """A CSV of 30 pictures of 60 x 70 pixels, a white spot in every second one; two a patient."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    rows = ["path,label,patient,split"]
    for number in range(30):
        pixels = rng.integers(60, 120, (60, 70, 3), dtype=np.uint8)
        if number % 2:
            row, column = rng.integers(5, 50, 2)
            pixels[row : row + 5, column : column + 5] = 255
        name = f"{number:02d}.{'png' if number % 3 else 'jpg'}"
        Image.fromarray(pixels).save(folder / name, quality=95)
        side = "train" if number < 16 else "val" if number < 22 else "test"
        rows.append(f"{name},{'spot' if number % 2 else 'none'},p{number // 2},{side}")
    (folder / "set.csv").write_text("\n".join(rows) + "\n")
    return folder / "set.csv"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_set):
    """The one part of a small finished run."""
    from keras_medattn.train import experiment, recipe

    out = tmp_path_factory.mktemp("runs") / "tiny"
    settings = recipe.from_dict(TINY | {"train": TINY["train"] | {"frozen_stride": 8, "cached_views": 2}})
    [part] = experiment.train(settings, tiny_set, out, write=lambda line: None)
    return part


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory, tiny_run):
    """The folder of the version of the small run's SavedModel, and its differences to Keras."""
    from keras_medattn.export import saved_model

    folder = tmp_path_factory.mktemp("saved_models") / "tiny"
    (folder / "3").mkdir(parents=True)
    samples = tiny_run.manifest.split("test")
    return saved_model.export(
        tiny_run.model(), tiny_run.recipe, tiny_run.manifest.class_names, folder, samples
    )
