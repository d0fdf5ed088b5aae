"""Training in 16 bits, of every system, and gradients that are added up over steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax

from keras_medattn import load_model, models
from keras_medattn.data.manifest import Manifest
from keras_medattn.export.precision import float32
from keras_medattn.models.precision import precision
from keras_medattn.train import trainer
from keras_medattn.train.fitted import fitted_part
from keras_medattn.train.optimizers import optimizer
from keras_medattn.train.recipe import Data, Recipe, Train

IMAGES = np.random.default_rng(0).integers(0, 255, (10, 32, 40, 3)).astype("uint8")
LABELS = np.arange(10) % 2
SIDES = ("train",) * 6 + ("val",) * 4
SMALL = {"backbone": "small_cnn", "stride": 8}
SAMPLING = {"patches": 3, "patch_size": 8, "stride": 4, "repeats": 2}
SYSTEMS = {
    "AttentionSampling": SAMPLING,
    "AttnVGG": {
        "attention": ["none", "none", "none", "channel", "spatial"],
        "backbone": "mobilenet_v3_small",
        "weights": None,
        "units": 0,
    },
    "GatedFusion": SMALL
    | {
        "instance_backbone": "small_cnn",
        "overview_size": 32,
        "crop_size": 16,
        "k": 2,
        "filters": 8,
        "schedule": [],
    },
    "GlobalMask": SMALL | {"channels": 4, "joint_epochs": 1},
    "MIMS": SMALL | {"kernels": [[2, 4]], "scales": [0.5, 1.0], "k": 2, "dropout": 0.2},
    "PatchClassifier": {"classifier": "small_cnn", "feature_stride": 8},
}


CASES = [
    pytest.param(policy, name, marks=pytest.mark.slow if "bfloat" in policy or name == "AttnVGG" else ())
    for policy in ("mixed_float16", "mixed_bfloat16")
    for name in sorted(SYSTEMS)
]


@pytest.mark.parametrize(("policy", "name"), CASES)
def test_every_system_trains_in_16_bits(tmp_path, policy, name):
    """Its weights move and stay finite; what is saved answers as what was trained, at float32 nearly so."""
    settings = SYSTEMS[name]
    if name == "PatchClassifier":
        with precision(policy):
            settings = settings | {"attention_from": models.AttentionSampling(2, **SAMPLING)}
    train = Train(1, 1, precision=policy, monitor="epoch", learning_rate=1e-3)
    recipe = Recipe(Data(image_size=(32, 40)), {"system": name} | settings, train)
    table = Manifest(tmp_path, tuple("abcdefghij"), LABELS, ("a", "b"), splits=SIDES)
    trainer.fit(
        recipe,
        table,
        lambda rows, _: IMAGES[rows],
        tmp_path,
        tmp_path,
        lambda items, *_: items,
        lambda _: None,
    )
    reloaded = load_model(tmp_path / "best.keras", compile=False)
    with np.load(tmp_path / "checkpoint" / "state.npz") as state:
        assert all(np.isfinite(state[key]).all() for key in state.files)
    assert reloaded.dtype_policy.name == policy
    assert {weight.dtype for weight in reloaded.trainable_variables} == {"float32"}
    images, labels = IMAGES[6:], LABELS[6:]
    scores = tf.function(lambda x: reloaded(x, training=False))(images).numpy()
    assert scores.dtype == np.float32
    loss = -log_softmax(np.float64(scores), axis=-1)[np.arange(4), labels].mean()
    row = np.genfromtxt(tmp_path / "history.csv", delimiter=",", names=True)
    assert row["val_loss"] == pytest.approx(loss, rel=1e-7)
    assert np.isfinite(row["loss"])
    if name != "GlobalMask":  # a snapshot has other variables than what is trained
        keras.utils.set_random_seed(0)
        fresh = trainer.build(recipe, 2).trainable_variables
        moved = [
            np.any(a.numpy() != b.numpy()) for a, b in zip(fresh, reloaded.trainable_variables, strict=True)
        ]
        assert np.mean(moved) > 0.5
    plain = float32(reloaded, (32, 40))
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    np.testing.assert_allclose(plain(images, training=False), scores, atol=0.05)


def test_accumulated_steps_move_the_weights_as_one_large_batch():
    """In float64, without batch norm: AdamW, its schedule and the backbone's own rate count updates."""
    weights = []
    for accumulate, size in ((1, 6), (3, 2)):
        keras.utils.set_random_seed(1)
        model = models.GlobalMask(2, **SMALL, mask="none", dtype="float64")
        model.build((None, 32, 40, 3))
        train = Train(epochs=2, accumulate=accumulate, learning_rate=0.01, schedule="cosine")
        fitted = fitted_part(model, None, None, (32, 40))
        fitted.compile(
            optimizer(train, model, 6 // size),
            keras.losses.CategoricalCrossentropy(from_logits=True, dtype="float64"),
            jit_compile=False,
        )
        before = fitted.get_weights()
        for first in [*range(0, 6, size)] * 2:
            rows = slice(first, first + size)
            fitted.train_on_batch(IMAGES[rows], tf.one_hot(LABELS[rows], 2, dtype="float64"))
        weights.append(fitted.get_weights())
    for old, one, other in zip(before, *weights, strict=True):
        assert one.dtype == np.float64
        assert np.abs(one - old).max() > 1e-3
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-9)
