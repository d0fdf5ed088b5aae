"""One machine, two replicas: every system trains as on one device, in float64 and in float32."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_medattn import models
from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.train import recipe, trainer

SIZE, IMAGES = (40, 48), 31

SMALL = {"backbone": "small_cnn", "weights": None}
READING = {"patches": 3, "patch_size": 12, "stride": 4, "seed": 5}
SAMPLING = READING | {"system": "AttentionSampling"}
SYSTEMS = {
    "MIMS": SMALL | {"system": "MIMS", "stride": 8, "kernels": [[1, 3], [2, 4]], "scales": [1.0], "k": 3},
    "GlobalMask": SMALL | {"system": "GlobalMask", "stride": 8, "joint_epochs": 1, "channels": 2},
    "GatedFusion": SMALL
    | {"system": "GatedFusion", "instance_backbone": "small_cnn", "stride": 8, "overview_size": 32}
    | {"k": 2, "crop_size": 16, "filters": 4, "schedule": [0.5, 1, 0.0]},
    "AttentionSampling": SAMPLING | {"repeats": 2},
    "conditional draws": SAMPLING | {"repeats": 2, "conditional": True},
    "baseline of the batch": SAMPLING | {"repeats": 1, "baseline": "z_score", "replacement": False},
    "PatchClassifier": {"system": "PatchClassifier", "classifier": "small_cnn", "weights": None}
    | {"feature_stride": 8, "seed": 5},
    "AttnVGG": SMALL
    | {"system": "AttnVGG", "layer": "conv4", "units": 0, "dropout": 0.0}
    | {"attention": ["channel", "channel", "spatial", "none", "none"]},
}
QUICK = {"float64": ("MIMS", "baseline of the batch"), "float32": ("GlobalMask",)}


def cases(precision):
    """The systems, of which `make test` trains some."""
    slow = set(SYSTEMS) - set(QUICK[precision])
    return [pytest.param(one, marks=pytest.mark.slow if one in slow else ()) for one in SYSTEMS]


@pytest.fixture
def float64():
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def saved_attention(folder):
    """The file of a model to take the attention from, the same one whenever it is asked for."""
    path = folder / "attention.keras"
    if not path.is_file():
        model = models.AttentionSampling(2, **READING)
        model.build((None, *SIZE, 3))
        model.save(path)
    return str(path)


def trained(folder, system, strategy, precision, **train):
    """The weights, optimiser and history after training on pictures with a spot in every second one."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (IMAGES + 4, *SIZE, 3), dtype=np.uint8)
    pixels[1::2, 10:18, 20:28] = 250
    sides = ("train",) * IMAGES + ("val",) * 4
    names = tuple(f"{number}.png" for number in range(IMAGES + 4))
    manifest = Manifest(folder, names, np.arange(IMAGES + 4) % 2, ("none", "spot"), None, sides)
    model = SYSTEMS[system]
    if system == "PatchClassifier":
        model = model | {"attention_from": saved_attention(folder.parent)}
    train = {"monitor": "epoch", "epochs": 2, "learning_rate": 1e-2} | train
    settings = recipe.from_dict({"data": {"image_size": list(SIZE)}, "model": model, "train": train})
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision=precision))
    folder.mkdir()
    images = pipeline.held(pixels)
    trainer.fit(
        settings, manifest, images, folder, folder, lambda x, *_: x, lambda line: None, strategy=strategy
    )
    with np.load(folder / "checkpoint" / "state.npz") as state:
        return dict(state)


def compare(folder, system, mirrored, precision, tolerance, **train):
    one, two = (
        trained(folder / name, system, strategy, precision, **train)
        for name, strategy in (("one", None), ("two", mirrored))
    )
    assert mirrored.num_replicas_in_sync == 2
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("system", cases("float64"))
def test_two_replicas_train_as_one(tmp_path, mirrored, float64, system):
    """22 steps in float64: weights, batch statistics, optimiser and draws.

    Batches of three and two: the replicas get two and one, or one and one.
    """
    compare(tmp_path, system, mirrored, "float64", 1e-8, batch_size=3)


@pytest.mark.parametrize("system", cases("float32"))
def test_two_replicas_train_as_one_in_float32(tmp_path, mirrored, system):
    """6 steps, of batches of 11 and 10, by plain SGD: Adam makes steps of what is rounding alone."""
    plain = {"optimizer": "sgd", "momentum": 0.0}
    compare(tmp_path, system, mirrored, "float32", 1e-5, batch_size=11, **plain)
