"""What is shown of a training: maps in TensorBoard, figures in real MLflow and W&B stores on this disk."""

import csv
import struct
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

from keras_medattn.cli import main
from keras_medattn.data import pipeline
from keras_medattn.explain import heatmaps, overlays
from keras_medattn.files import read_json
from keras_medattn.train import experiment, ranges, recipe, seeing
from keras_medattn.train.recipe import RecipeError

QUICK = TINY["train"] | {"epochs": 2, "frozen_stride": 8, "cached_views": 1}


def pictures(folder):
    """step -> images `(N, H, W, 3)` of the event files."""
    found = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                drawn = value.tensor.string_val[2:]  # before them width and height
                found[event.step] = np.stack([tf.io.decode_png(one).numpy() for one in drawn])
    return found


def test_run_shows_the_same_images_each_epoch_and_logs_to_mlflow(tmp_path, tiny_set, capsys, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    toml, out = tmp_path / "tiny.toml", tmp_path / "run"
    values = {"model": TINY["model"] | {"backbone": "small_cnn"}, "train": QUICK | {"show_images": 3}}
    toml.write_text(ranges.to_toml(recipe.from_dict(TINY | values | {"augment": []})))
    assert main(["train", str(toml), "--data", str(tiny_set), "--out", str(out), "--log", "mlflow"]) == 0
    assert "warning: the settings, the figures and the name 'run' go to mlflow" in capsys.readouterr().out
    [part] = experiment.load(out)
    val = part.manifest.split("val")
    shown = pipeline.read_all(val.take([0, 1, 2]), (64, 80))  # classes take turns in this table already
    epochs = pictures(out / "tensorboard" / "maps")
    assert sorted(epochs) == [0, 1]
    for images in epochs.values():
        np.testing.assert_array_equal(images[:, :, :80], shown)
    assert (epochs[0][:, :, 80:] != epochs[1][:, :, 80:]).any()
    with open(out / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    best = read_json(out / "metrics.json")["epoch"] - 1
    heat = heatmaps.attention(heatmaps.evidence(part.model(), tf.constant(shown))["contributions"]).numpy()
    for picture, image, map_ in zip(epochs[best][:, :, 80:], shown, heat, strict=True):
        assert np.abs(picture.astype(int) - overlays.overlay(image, map_)).max() <= 3
    client = mlflow.MlflowClient()
    [stored] = client.search_runs([client.get_experiment_by_name("keras_medattn").experiment_id])
    assert stored.data.params["train.epochs"] == "2"
    assert stored.info.status == "FINISHED"
    for figure in ("loss", "val_auroc"):
        kept = [one.value for one in client.get_metric_history(stored.info.run_id, figure)]
        assert kept == pytest.approx([float(row[figure]) for row in history])
    everything = b"".join(path.read_bytes() for path in (tmp_path / "mlruns").rglob("*") if path.is_file())
    assert not [name for name in part.manifest.names if name.encode() in everything]


def test_figures_reach_wandb_offline(tmp_path, monkeypatch):
    """What stands in the file that it would upload: records in LevelDB's log format."""
    wandb = pytest.importorskip("wandb", reason="needs the extra [wandb]")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = recipe.from_dict(TINY | {"train": QUICK}).to_dict()
    said = []
    with seeing.logged("wandb", "run", settings, tmp_path, said.append) as [callback]:
        for epoch, loss in enumerate((0.5, 0.25)):
            callback.on_epoch_end(epoch, {"loss": loss})
    assert "go to wandb" in said[0]
    wandb.teardown()  # waits for its writer, a process of its own: `finish` does not, the end of ours does
    [path] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    data, place, rows, config = path.read_bytes(), 7, [], ""
    while place + 7 < len(data):
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])  # behind a checksum
        assert kind == 1  # whole records: all stands in one block
        record = wandb_internal_pb2.Record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(one.nested_key) or one.key: one.value_json for one in record.history.item}
            rows.append((items["epoch"], items["loss"]))
        config += str(record.run.config)
    assert rows == [("1", "0.5"), ("2", "0.25")]
    assert "train.learning_rate" in config
    assert sys.argv[0].encode() not in path.read_bytes()


def test_trackers_and_pictures_that_cannot_be(tmp_path, tiny_set):
    with pytest.raises(ValueError, match="log must be one of mlflow, wandb"):
        experiment.train(recipe.from_dict(TINY), tiny_set, tmp_path / "run", log="neptune")
    assert not (tmp_path / "run").exists()
    for wrong in ({"train": {"show_images": -1}}, {"train": {"show_images": 1}, "data": {"slices": [1, 2]}}):
        with pytest.raises(RecipeError, match=r"train\.show_images must be 0"):
            recipe.from_dict(TINY | wrong)
