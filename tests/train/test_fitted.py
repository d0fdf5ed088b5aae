"""What is frozen of each system, what may not be, and how a run that begins late or in phases is kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.models import MIMS, AttentionSampling, AttnVGG, GatedFusion, backbones
from keras_medattn.train import trainer
from keras_medattn.train.checkpoint import Keeper
from keras_medattn.train.fitted import backbones_of, freeze
from keras_medattn.train.recipe import Data, Recipe, RecipeError, Train

SMALL = {"backbone": "mobilenet_v3_small", "weights": None}


def moving(model):
    return {id(variable) for variable in model.trainable_variables}


@pytest.mark.parametrize("stride", [8, 32])
def test_both_backbones_of_a_fusion_are_frozen(stride):
    model = GatedFusion(2, instance_backbone="mobilenet_v3_small", overview_size=64, crop_size=64, **SMALL)
    model.build((None, 64, 64, 3))
    head = moving(model) - {id(v) for one in model.backbones for v in one.trainable_variables}
    freeze(model, stride)
    for backbone in model.backbones:
        stem = backbone if stride == 32 else backbones.split(backbone, stride)[0]
        assert stem.trainable_variables == []
        assert bool(backbone.trainable_variables) == (stride == 8)
        norms = [one for one in backbone.layers if isinstance(one, keras.layers.BatchNormalization)]
        assert not any(one.trainable for one in norms)
    assert head <= moving(model)


def test_frozen_feature_network_of_a_sampling_model():
    model = AttentionSampling(2, 3, 40, 8, features="mobilenet_v3_small", weights=None, feature_stride=16)
    model.build((None, 64, 64, 3))
    assert [one.name for one in backbones_of(model)] == ["mobilenet_v3_small"]
    before = moving(model)
    freeze(model, 16)
    assert not any(one.trainable_variables for one in backbones_of(model))
    assert moving(model) == before - {id(v) for one in backbones_of(model) for v in one.variables}
    assert len(moving(model)) > 2  # the attention network and the dense layer
    with pytest.raises(RecipeError, match=r"must be 0: AttentionSampling has no backbone\. Received: 8"):
        freeze(AttentionSampling(2), 8)


def test_second_backbone_counts_its_stride_from_the_first():
    arguments = {"kernels": ((1, 2),), "scales": (1.0,), "stride": 16, "second_stride": 32}
    for stride, frozen in ((8, (False, False)), (16, (True, False)), (32, (True, True))):
        model = MIMS(2, "mobilenet_v3_small", weights=None, **arguments)
        freeze(model, stride)
        assert tuple(not one.trainable_variables for one in model.backbones) == frozen


def test_module_that_begins_untrained_is_not_frozen():
    model = AttnVGG(
        2, ("none", "none", "none", "spatial", "spatial"), "mobilenet_v3_small", weights=None, units=0
    )
    freeze(model, 16)
    modules = [layer for layer in model.backbone.layers if layer.name in ("attention_4", "attention_5")]
    assert all(layer.trainable_variables for layer in modules)
    with pytest.raises(RecipeError, match=r"must be less: attention_4 of AttnVGG .* Received: 32"):
        freeze(model, 32)


def recipe(model, **train):
    return Recipe(Data(image_size=(64, 64)), model, Train(**train))


@pytest.mark.parametrize(
    ("model", "train", "words"),
    [
        (
            {"system": "GatedFusion", "instance_backbone": "mobilenet_v3_small"} | SMALL,
            {"epochs": 20},
            "train.epochs must be above 20: .* answer of this GatedFusion does not learn. Received: 20",
        ),
        (
            {"system": "GatedFusion", "instance_backbone": "mobilenet_v3_small", "schedule": []} | SMALL,
            {"frozen_stride": 32, "cached_views": 1},
            "cached_views must be 0: GatedFusion reads the image itself.*frozen_stride works",
        ),
        (
            {"system": "MIMS", "pyramid": True} | SMALL,
            {"frozen_stride": 8, "cached_views": 1},
            "cached_views must be 0: MIMS reads the image itself",
        ),
        (
            {"system": "GlobalMask"} | SMALL,
            {"frozen_stride": 8, "cached_views": 1},
            "cached_views of GlobalMask must be 0; or 1, where .* the whole backbone. .* frozen_stride=8",
        ),
        (
            {"system": "GlobalMask"} | SMALL,
            {"frozen_stride": 32, "cached_views": 2},
            "cached_views of GlobalMask must be 0; or 1, .* Received: 2",
        ),
    ],
)
def test_what_a_system_cannot_do_is_refused_before_it_is_trained(model, train, words):
    with pytest.raises(RecipeError, match=words):
        trainer.build(recipe(model, **train), 2)


def test_best_epoch_and_patience_count_from_the_first_trained_answer(tmp_path):
    keeper = Keeper(None, tmp_path, Train(patience=2), steps=1, ready=3)
    figures = [0.9, 0.8, 0.9, 0.5, 0.7, 0.6, 0.65]
    best, done = [], []
    for epoch, auroc in enumerate(figures):
        keeper.history.append({"epoch": epoch + 1, "val_loss": 1.0, "val_auroc": auroc})
        best.append(keeper.best_epoch)
        done.append(keeper.done)
    assert best == [0, 1, 2, 3, 4, 4, 4]
    assert done == [False] * 6 + [True]


IMAGES = np.random.default_rng(0).integers(0, 255, (9, 32, 40, 3)).astype("uint8")
SIDES = ("train",) * 5 + ("val",) * 3 + ("test",)


def small():
    image = keras.Input((None, None, 3))
    pooled = keras.layers.Rescaling(1 / 64)(keras.layers.AveragePooling2D(16)(image))
    return keras.Model(image, keras.layers.Conv2D(6, 1, activation="relu")(pooled))


def test_run_in_two_phases_goes_on_exactly(tmp_path):
    """Stopped within the first epoch, while the mask learns, and after it: as a run that was not stopped."""
    keras.utils.set_random_seed(3)
    model = {"system": "GlobalMask", "backbone": small(), "channels": 4, "joint_epochs": 2}
    train = Train(
        4, 3, optimizer="sgd", learning_rate=0.02, monitor="epoch", frozen_stride=32, cached_views=1
    )
    settings = Recipe(Data(image_size=(32, 40)), model, train)
    table = Manifest(tmp_path, tuple("abcdefghi"), np.arange(9) % 3, ("a", "b", "c"), splits=SIDES)

    second = pipeline.rows_of_step(1, 5, 3, train.seed)[1]  # of two steps of the first epoch

    def fit(name, stop="", lost=()):
        def write(line):
            if stop and stop in line:
                raise KeyboardInterrupt

        folder = tmp_path / name
        folder.mkdir(exist_ok=True)

        def read(rows, epoch):
            if np.array_equal(rows, lost):
                raise OSError("lost")
            return IMAGES[rows]

        trainer.fit(settings, table, read, folder, folder, lambda items, *_: items, write, save_every=1)
        return folder / "checkpoint" / "state.npz"

    with pytest.raises(tf.errors.OpError, match="lost"):
        fit("stopped", lost=second)
    with np.load(tmp_path / "stopped" / "checkpoint" / "state.npz") as state:
        assert int(state["step"]) == 1
    for stop in ("1/4", "3/4"):
        with pytest.raises(KeyboardInterrupt):
            fit("stopped", stop)
    with np.load(fit("stopped")) as stopped, np.load(fit("whole")) as whole:
        assert int(whole["epochs"]) == 4
        for name in whole.files:
            np.testing.assert_array_equal(stopped[name], whole[name], err_msg=name)
