"""A run that was killed, a disk that is full, a loss that is no number: what is kept, and how it goes on."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import keras
import numpy as np
import pytest

from keras_medattn import cli
from keras_medattn.files import read_json
from keras_medattn.train.callbacks import Line
from keras_medattn.train.checkpoint import Keeper
from keras_medattn.train.recipe import Train

RECIPE = """
[data]
image_size = [32, 40]
[model]
{model}
[train]
epochs = 3
batch_size = 2
accumulate = 2
learning_rate = 0.01
monitor = "epoch"
[[augment]]
layer = "RandomFlip"
[[augment]]
layer = "RandomBrightness"
factor = 0.1
"""
SYSTEMS = {  # dropout in the one, sampling in the other
    "first": 'backbone = "small_cnn"\nstride = 8\nkernels = [[2, 4]]\nscales = [1.0]\nk = 2\ndropout = 0.3',
    "second": 'system = "AttentionSampling"\npatches = 3\npatch_size = 8\nstride = 4\nrepeats = 2',
}
STEPS = 8  # of an epoch: 16 images, 2 a step
COMMANDS = """
import sys
from pathlib import Path
from keras_medattn import cli
from keras_medattn.files import read_json

table, every, *outs = sys.argv[1:]
for run in (Path(out) / name for out in outs for name in ("first", "second")):
    more = ["--resume"] if run.exists() else []
    toml = run.parents[1] / f"{run.name}.toml"
    if cli.main(["train", f"{toml}", "--data", table, "--out", f"{run}", "--save-every", every, *more]):
        sys.exit(1)
"""


@pytest.fixture
def recipes(tmp_path):
    for name, model in SYSTEMS.items():
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(model=model))
    return tmp_path


def start(table, every, *outs):
    """Train both systems, the one after the other, into each folder, or go on with that."""
    for out in outs:
        out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", COMMANDS, table, str(every), *outs]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"TF_DETERMINISTIC_OPS": "1"},
    )


def kill_within_an_epoch(process, path, after):
    """SIGKILL at a step that is reached somewhat later than `after`, the last checkpoint within an epoch."""
    deadline = time.monotonic() + 900
    while True:
        assert time.monotonic() < deadline, f"no checkpoint after step {after} in 15 minutes"
        assert process.poll() is None, process.communicate()[1]
        if path.is_file():
            process.send_signal(signal.SIGSTOP)
            with np.load(path) as state:
                reached = int(state["step"]) if "step" in state.files else 0
            if reached > after:
                process.kill()
                process.communicate()
                return reached
            process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def test_killed_run_goes_on_to_the_same_weights(recipes, tiny_set):
    """Killed twice, within an epoch of a supervised system and of one that samples: bit-equal at the end.

    Its history, too: the losses of an epoch that was broken off count its steps before the break.
    """
    draws = np.random.default_rng()
    whole, killed = recipes / "whole", recipes / "killed"
    for name in ("first", "second"):
        process = start(tiny_set, 3, killed)
        after = int(draws.integers(2 * STEPS))
        reached = kill_within_an_epoch(process, killed / name / "checkpoint" / "state.npz", after)
        assert reached % 3 == 0
        assert reached % STEPS
    process = start(tiny_set, 0, killed, whole)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    for name in ("first", "second"):
        with (
            np.load(whole / name / "checkpoint" / "state.npz") as one,
            np.load(killed / name / "checkpoint" / "state.npz") as other,
        ):
            assert int(one["epochs"]) == 3
            assert one.files == other.files
            for key in one.files:
                np.testing.assert_array_equal(one[key], other[key], err_msg=f"{name}: {key}")
        histories = [
            [row.rpartition(",")[0] for row in (out / name / "history.csv").read_text().splitlines()]
            for out in (whole, killed)
        ]  # all but the seconds
        assert len(histories[0]) == 4
        assert histories[0] == histories[1]


class Whole:
    """What a keeper saves as the best model."""

    def save(self, path):
        path.write_bytes(b"x" * 100)


def keeper_of(model, folder, **more):
    keeper = Keeper(Whole(), folder, Train(monitor="epoch"), steps=4, **more)
    keeper.set_model(model)
    return keeper


def model_of(rate):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(rate), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *callbacks):
    x = np.ones((4, 2), "float32")
    told = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(val_loss=1.0))
    model.fit(x, np.full((4, 3), 3.0), batch_size=1, epochs=1, verbose=0, callbacks=[told, *callbacks])


def test_loss_that_is_no_number_stops_at_its_step_and_keeps_the_checkpoint(tmp_path):
    keeper = keeper_of(model_of(1e20), tmp_path, every=1)
    with pytest.raises(FloatingPointError, match=r"is (inf|nan) in epoch 1\..* Lower train.learning_rate"):
        fit(keeper.model, keeper)
    assert keeper.step == 2  # of 4: (2 - 3)^2 is finite, and 1e20^2 is not
    fresh = keeper_of(model_of(1e20), tmp_path)
    assert fresh.restore() == 1
    # w = 1 + rate * 2 (3 - 2) / 3, the mean over 3 outputs
    np.testing.assert_allclose(fresh.model.get_weights()[0], 2e20 / 3, rtol=1e-6)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    """The loss of the step before was finite."""
    keeper = keeper_of(model_of(np.inf), tmp_path, every=1)
    with pytest.raises(FloatingPointError, match=r"weight .*kernel is nan in epoch 1"):
        fit(keeper.model, keeper)
    assert keeper.step == 1
    assert not (tmp_path / "checkpoint").exists()


@contextmanager
def room(size):
    """No file may grow beyond `size`: as on a full disk, writing fails midway."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    keeper = keeper_of(model_of(0.1), tmp_path)
    fit(keeper.model, keeper)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = keeper.model.get_weights()
    keeper.model.set_weights([weight + 1 for weight in kept])
    keeper.step = 8
    words = r"checkpoint of step 8 cannot be written \(.+\)\. The one before is whole"
    with room(400), pytest.raises(OSError, match=words):
        keeper.on_epoch_end(1, {"loss": 0.5, "val_loss": 1.0})
    fresh = keeper_of(model_of(0.1), tmp_path)
    assert fresh.restore() == 4
    for weight, wanted in zip(fresh.model.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(weight, wanted)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(before)  # nothing half-written
    (tmp_path / "checkpoint" / "state.npz").write_bytes(before[tmp_path / "checkpoint" / "state.npz"][:300])
    with pytest.raises(ValueError, match=r"state\.npz: no checkpoint to go on from .* remove .*checkpoint"):
        fresh.restore()


def test_folder_that_cannot_be_used_is_named_before_anything_is_read(recipes, tiny_set, capsys):
    (recipes / "file").write_text("")
    run = recipes / "file" / "run"
    assert cli.main(["train", str(recipes / "first.toml"), "--data", str(tiny_set), "--out", str(run)]) == 1
    assert f"{run}: cannot be written (Not a directory). Choose another --out" in capsys.readouterr().err
    broken = recipes / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    command = [
        "train",
        str(recipes / "first.toml"),
        "--data",
        str(tiny_set),
        "--out",
        str(broken),
        "--resume",
    ]
    assert cli.main(command) == 1
    assert "broken/run.json: cannot be read" in capsys.readouterr().err
    assert cli.main([*command, "--save-every", "-1"]) == 1
    assert "save_every must be 0 or more. Received: -1" in capsys.readouterr().err


def test_training_ends_two_epochs_behind_the_best_auroc(tmp_path):
    """And is not taken up again by a resume."""
    model, aurocs = model_of(0.1), [0.6, 0.8, 0.7, 0.75, 0.9]
    told = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(val_loss=1.0, val_auroc=aurocs[epoch])
    )
    settings = Train(monitor="val_auroc", patience=2)
    keeper = Keeper(Whole(), tmp_path, settings, steps=1)
    x, y = np.ones((4, 2), "float32"), np.full((4, 3), 3.0)
    model.fit(x, y, batch_size=4, epochs=5, verbose=0, callbacks=[told, keeper])
    assert [row["val_auroc"] for row in keeper.history] == aurocs[:4]
    assert read_json(tmp_path / "metrics.json")["epoch"] == 2
    fresh = Keeper(Whole(), tmp_path, settings, steps=1)
    fresh.set_model(model)
    assert fresh.restore() == 4
    assert fresh.done


def test_long_epochs_tell_where_they_stand(tmp_path):
    """With the steps, the loss so far and the best figure; short ones do not."""
    lines = {0.0: [], 60.0: []}
    for pause, mine in lines.items():
        keeper = keeper_of(model_of(0.1), tmp_path)
        keeper.settings = Train(monitor="val_loss")
        keeper.history = [{"epoch": 1, "loss": 2.0, "val_loss": 0.25, "seconds": 1.0}]
        fit(keeper.model, keeper, Line(keeper, 2, "a  ", mine.append, pause))
    assert [line.split()[3:5] for line in lines[0.0][:3]] == [[f"{done}/4", "steps"] for done in (2, 3, 4)]
    assert lines[0.0][0].startswith("a  epoch   1/2  2/4 steps  loss ")
    assert "  best val_loss 0.2500 in epoch 1  at most " in lines[0.0][0]
    assert lines[0.0][-1].endswith(" s left")
    assert len(lines[60.0]) == 1  # that of its end
