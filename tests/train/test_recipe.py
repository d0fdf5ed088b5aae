"""Recipes: what is refused, with which words, and what overrides do."""

import pytest

from keras_medattn.train import recipe
from keras_medattn.train.recipe import RecipeError


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_settings_are_typed_and_overridden(tmp_path):
    path = write(
        tmp_path,
        "[data]\nimage_size = [64, 48]\n[model]\nk = 3\nkernels = [[2, 8]]\n[train]\nlearning_rate = 1\n"
        '[[augment]]\nlayer = "RandomFlip"\nmode = "horizontal"\n',
    )
    settings = recipe.load(
        path,
        [
            "train.epochs=7",
            "train.monitor=val_loss",
            "model.k=4",
            "model.weights=null",
            "data.classes=['a','b']",
        ],
    )
    assert settings.data.image_size == (64, 48)
    assert settings.data.classes == ("a", "b")
    assert settings.train.learning_rate == 1.0
    assert isinstance(settings.train.learning_rate, float)
    assert (settings.train.epochs, settings.train.monitor) == (7, "val_loss")
    assert settings.model == {"system": "MIMS", "k": 4, "kernels": [[2, 8]], "weights": None}
    assert settings.augment == ({"layer": "RandomFlip", "mode": "horizontal"},)
    assert recipe.from_dict(settings.to_dict()) == recipe.from_dict(
        recipe.from_dict(settings.to_dict()).to_dict()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nepoch = 3\n", r"train\.epoch is no setting\. Did you mean train\.epochs\?"),
        ("[trian]\n", r"trian is no setting\. Did you mean train\?"),
        ("[model]\nkernel = 3\n", r"model\.kernel is no setting\. Did you mean model\.kernels\?"),
        ('[model]\nsystem = "MIM"\n', r"no known system\. Did you mean 'MIMS'\? Received: 'MIM'"),
        ("[train]\nepochs = 3.5\n", r"train\.epochs must be int\. Received: 3\.5"),
        ("[train]\nepochs = true\n", r"train\.epochs must be int\. Received: True"),
        ("[train]\nepochs = 0\n", r"train\.epochs must be 1 or more\. Received: 0"),
        ("[data]\nimage_size = [64]\n", r"data\.image_size must be tuple\[int, int\]\. Received: \[64\]"),
        ("[data]\nwindow = [5, 5]\n", r"data\.window must be low < high"),
        ("[train]\ncached_views = 1\n", r"train\.cached_views must be 0 where train\.frozen_stride is 0"),
        (
            "[train]\ncached_views = 2\nfrozen_stride = 8\n",
            r"train\.cached_views must be 1 where .* no \[\[augment",
        ),
        (
            "[train]\ncached_views = 1\nfrozen_stride = 8\n[data]\nslices = [1, 2]\n",
            r"train\.cached_views must be 0 where data\.slices is set",
        ),
        ("[data]\nslices = [3, 2]\n", r"data\.slices must be \[fewest, most\].* Received: \(3, 2\)"),
        ("[data]\ncentral = 5\n", r"data\.central must be 0 where data\.slices is empty"),
        ('[data]\nset = "idrid"\n', r"data\.set must be one of breakhis, .* Received: 'idrid'"),
        ('[data]\nset = "bach"\nclasses = ["a"]\n', r"data\.classes must be empty where data\.set"),
        ('[train]\noptimizer = "rmsprop"\n', r"train\.optimizer must be adamw, adam or sgd\. Received"),
        ('[train]\nschedule = "linear"\n', r"train\.schedule must be cosine, constant or step"),
        ("[train]\nstep_epochs = 0\n", r"train\.step_epochs must be 1 or more\. Received: 0"),
        ("[train]\nstep_factor = 2\n", r"train\.step_factor must be in \(0, 1\]\. Received: 2\.0"),
        ("[train]\nmomentum = 1\n", r"train\.momentum must be in \[0, 1\)\. Received: 1\.0"),
        ("[train]\nbalance = true\n", r"train\.class_weights must be false where train\.balance is true"),
        ("[train]\nl2 = -1\n", r"train\.l2 must be 0 or more\. Received: -1\.0"),
        ('[train]\nmonitor = "accuracy"\n', r"train\.monitor must be val_auroc, val_loss or epoch"),
        ('[[augment]]\nlayer = "Dense"\n', r"layer must name an image augmentation .* Received: 'Dense'"),
        ('[[augment]]\nlayer = "RandomFlip"\nmod = 1\n', r"RandomFlip refuses \{'mod': 1\}"),
        ("data = 3\n", r"\[data\] must be a table\. Received: 3"),
        ("[train\n", r"not TOML"),
    ],
)
def test_faults_name_the_file_and_the_key(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=words) as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read"):
        recipe.load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match=r"section\.key=value\. Received: 'epochs=3'"):
        recipe.load(write(tmp_path, ""), ["epochs=3"])
