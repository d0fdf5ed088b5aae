"""Every recipe as it stands trains two steps on a tiny tree of its data set, and is evaluated."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import trees

from keras_medattn.data import manifest as manifests
from keras_medattn.data import sets, splits
from keras_medattn.train import evaluate, experiment, recipe

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.toml"))


def tiny(path):
    """The overrides of the lines `# tiny: key=value ...`: sizes alone."""
    lines = [line.removeprefix("# tiny:") for line in path.read_text().splitlines() if line[:7] == "# tiny:"]
    return [override for line in lines for override in line.split()]


def in_two_steps(settings, data, edited):
    """The recipe with batches of half of its training side, for one epoch where it can be one."""
    if settings.data.set:
        table = sets.load(settings.data.set, data, edited)
    else:
        table = manifests.load(data, settings.data.classes or None)
    table = splits.with_splits(
        table, settings.train.seed, settings.data.val_fraction, settings.data.test_fraction
    )
    batch = -(-table.splits.count("train") // 2)
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=batch))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps_and_is_evaluated(path, tmp_path):
    settings = recipe.load(path, ["train.epochs=1", *tiny(path)])
    tree = settings.data.set or ("volumes" if settings.data.slices else "")
    data = trees.TREES[tree](tmp_path / "data")
    settings = in_two_steps(settings, data, tmp_path / "edited")
    out = tmp_path / "run"
    experiment.train(settings, data, out, write=lambda line: None)
    with open(out / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert len(history) == settings.train.epochs
    watched = {"test_accuracy", "test_auroc"} if settings.train.watch_test else set()
    assert {"epoch", "loss", "val_loss", "val_auroc", "seconds"} | watched == set(history[0])
    for row in history:
        assert np.isfinite([float(row["loss"]), float(row["val_loss"])]).all()
    about = json.loads((out / "run.json").read_text())
    assert about["seconds"] >= sum(float(row["seconds"]) for row in history) - 0.1
    assert 0.1 < about["peak_memory_gb"] < 64
    parts = experiment.load(out.rename(tmp_path / "moved"))
    result = evaluate.evaluate(parts)
    assert len(result.manifest) == parts[0].manifest.splits.count("test") > 0
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.isfinite(evaluate.to_dict(result)["figures"]["accuracy"]["value"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command_and_its_overrides_are_settings(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"medattn train training/recipes/{path.name} --data " in text
    words = text.replace("'", " ").replace('"', " ").split()
    overrides = [after for word, after in itertools.pairwise(words) if word == "--set" and "=" in after]
    for key in (override.partition("=")[0] for override in overrides):
        section, _, name = key.partition(".")
        known = recipe.load(path).to_dict()
        assert section in known
        if section != "model":
            assert name in known[section], key
