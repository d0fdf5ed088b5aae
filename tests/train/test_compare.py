"""Runs side by side: the same images or an error, differences and tests against SciPy, what is written."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from conftest import TINY
from scipy import stats
from sklearn.metrics import roc_auc_score

from keras_medattn.cli import main
from keras_medattn.train import compare, compare_report, histories
from keras_medattn.train.experiment import RunError

PATIENTS = 20  # of two images each, every fourth of them in the test side of a fold
NAMES = [f"{patient:02d}-{eye}.png" for patient in range(PATIENTS) for eye in "ab"]
LABELS = np.repeat(np.arange(PATIENTS) // 2 % 2, 2)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def make_run(folder, signal, folds=0, seeds=(0,), model=(), names=NAMES, history=None, labels=LABELS):
    """A run as `train` and `evaluate` leave it, but for its models; it answers signal and noise."""
    rng = np.random.default_rng([int(100 * signal), folds, len(seeds)])
    about = {
        "recipe": TINY | {"model": TINY["model"] | dict(model)},
        "root": ".",
        "folds": folds,
        "seeds": list(seeds),
        "class_names": ["none", "spot"],
        "peak_memory_gb": 1.25,
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "evaluation").mkdir()
    rows = [["path", "patient", "model", "label", "predicted", "none", "spot"]]
    for seed in seeds:
        for fold in range(max(1, folds)):
            parts = [f"seed{seed}"] * (len(seeds) > 1) + [f"fold{fold + 1}"] * (folds > 0)
            part = folder / "-".join(parts) if parts else folder
            part.mkdir(exist_ok=True)
            test = [place // 2 % (folds or 5) == fold for place in range(len(names))]
            sides = ["test" if held else "val" if n % 4 == 0 else "train" for n, held in enumerate(test)]
            table = zip(names, labels, sides, strict=True)
            write_csv(
                part / "split.csv",
                [["path", "label", "patient", "split", "camera"]]
                + [
                    [n, ["none", "spot"][label], n[:2], side, "old" if "a" in n else "new"]
                    for n, label, side in table
                ],
            )
            columns = history or {
                "epoch": [1, 2],
                "loss": [0.7, 0.5],
                "val_loss": [0.69, 0.6],
                "seconds": [4, 2],
            }
            write_csv(part / "history.csv", [list(columns), *zip(*columns.values(), strict=True)])
            for name, label, held in zip(names, labels, test, strict=True):
                if held:
                    positive = 1 / (1 + np.exp(-signal * (2 * label - 1) - rng.normal()))
                    answer = ["none", "spot"][label]
                    rows.append(
                        [name, name[:2], part.name, answer, "", f"{1 - positive:.9g}", f"{positive:.9g}"]
                    )
    write_csv(folder / "evaluation" / "predictions.csv", rows)
    return folder


def of(*runs):
    return compare.load([(run.name, run) for run in runs])


def aurocs(run) -> np.ndarray:
    """Of each model, by scikit-learn, from the table of predictions."""
    models = {}
    for row in csv.DictReader((run / "evaluation" / "predictions.csv").read_text().splitlines()):
        models.setdefault(row["model"], []).append((row["label"] == "spot", float(row["spot"])))
    return np.array([roc_auc_score(*zip(*rows, strict=True)) for rows in models.values()])


def test_figures_and_the_interval_of_their_difference(tmp_path):
    """The difference's interval draws the same patients for both runs."""
    runs = [make_run(tmp_path / name, signal) for name, signal in (("weak", 0.4), ("strong", 1.2))]
    first, second = compare.compare(of(*runs)).rows
    assert (first.figure.value, second.figure.value) == pytest.approx(
        (aurocs(runs[0])[0], aurocs(runs[1])[0])
    )
    assert first.difference is None
    assert second.paired is None
    tables = [
        list(csv.DictReader((run / "evaluation" / "predictions.csv").read_text().splitlines()))
        for run in runs
    ]
    patients = [row["patient"] for row in tables[0]]
    units = list(dict.fromkeys(patients))
    drawn = np.random.default_rng(0).integers(0, len(units), (2000, len(units)))
    weights = np.stack([(drawn == units.index(patient)).sum(axis=1) for patient in patients], axis=1)
    values = []
    for table in tables:
        label = np.array([row["label"] == "spot" for row in table])
        score = np.array([float(row["spot"]) for row in table])
        beaten = (score[:, None] > score) + 0.5 * (score[:, None] == score)  # Mann and Whitney's count
        pairs = weights[:, label, None] * weights[:, None, ~label]
        with np.errstate(invalid="ignore"):
            values.append((pairs * beaten[np.ix_(label, ~label)]).sum(axis=(1, 2)) / pairs.sum(axis=(1, 2)))
    differences = values[1] - values[0]
    expected = np.percentile(differences[~np.isnan(differences)], [2.5, 97.5])
    assert second.difference[:3] == pytest.approx((aurocs(runs[1])[0] - aurocs(runs[0])[0], *expected))


def test_folds_are_paired_and_corrected(tmp_path):
    runs = [make_run(tmp_path / name, signal, folds=5) for name, signal in (("weak", 0.2), ("strong", 0.6))]
    row = compare.compare(of(*runs)).rows[1]
    first, second = map(aurocs, runs)
    np.testing.assert_allclose(row.models, second)
    assert row.figure.value == pytest.approx(second.mean())  # not of pooled scores
    assert row.difference.value == pytest.approx((second - first).mean())
    assert row.figure.low < row.figure.value < row.figure.high
    expected = stats.ttest_rel(second, first)
    assert row.paired.plain.p == pytest.approx(expected.pvalue)
    t = expected.statistic * np.sqrt((1 / 5) / (1 / 5 + 1 / 4))  # 8 test images, 32 others
    assert row.paired.corrected.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    means = np.abs((second - first) @ signs)
    assert row.paired.sign_flip == pytest.approx((means >= abs((second - first).sum()) - 1e-12).mean())


def test_seeds_on_one_test_side_need_no_correction(tmp_path):
    runs = [make_run(tmp_path / name, signal, seeds=(3, 4, 5)) for name, signal in (("a", 0.2), ("b", 0.6))]
    row = compare.compare(of(*runs)).rows[1]
    assert row.paired.plain.p == pytest.approx(stats.ttest_rel(aurocs(runs[1]), aurocs(runs[0])).pvalue)
    assert (row.paired.plain.n, row.paired.corrected) == (3, None)
    other = make_run(tmp_path / "c", 0.6, seeds=(4, 5, 6))
    assert compare.compare(of(runs[0], other)).rows[1].paired is None  # other seeds make no pairs


def test_other_images_or_labels_are_an_error(tmp_path):
    run = make_run(tmp_path / "a", 1.0)
    renamed = [name.replace("00-a", "00-z") for name in NAMES]
    fewer = make_run(tmp_path / "b", 1.0, names=renamed)
    with pytest.raises(RunError, match=r"1 only in a, as 00-a\.png; 1 only in b, as 00-z\.png"):
        of(run, fewer)
    swapped = make_run(tmp_path / "c", 1.0, labels=1 - LABELS)
    with pytest.raises(RunError, match="labels, patients or classes"):
        of(run, swapped)
    with pytest.raises(RunError, match="NAME=RUN"):
        of(run, run)
    with pytest.raises(RunError, match=r"no figure 'f1'.*patient_accuracy"):
        compare.compare(of(run), "f1")


def test_predictions_are_read_where_fresh_and_made_where_not(tiny_run, tmp_path):
    run = shutil.copytree(
        tiny_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "evaluation")
    )
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"root": str(tiny_run.manifest.root)}))
    [made] = of(run)
    path = run / "evaluation" / "predictions.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    path.write_text(path.read_text().replace(rows[1][-1], "0.125").replace(rows[1][-2], "0.875"))
    [read] = of(run)
    assert read.evaluation.probabilities[0].tolist() == [0.875, 0.125]
    np.testing.assert_allclose(
        read.evaluation.probabilities[1:], made.evaluation.probabilities[1:], rtol=1e-8
    )
    later = path.stat().st_mtime + 5
    os.utime(run / "best.keras", (later, later))  # trained on since then
    [again] = of(run)
    np.testing.assert_allclose(again.evaluation.probabilities, made.evaluation.probabilities, atol=1e-6)
    assert ",0.125" in path.read_text()  # an evaluation that is there is left alone


def test_by_a_column(tmp_path):
    runs = [make_run(tmp_path / name, signal) for name, signal in (("a", 0.4), ("b", 1.0))]
    rows = compare.compare(of(*runs), by="camera").rows
    assert [(row.name, row.value) for row in rows] == [
        *(("a", ""), ("b", ""), ("a", "new"), ("b", "new"), ("a", "old"), ("b", "old"))
    ]
    table = list(csv.DictReader((runs[1] / "evaluation" / "predictions.csv").read_text().splitlines()))
    old = [(row["label"] == "spot", float(row["spot"])) for row in table if "a.png" in row["path"]]
    assert rows[-1].figure.value == pytest.approx(roc_auc_score(*zip(*old, strict=True)))
    with pytest.raises(RunError, match=r"no further column 'lamp'.*camera"):
        compare.compare(of(*runs), by="lamp")


def test_settings_in_which_runs_differ(tmp_path):
    runs = [
        make_run(tmp_path / f"{k}{aggregation}", 0.5, model={"k": k, "aggregation": aggregation})
        for k in (1, 5)
        for aggregation in ("top_k", "mean")
    ]
    comparison = compare.compare(of(*runs))
    assert compare_report.settings(comparison.runs)["5mean"] == {"model.k": 5, "model.aggregation": "mean"}
    written = {path.name for path in compare_report.write(comparison, tmp_path / "out")}
    assert "settings.png" in written
    default = make_run(tmp_path / "default", 0.5)  # says nothing of the aggregation: the default counts
    found = compare_report.settings(of(default, runs[0]))
    assert list(found["default"]) == ["model.k"]
    with pytest.raises(
        RunError, match=r"do not differ in train\.epochs, but in model\.k, model\.aggregation"
    ):
        compare_report.write(comparison, tmp_path / "none", over="train.epochs")
    assert not (tmp_path / "none").exists()


def test_window_of_epochs_that_a_cross_validation_picks(tmp_path):
    epochs = np.arange(1, 41)
    curve = 0.5 + 0.4 * np.exp(-(((epochs - 25) / 8) ** 2))  # best around the 25th: epochs 20 to 29 of ten
    history = {"epoch": epochs, "loss": 1 / epochs, "val_loss": 1 / epochs, "test_accuracy": curve}
    others = [f"x{name}" for name in NAMES]
    cv = make_run(tmp_path / "cv", 1.0, folds=5, names=others, history=history)
    rng = np.random.default_rng(0)
    seen = [np.round(0.8 + shift + 0.02 * rng.normal(size=40), 6) for shift in (0, 0.01)]
    runs = [
        make_run(tmp_path / name, 1.0, history=history | {"test_accuracy": one})
        for name, one in zip("ab", seen, strict=True)
    ]
    comparison = compare.compare(of(*runs), epochs=11, epochs_from=cv)
    assert comparison.epochs == range(19, 30)  # 20 ... 30: as far on either side of 25
    found = comparison.rows[1].window
    np.testing.assert_array_equal(found.accuracies, [seen[1][19:30]])
    expected = stats.ttest_ind(seen[1][19:30], seen[0][19:30], equal_var=False)
    assert found.welch.p == pytest.approx(expected.pvalue)
    text = compare_report.text(comparison)
    assert f"{seen[1][19:30].mean():.4f} +- {seen[1][19:30].std(ddof=1):.4f}" in text
    assert "not, so its p-value is too small" in text
    with pytest.raises(RunError, match="8 of the test images are among its own"):
        compare.compare(of(*runs), epochs_from=make_run(tmp_path / "leak", 1.0, folds=5, history=history))
    short = {key: value[:25] for key, value in history.items()}
    with pytest.raises(RunError, match="has 25 epochs, and the window ends with epoch 30"):
        compare.compare(of(make_run(tmp_path / "short", 1.0, history=short)), epochs=11, epochs_from=cv)
    with pytest.raises(RunError, match=r"watch_test=true"):
        compare.compare(of(make_run(tmp_path / "unwatched", 1.0)), epochs=11, epochs_from=cv)


def test_how_long_a_run_stayed_on_its_plateau(tmp_path):
    history = {
        "epoch": [1, 2, 3],
        "loss": [1.0, 0.9, 0.8],
        "val_loss": [0.70, 0.63, 0.61],
        "seconds": [9, 3, 5],
    }
    run = make_run(tmp_path / "a", 1.0, history=history)
    [loaded] = of(run)
    counts = np.bincount(loaded.parts[0].manifest.split("val").labels)
    shares = counts / counts.sum()
    chance = -(shares * np.log(shares)).sum()
    expected = int(np.flatnonzero(np.array(history["val_loss"]) < 0.9 * chance)[0])
    found = histories.learning(loaded.parts)
    assert found["plateau_epochs"] == expected
    steps = -(-len(loaded.parts[0].manifest.split("train")) // TINY["train"]["batch_size"])
    assert (found["seconds_per_epoch"], found["seconds_per_step"]) == (5, pytest.approx(5 / steps))
    flat = make_run(tmp_path / "b", 1.0, history=history | {"val_loss": [0.7, 0.7, 0.7]})
    stayed = histories.learning(of(flat)[0].parts)
    assert (stayed["plateau_epochs"], stayed["on_plateau"]) == (None, 1)


def test_the_command(tmp_path, capsys):
    for name, signal in (("plain", 0.3), ("mask", 0.9)):
        make_run(tmp_path / name, signal, folds=5)
    out = tmp_path / "out"
    runs = [f"simple={tmp_path / 'plain'}", str(tmp_path / "mask")]
    arguments = ["compare", *runs, "--figure", "patient_accuracy", "--by", "camera", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for words in ("difference to simple", "mask, old", "Nadeau and Bengio", "on the plateau"):
        assert words in printed
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "comparison.json").read_text())
    assert found["warning"] is None  # patients are known
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in rows[:2]] == ["simple", "mask"]
    assert float(rows[1]["difference"]) == pytest.approx(found["rows"][1]["difference"]["value"])
    assert float(rows[1]["corrected_t_p"]) == pytest.approx(found["rows"][1]["paired"]["corrected_t"]["p"])
    assert sorted(path.name for path in out.iterdir()) == [
        *("comparison.csv", "comparison.json", "comparison.png", "curves.png")
    ]
    assert main(["compare", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: not a run folder" in capsys.readouterr().err
