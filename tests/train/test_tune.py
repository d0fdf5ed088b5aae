"""Searches: by validation images alone, resumable when killed, nested in folds by patient."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from sklearn.metrics import roc_auc_score

from keras_medattn.cli import main
from keras_medattn.data import manifest as manifests
from keras_medattn.data.manifest import Manifest
from keras_medattn.files import read_json
from keras_medattn.train import evaluate, experiment, ranges, recipe, tune
from keras_medattn.train.recipe import RecipeError

pytest.importorskip("keras_tuner", reason="needs the extra [tune]")

QUICK = TINY["train"] | {"epochs": 2, "frozen_stride": 8, "cached_views": 1}
SEARCHED = {"train": {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}, "model": {"k": [1, 3]}}
VALUES = TINY | {"model": TINY["model"] | {"backbone": "small_cnn"}, "train": QUICK}
VALUES |= {"augment": [], "tune": SEARCHED}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def copied(tiny_set, folder, sides=("train", "val")):
    """The table, with the files of some sides alone."""
    table = manifests.load(tiny_set)
    for path, name, side in zip(table.paths, table.names, table.splits, strict=True):
        if side in sides:
            (folder / name).write_bytes(path.read_bytes())
    (folder / "set.csv").write_text(tiny_set.read_text())
    return folder / "set.csv"


def test_killed_search_goes_on_and_never_opens_the_test_side(tmp_path, tiny_set, capsys):
    """A process of its own, SIGKILL in the second trial, --resume; the test side's files are not there."""
    data = copied(tiny_set, tmp_path)
    toml, out = tmp_path / "tiny.toml", tmp_path / "tuned"
    toml.write_text(
        ranges.to_toml(recipe.from_dict(VALUES | {"tune": {}}))
        + "[tune]\ntrain.learning_rate = { low = 1e-4, high = 1e-1, log = true }\nmodel.k = [1, 3]\n"
    )
    assert recipe.load(toml) == recipe.from_dict(VALUES)
    command = ["tune", str(toml), "--data", str(data), "--out", str(out), "--trials", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_medattn.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 240
    while not (out / "trials" / "1" / "run.json").is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no second trial in four minutes"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = (out / "trials" / "0" / "best.keras").stat().st_mtime_ns
    [before] = rows_of(out / "trials.csv")
    assert main(command) == 1  # never overwritten
    assert main([*command, "--resume", "--set", "train.epochs=3"]) == 1  # another search
    assert main([*command, "--resume"]) == 0
    rows = rows_of(out / "trials.csv")
    assert rows[0] == before
    assert (out / "trials" / "0" / "best.keras").stat().st_mtime_ns == first
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        part = experiment.load(out / "trials" / row["trial"])[0]
        assert float(row["val_auroc"]) == pytest.approx(read_json(part.folder / "metrics.json")["val_auroc"])
        assert part.recipe.train.learning_rate == pytest.approx(float(row["train.learning_rate"]))
        assert part.recipe.model["k"] == int(row["model.k"])
        assert set(part.manifest.splits) == {"train", "val"}
    best = max(rows, key=lambda row: float(row["val_auroc"]))
    chosen = recipe.load(out / "best.toml")
    assert chosen.train.learning_rate == pytest.approx(float(best["train.learning_rate"]))
    assert chosen == ranges.changed(
        recipe.from_dict(VALUES),
        {"train.learning_rate": chosen.train.learning_rate, "model.k": int(best["model.k"])},
    )
    assert "3 patients, which chose it" in (out / "best.toml").read_text()
    assert (out / "trials.png").stat().st_size > 5000
    (out / "tuner" / "oracle.json").write_text("{")  # as a full disk leaves it
    assert main([*command, "--resume"]) == 1
    assert "the state of the search cannot be read" in capsys.readouterr().err


@pytest.mark.slow  # 10 models
def test_nested_folds_are_by_patient_and_each_has_settings_of_its_own_images(tmp_path, tiny_set, capsys):
    data = copied(tiny_set, tmp_path, ("train", "val", "test"))
    data.write_text("\n".join(line.rpartition(",")[0] for line in data.read_text().splitlines()))
    toml = tmp_path / "tiny.toml"
    values = VALUES | {"tune": {}, "data": TINY["data"] | {"val_fraction": 0.5}}
    toml.write_text(ranges.to_toml(recipe.from_dict(values)) + "[tune]\nmodel.k = [1, 3]\n")
    out = tmp_path / "nested"
    command = ["tune", str(toml), "--data", str(data), "--out", str(out), "--trials", "2"]
    assert main([*command, "--folds", "2", "--inner", "2"]) == 0
    parts = experiment.load(out)
    held = [set(part.manifest.split("test").patients) for part in parts]
    assert len(parts) == 2
    assert not held[0] & held[1]
    assert len(held[0] | held[1]) == 15
    for number, (part, patients) in enumerate(zip(parts, held, strict=True), 1):
        search = out / f"search{number}"
        rows = rows_of(search / "trials.csv")
        for row in rows:
            inner = experiment.load(search / "trials" / row["trial"])
            assert len(inner) == 2
            assert not patients & {name for one in inner for name in one.manifest.patients}
            figures = []
            for one in inner:
                side = one.manifest.split("test")
                assert not set(side.patients) & set(one.manifest.split("train").patients)
                figures.append(roc_auc_score(side.labels, evaluate.predict(one, side)[:, 1]))
            assert float(row["val_auroc"]) == pytest.approx(np.mean(figures))
        best = max(rows, key=lambda row: float(row["val_auroc"]))
        assert part.recipe.model["k"] == int(best["model.k"])
    capsys.readouterr()
    assert main(["evaluate", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nested: each model's settings are the best of 2, by val_auroc over 2 inner folds" in said
    assert "15 patients" in said
    assert read_json(out / "evaluation" / "metrics.json")["tuned"]["inner"] == 2


def test_what_a_search_rests_on_is_said():
    names, sides = ("a", "b", "c"), ("train", "val", "val")
    seen = Manifest(Path(), names, np.array([0, 1, 0]), ("none", "spot"), splits=sides)
    assert tune._basis(seen, 0).startswith("on 2 images. Warning: no patients are known")
    known = dataclasses.replace(seen, patients=("p", "q", "q"))
    assert tune._basis(known, 0) == "on 2 images of 1 patients, which chose it: test it on others"
    assert (
        tune._basis(known, 3) == "over 3 folds of 3 images of 2 patients, which chose it: test it on others"
    )


@pytest.mark.parametrize(
    ("searched", "words"),
    [
        ({}, r"nothing to search\. Give it, say, \[tune\]"),
        ({"data": {"val_fraction": [0.1, 0.2]}}, r"tune\.data: settings of \[model\] and \[train\]"),
        ({"train": {"seed": [1, 2]}}, r"tune\.train\.seed: trials are compared by it"),
        ({"train": {"epocs": [1, 2]}}, r"tune\.train\.epocs: .*Did you mean train\.epochs"),
        ({"train": {"epochs": [0, 2]}}, r"tune\.train\.epochs: .*must be 1 or more\. Received: 0"),
        ({"train": {"epochs": [2]}}, r"must be a list of two values or more"),
        ({"train": {"l2": {"low": 0.0, "high": 0.1, "log": True}}}, "above 0 with log"),
        ({"train": {"l2": {"low": 0.2, "high": 0.1}}}, "low < high"),
    ],
)
def test_wrong_ranges_are_named(searched, words):
    with pytest.raises(RecipeError, match=words):
        ranges.ranges(recipe.from_dict(VALUES | {"tune": searched}))


def test_recipes_survive_toml():
    values = VALUES | {"augment": [{"layer": "RandomFlip", "mode": "horizontal"}, {"layer": "MixUp"}]}
    values |= {
        "train": TINY["train"] | {"learning_rate": 1e-5},
        "data": {"classes": ['é"', "b"], "image_size": [64, 80]},
    }
    whole = recipe.from_dict(values | {"tune": {}})
    assert recipe.from_dict(tomllib.loads(ranges.to_toml(whole))) == whole
    assert whole.model["weights"] is None
