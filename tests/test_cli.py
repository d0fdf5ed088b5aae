"""The command as a user meets it: exit codes, output, and errors that are one line, never a traceback."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from keras_medattn.cli import main
from keras_medattn.data import pipeline
from keras_medattn.models import backbones


def test_check_says_what_is_wrong(tmp_path, tiny_set, capsys):
    assert main(["check", str(tiny_set)]) == 0
    assert "ok: nothing stands in the way" in capsys.readouterr().out
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (9, 9, ord(name))).save(tmp_path / name / "fine.png")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    assert main(["check", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["classes"] == {"a": 2, "b": 1}
    assert "empty.png: the file is empty" in report["problems"][0]


def test_train_then_export(tmp_path, tiny_set, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '# settings of a test\n[data]\nimage_size = [64, 80]\n[model]\nbackbone = "mobilenet_v3_small"\n'
        "stride = 8\nkernels = [[1, 4]]\nscales = [1.0]\n[train]\nepochs = 9\n"
        "frozen_stride = 8\ncached_views = 1\n"
    )
    train = ["train", str(recipe), "--data", str(tiny_set), "--out", str(tmp_path / "run")]
    assert main([*train, "--set", 'model.weights="none.keras"']) == 1
    assert "There is no weight file none.keras" in capsys.readouterr().err
    weights = tmp_path / "backbone.weights.h5"
    backbones.backbone("mobilenet_v3_small", 8, None).save_weights(weights)
    overrides = ["--set", "train.epochs=2", "--set", f'model.weights="{weights}"']
    assert main([*train, *overrides]) == 0
    assert "epoch   2/2" in capsys.readouterr().out
    to = tmp_path / "models" / "m"
    kinds = ["--formats", "saved_model", "litert_int8"]
    assert main(["export", str(tmp_path / "run"), "--to", str(to), "--samples", "2", *kinds]) == 0
    assert (to / "1" / "saved_model.pb").is_file()
    assert (to / "files" / "1" / "model_int8.tflite").is_file()
    told = capsys.readouterr().out
    assert "largest difference to Keras" in told
    assert f"Measure it before use, on images that the model never saw: medattn benchmark {to} --data" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere"], "nowhere: no such folder or CSV file"),
        (["train", "none.toml", "--data", "x", "--out", "y"], "none.toml: cannot be read"),
        (["evaluate", "nowhere"], "nowhere: not a run folder"),
        (["explain", "nowhere", "a.png"], "nowhere: not a run folder"),
        (["explain", "nowhere"], "give images, or --split test"),
        (["export", "nowhere", "--to", "there"], "nowhere: not a run folder"),
        (["predict", "--server", "127.0.0.1:1", "--timeout", "1", "a.png"], "error: "),
        (["predict", "--server", "nohost", "a.png"], "HOST:PORT"),
    ],
)
def test_errors_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_wrong_command_line_is_2():
    with pytest.raises(SystemExit) as stop:
        main(["train", "--epochs"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("tensorflow", ["check", "SET"], "train"),
        ("sklearn", ["evaluate", "RUN"], "train"),
        ("grpc", ["serve", "."], "serve"),
        ("skimage", ["demo", "--out", "OUT"], "demo"),
        ("tensorflow_serving", ["export", "RUN", "--to", "OUT"], "train,serve,litert,onnx"),
    ],
)
def test_missing_extra_answers_with_its_line(missing, arguments, extra, tiny_set, tiny_run, tmp_path):
    places = {"SET": str(tiny_set), "RUN": str(tiny_run.folder), "OUT": str(tmp_path / "demo")}
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from keras_medattn.cli import main; sys.exit(main({[places.get(a, a) for a in arguments]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert f'pip install "keras-medattn[{extra}]"' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_evaluate_figures_are_those_of_its_predictions(tiny_run, tmp_path, capsys):
    out = tmp_path / "evaluation"
    assert main(["evaluate", str(tiny_run.folder), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 8
    labels = [row["label"] == "spot" for row in rows]
    auroc = roc_auc_score(labels, [float(row["spot"]) for row in rows])
    figure = printed["figures"]["auroc"]
    assert figure["value"] == pytest.approx(auroc, abs=1e-6)
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert printed["units"] == 4  # patients, two images each
    for name in ("roc.png", "pr.png", "confusion.png"):
        assert Image.open(out / name).width > 300
    assert json.loads((out / "metrics.json").read_text())["figures"] == printed["figures"]


def test_evaluate_on_cached_features_is_the_same(tiny_run):
    from keras_medattn.train import evaluate

    cache = tiny_run.folder / "cache"
    before = sorted(path.name for path in cache.iterdir())
    plain, cached = (evaluate.evaluate([tiny_run], cache=one).probabilities for one in (None, cache))
    np.testing.assert_allclose(plain, cached, atol=1e-5)
    assert sorted(path.name for path in cache.iterdir()) == before  # read, not made anew


def test_models_of_several_seeds_do_not_make_more_images(tiny_run):
    """One image predicted by three models is one unit: the interval stays as wide as one model's."""
    from keras_medattn.train import evaluate

    anonymous = replace(tiny_run, manifest=replace(tiny_run.manifest, patients=None))
    once, thrice = (evaluate.evaluate([anonymous] * count).figures for count in (1, 3))
    assert (thrice.units, thrice.unit) == (8, "images")
    assert once.figures["accuracy"][:3] == pytest.approx(thrice.figures["accuracy"][:3], abs=1e-9)


def test_evaluate_refuses_images_it_was_trained_on(tiny_run, tiny_set, tmp_path, capsys):
    table = tiny_set.parent / "mixed.csv"
    Image.new("RGB", (70, 60)).save(tiny_set.parent / "new.png")
    table.write_text("path,label,patient\n01.png,spot,p0\nnew.png,none,p99\n")
    assert main(["evaluate", str(tiny_run.folder), "--data", str(table), "--out", str(tmp_path / "e")]) == 1
    assert "1 of its 2 images belong to the run's own data" in capsys.readouterr().err


def test_explain_writes_pictures_arrays_and_localisation(tiny_run, tmp_path, capsys):
    test = tiny_run.manifest.split("test")
    masks = tmp_path / "masks"
    masks.mkdir()
    for path, label in zip(test.paths, test.labels, strict=True):
        if label:
            white = np.asarray(Image.open(path).convert("L")) > 200
            Image.fromarray(white).save(masks / f"{path.stem}.png")
    out = tmp_path / "explanations"
    arguments = ["explain", str(tiny_run.folder), "--split", "test", "--truth", str(masks), "--out", str(out)]
    assert main(arguments) == 0
    records = json.loads((out / "explanations.json").read_text())
    assert len(records) == 8
    for record, path in zip(records, test.paths, strict=True):
        heat = np.load(record["heat"])
        assert heat.shape == (60, 70)
        assert heat.min() >= 0
        assert Image.open(record["overlay"]).size == (70, 60)
        assert record["image"] == str(path)
        boxes = np.array(record["boxes"])
        assert (boxes >= 0).all()
        assert (boxes <= [70, 60, 70, 60]).all()
    assert Image.open(out / "sheet.png").width > 300
    assert "localisation" in capsys.readouterr().out


def test_explain_of_another_class_shows_no_boxes_of_the_predicted_one(tiny_run, capsys, tmp_path):
    path = str(tiny_run.manifest.paths[0])
    counts = {}
    for name in ("none", "spot"):
        out = tmp_path / name
        assert main(["explain", str(tiny_run.folder), path, "--class", name, "--out", str(out)]) == 0
        [record] = json.loads((out / "explanations.json").read_text())
        counts[name] = (len(record["boxes"]), record["predicted"] == name)
    assert sorted(counts.values()) == [(0, False), (20, True)]


def test_explain_answers_by_the_calibration(tiny_run, tiny_set, tmp_path):
    """A threshold beyond one image's probability: the less probable class is answered, and argued for."""
    from keras_medattn.train import calibrate
    from keras_medattn.train.calibrate import Calibration, Threshold

    part = replace(tiny_run, folder=tmp_path / "run")
    shutil.copytree(tiny_run.folder, part.folder)
    about = json.loads((part.folder / "run.json").read_text()) | {"root": str(tiny_set.parent)}
    (part.folder / "run.json").write_text(json.dumps(about))
    paths = part.manifest.split("test").paths
    scores = part.model()(np.stack([pipeline.read_sized(path, (64, 80)) for path in paths])).numpy()
    expected = softmax(scores / 2.5, axis=-1)
    place = int(expected[:, 1].argmax())
    likelier = int(expected[place].argmax())
    cut = float(expected[place, 1]) + (0.01 if likelier == 1 else -0.01)
    chosen = Threshold(cut, "specificity", 0.9, 1.0, 3)
    calibrate.keep(part, Calibration(2.5, True, 6, 5, (1.0, 0.5), (0.2, 0.1), chosen))
    records, other = {}, ("none", "spot")[1 - likelier]
    for name, more in (("plain", []), ("class", ["--class", other])):
        out = tmp_path / name
        assert main(["explain", str(part.folder), str(paths[place]), "--out", str(out), *more]) == 0
        [records[name]] = json.loads((out / "explanations.json").read_text())
    for one in records.values():
        assert one["predicted"] == other
        assert one["probabilities"]["spot"] == pytest.approx(expected[place, 1], abs=1e-5)
        assert one["boxes"] == []  # they would argue for the likelier class
    heats = [np.load(one["heat"]) for one in records.values()]
    np.testing.assert_allclose(*heats, atol=1e-6)


def test_explain_names_an_unknown_class(tiny_run, capsys, tmp_path):
    path = str(tiny_run.manifest.paths[0])
    assert (
        main(["explain", str(tiny_run.folder), path, "--class", "spots", "--out", str(tmp_path / "x")]) == 1
    )
    assert "--class must be one of ['none', 'spot']. Received: 'spots'" in capsys.readouterr().err


def test_predict_asks_a_real_server(tiny_export, tiny_run, capsys, tmp_path):
    from keras_medattn.serve import Server

    folder, _ = tiny_export
    server = Server(folder.parent.parent, port=0, rest_port=0)
    server.start()
    try:
        good = str(tiny_run.manifest.split("test").paths[0])
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"\xff\xd8\xff and nothing")
        address = f"127.0.0.1:{server.port}"
        assert main(["predict", "--server", address, "--model", "tiny", good]) == 0
        by_grpc = capsys.readouterr().out
        assert by_grpc.startswith(f"{good}: ")
        url = f"http://127.0.0.1:{server.rest_port}"
        assert main(["predict", "--server", url, "--model", "tiny", good]) == 0
        assert capsys.readouterr().out == by_grpc
        arguments = ["predict", "--server", address, "--model", "tiny", "--signature", "explain", "--json"]
        assert main([*arguments, good, str(broken)]) == 1
        first, second = map(json.loads, capsys.readouterr().out.splitlines())
        assert sum(first["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert len(first["boxes"]) == len(first["weights"]) == 21
        assert "broken.jpg" in second["error"]
    finally:
        server.stop()


def test_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "keras_medattn.cli", "--version"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0
    assert done.stdout.startswith("medattn 0.")
    assert (ROOT / "setup.cfg").read_text().count("medattn = keras_medattn.cli:main") == 1
