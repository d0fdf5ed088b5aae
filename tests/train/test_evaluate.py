"""What `evaluate` answers: patients, columns, drawn answers, and what an image costs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY
from scipy.special import softmax
from sklearn.metrics import accuracy_score, roc_auc_score

from keras_medattn.data import pipeline
from keras_medattn.data.manifest import Manifest
from keras_medattn.models import AttentionSampling
from keras_medattn.train import evaluate, figures, recipe
from keras_medattn.train.experiment import Part, RunError

LABELS = np.array([0, 0, 1, 1, 0, 0, 1, 1])
POSITIVE = np.array([0.1, 0.7, 0.8, 0.4, 0.2, 0.3, 0.9, 0.6])
PATIENTS = ("a", "a", "b", "b", "c", "c", "d", "d")


def predictions(tmp_path, **columns):
    rows = Manifest(tmp_path, tuple("01234567"), LABELS, ("no", "yes"), PATIENTS, columns=columns)
    return rows, np.stack([1 - POSITIVE, POSITIVE], axis=1)


def test_patients_stand_beside_images(tmp_path):
    """Two models, each of which saw four of the images; ties of a and b are settled by the mean."""
    found = figures.summarise(*predictions(tmp_path), ["m"] * 4 + ["n"] * 4)
    values = {key: one.value for key, one in found.figures.figures.items()}
    assert values["accuracy"] == accuracy_score(LABELS, POSITIVE >= 0.5) == 0.75
    assert values["patient_accuracy"] == 1.0
    assert values["patient_recognition_rate"] == 0.75
    assert values["patient_auroc"] == 1.0
    assert found.spread["accuracy"] == pytest.approx((0.75, np.std([0.5, 1.0], ddof=1)))
    assert found.spread["patient_recognition_rate"] == pytest.approx((0.75, np.std([0.5, 1.0], ddof=1)))
    assert found.patients == {"patients": 4, "left_out": 0, "tie": "probability"}
    votes = figures.summarise(*predictions(tmp_path), ["m"] * 8, tie="negative").figures.figures
    assert votes["patient_accuracy"].value == 0.75  # a and b are 1 : 1, and b is positive
    drawn = np.random.default_rng(0).integers(0, 4, (2000, 4))
    low, high = np.percentile(np.array([1, 0, 1, 1])[drawn].mean(axis=1), [2.5, 97.5])
    assert votes["patient_accuracy"][:3] == pytest.approx((0.75, low, high))


def test_a_patient_seen_by_two_models_votes_twice_and_is_one_unit(tmp_path):
    rows, probabilities = predictions(tmp_path)
    twice = rows.take([*range(8), *range(8)])
    found = figures.summarise(twice, np.tile(probabilities, (2, 1)), ["m"] * 8 + ["n"] * 8).figures
    once = figures.summarise(rows, probabilities, ["m"] * 8).figures
    assert found.units == once.units == 4
    assert found.figures["patient_auroc"][:3] == once.figures["patient_auroc"][:3]


def test_a_column_and_the_files(tiny_run, tmp_path):
    table = tiny_run.manifest
    camera = tuple("old" if number % 4 < 2 else "new" for number in range(len(table)))
    part = replace(tiny_run, manifest=replace(table, columns={"camera": camera}))
    found = evaluate.evaluate([part], by="camera")
    labels, positive = found.manifest.labels, found.probabilities[:, 1]
    old = np.array(found.manifest.columns["camera"]) == "old"
    assert set(found.by) == {"new", "old"}
    assert found.by["old"].figures.figures["auroc"].value == roc_auc_score(labels[old], positive[old])
    assert found.patients == {"patients": 0, "left_out": 4, "tie": "probability"}  # each has both labels
    assert "patient_auroc" not in found.figures.figures
    evaluate.write(found, tmp_path)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["by"]["old"]["figures"]["auroc"]["value"] == roc_auc_score(labels[old], positive[old])
    assert 0 < stored["timing"]["seconds_per_image"] < 60
    assert 0 < stored["timing"]["reading_seconds_per_image"] < 60
    assert 0.05 < stored["timing"]["peak_memory_gb"] < 200
    assert "old: 95% percentile bootstrap" in evaluate.table(found)
    for wrong, words in (
        ({"by": "lamp"}, r"no further column 'lamp'.*camera"),
        ({"draws": 3}, "MIMS draws nothing"),
    ):
        with pytest.raises(RunError, match=words):
            evaluate.evaluate([part], **wrong)


def test_a_moved_public_set_is_the_runs_own_table(tiny_run, tmp_path):
    settings = replace(tiny_run.recipe, data=replace(tiny_run.recipe.data, set="breakhis"))
    part = replace(tiny_run, recipe=settings)
    moved = evaluate.held_out(part, tmp_path, "test")  # no folder a class is in it
    assert moved.names == tiny_run.manifest.split("test").names
    (tmp_path / "others.csv").write_text("path,label\nseen_never.png,spot\nnor_this.png,none\n")
    assert evaluate.held_out(part, tmp_path / "others.csv", "test").names == (
        "seen_never.png",
        "nor_this.png",
    )


def test_drawn_answers_stand_beside_the_deterministic_one(tiny_run, tmp_path):
    """The mean of the softmax over the draws of `sample`, not the softmax of their mean."""
    arguments = {"patches": 3, "patch_size": 12, "stride": 4, "seed": 2}
    settings = recipe.from_dict(TINY | {"model": {"system": "AttentionSampling", **arguments}})
    model = AttentionSampling(2, **arguments)
    model.build((None, *settings.data.image_size, 3))
    model.save(tmp_path / "best.keras")
    part = Part(tmp_path, settings, tiny_run.manifest)
    found = evaluate.evaluate([part], draws=3)
    test = part.manifest.split("test")
    images = pipeline.read_all(test, settings.data.image_size)
    expected = softmax(np.asarray(model.sample(images, draws=3, seed=0)), axis=-1).mean(axis=1)
    np.testing.assert_allclose(found.monte_carlo.probabilities, expected, atol=1e-5)
    plain = softmax(np.asarray(model(images)), axis=-1)
    np.testing.assert_allclose(found.probabilities, plain, atol=1e-5)
    assert np.abs(plain - expected).max() > 1e-4
    evaluate.write(found, tmp_path / "evaluation")
    assert (tmp_path / "evaluation" / "predictions_monte_carlo.csv").is_file()
    assert "Monte-Carlo" in evaluate.table(found)
    assert "figures" in json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["monte_carlo"]
