"""Temperature and threshold: fitted on validation images, kept with the model, applied to others."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss, recall_score

from keras_medattn.cli import main
from keras_medattn.data import pipeline
from keras_medattn.train import calibrate, evaluate
from keras_medattn.train.calibrate import Calibration, Threshold
from keras_medattn.train.experiment import RunError


@pytest.fixture
def part(tiny_run, tmp_path):
    """A copy of the small run, in which the validation side is large enough to be wrong about."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    sides = list(tiny_run.manifest.splits)
    sides[:16] = ["val"] * 16
    return replace(tiny_run, folder=folder, manifest=replace(tiny_run.manifest, splits=tuple(sides)))


def scores(part, side):
    images = pipeline.read_all(part.manifest.split(side), part.recipe.data.image_size)
    return part.manifest.split(side).labels, np.asarray(part.model()(images), np.float64)


def test_the_temperature_is_fitted_on_validation_and_applied_to_test(part):
    labels, own = scores(part, "val")
    before = evaluate.evaluate([part])
    [found] = calibrate.calibrate([part], ("sensitivity", 0.9))
    best = minimize_scalar(
        lambda log: log_loss(labels, softmax(own / np.exp(log), axis=1)), bounds=(-4, 4), method="bounded"
    )
    assert found.temperature == pytest.approx(np.exp(best.x), rel=1e-3)
    assert found.nll == pytest.approx((log_loss(labels, softmax(own, axis=1)), best.fun), abs=1e-6)
    assert (found.images, found.patients) == (22, 11)
    assert calibrate.stored(part) == found
    cut = found.threshold
    called = softmax(own / found.temperature, axis=1)[:, 1] >= cut.value
    assert cut.validation == recall_score(labels, called) >= 0.9
    assert cut.images == labels.sum()

    after = evaluate.evaluate([part])
    labels, own = scores(part, "test")
    expected = softmax(own / found.temperature, axis=1)
    np.testing.assert_allclose(after.probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(after.uncalibrated.probabilities, before.probabilities, atol=1e-12)
    assert after.uncalibrated.figures.figures == before.figures.figures
    figures = after.figures.figures
    assert figures["sensitivity"].value == recall_score(labels, expected[:, 1] >= cut.value)
    given = evaluate.evaluate([part], threshold=0.0)  # a given threshold wins, and the temperature stays
    assert given.figures.figures["sensitivity"].value == 1
    assert given.figures.figures["specificity"].value == 0
    np.testing.assert_array_equal(given.probabilities, after.probabilities)


def test_from_the_command_line(part, tiny_set, tmp_path, capsys):
    run = str(part.folder)
    about = json.loads((part.folder / "run.json").read_text()) | {"root": str(tiny_set.parent)}
    (part.folder / "run.json").write_text(json.dumps(about))
    assert main(["calibrate", run, "--specificity", "0.5"]) == 0
    assert "run: temperature " in (said := capsys.readouterr().out)
    assert "for specificity 0.5: on validation " in said
    stored = json.loads((part.folder / "calibration.json").read_text())
    assert stored["images"] == 6
    assert main(["evaluate", run, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "calibrated: temperature " in said or not stored["fitted"]
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    figure = "{value:.3f} ({low:.3f}, {high:.3f})".format(**values["figures"]["specificity"])
    assert f"chosen on validation for specificity 0.5, there {stored['threshold']['validation']:.4g}" in said
    assert f"of 3 images: here {figure}" in said
    assert values["threshold"] == stored["threshold"]["value"]
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000


def test_what_it_rests_on_is_said(part):
    known = Calibration(2.0, True, 6, 3, (1.0, 0.5), (0.2, 0.1))
    assert "fitted on 6 validation images of 3 patients" in calibrate.text(part, known)
    assert "warning" not in calibrate.text(part, known)
    assert "warning: no patients are known" in calibrate.text(part, replace(known, patients=None))


def test_models_have_thresholds_of_their_own(part, tmp_path):
    other = replace(part, folder=tmp_path / "other")
    shutil.copytree(part.folder, other.folder)
    for one, cut in ((part, 0.2), (other, 0.9)):
        chosen = Threshold(cut, "sensitivity", 0.9, 1.0, 11)
        calibrate.keep(one, Calibration(2.0, True, 22, 11, (1.0, 0.5), (0.2, 0.1), chosen))
    found = evaluate.evaluate([part, other])
    answers = found.probabilities[:, 1] >= np.repeat([0.2, 0.9], 8)
    assert found.figures.figures["accuracy"].value == np.mean(answers == found.manifest.labels)
    evaluate.write(found, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert values["threshold"] == {"run": 0.2, "other": 0.9}
    assert "threshold 0.2 to 0.9 chosen on validation for sensitivity 0.9" in evaluate.table(found)
    (other.folder / "calibration.json").unlink()
    with pytest.raises(RunError, match="not calibrated alike"):
        evaluate.evaluate([part, other])


def test_what_cannot_be_calibrated_is_said(part):
    calibrate.calibrate([part])
    with open(part.best, "ab") as file:
        file.write(b"trained on")
    with pytest.raises(RunError, match=r"another best.keras.*`medattn calibrate` again"):
        calibrate.stored(part)
    (part.folder / "calibration.json").write_text("{}")
    with pytest.raises(RunError, match=r"calibration.json: cannot be read"):
        calibrate.stored(part)
    table = part.manifest
    three = replace(part, manifest=replace(table, class_names=("none", "spot", "more")))
    none = replace(part, manifest=replace(table, splits=("test",) * len(table)))
    for one, words in ((three, "needs two classes"), (none, "no validation images")):
        with pytest.raises(RunError, match=words):
            calibrate.calibrate([one], ("sensitivity", 0.9))


def test_images_without_patients_are_warned_about(part):
    known = evaluate.evaluate([part])
    assert known.warning == ""
    assert "warning" not in evaluate.table(known)
    unknown = evaluate.evaluate([replace(part, manifest=replace(part.manifest, patients=None))])
    assert "warning: no patients are known" in evaluate.table(unknown)
    assert "intervals are too narrow" in evaluate.to_dict(unknown)["warning"]
