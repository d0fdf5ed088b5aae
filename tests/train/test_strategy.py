"""One machine, two replicas: every system trains as on one device."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.train import recipe, trainer

SIZE, IMAGES = (40, 48), 31  # batches of three and two: the replicas get two and one, or one and one

SMALL = {"backbone": "small_cnn", "weights": None}
SAMPLING = {"system": "AttentionSampling", "patches": 3, "patch_size": 12, "stride": 4, "seed": 5}
SYSTEMS = {
    "MIMS": SMALL | {"system": "MIMS", "stride": 8, "kernels": [[1, 3], [2, 4]], "scales": [1.0], "k": 3},
    "GlobalMask": SMALL | {"system": "GlobalMask", "stride": 8, "joint_epochs": 1, "channels": 2},
    "GatedFusion": SMALL
    | {"system": "GatedFusion", "instance_backbone": "small_cnn", "stride": 8, "overview_size": 32}
    | {"k": 2, "crop_size": 16, "filters": 4, "schedule": [0.5, 1, 0.0]},
    "AttentionSampling": SAMPLING | {"repeats": 2},
    "baseline of the batch": SAMPLING | {"repeats": 1, "baseline": "z_score", "replacement": False},
    "AttnVGG": {"system": "AttnVGG", "backbone": "mobilenet_v3_small", "weights": None}
    | {"units": 0, "dropout": 0.0},
}


SLOW = ("GatedFusion", "AttentionSampling", "AttnVGG")


@pytest.fixture
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def trained(folder, system, strategy, precision, **train):
    """The weights, optimiser and history after training on pictures with a spot in every second one."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (IMAGES + 4, *SIZE, 3), dtype=np.uint8)
    pixels[1::2, 10:18, 20:28] = 250
    sides = ("train",) * IMAGES + ("val",) * 4
    names = tuple(f"{number}.png" for number in range(IMAGES + 4))
    manifest = Manifest(folder, names, np.arange(IMAGES + 4) % 2, ("none", "spot"), None, sides)
    settings = recipe.from_dict(
        {"data": {"image_size": list(SIZE)}, "model": SYSTEMS[system], "train": {"monitor": "epoch"} | train}
    )
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision=precision))
    folder.mkdir()
    images = pipeline.held(pixels)
    trainer.fit(
        settings, manifest, images, folder, folder, lambda x, *_: x, lambda line: None, strategy=strategy
    )
    with np.load(folder / "checkpoint" / "state.npz") as state:
        return dict(state)


@pytest.mark.parametrize(
    "system", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in SYSTEMS]
)
def test_two_replicas_train_as_one(tmp_path, mirrored, float64, system):
    """22 steps in float64: weights, batch statistics, optimiser and draws."""
    train = {"epochs": 2, "batch_size": 3, "learning_rate": 1e-2}
    one, two = (
        trained(tmp_path / name, system, strategy, "float64", **train)
        for name, strategy in (("one", None), ("two", mirrored))
    )
    assert mirrored.num_replicas_in_sync == 2
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-8, atol=1e-8, err_msg=name)
