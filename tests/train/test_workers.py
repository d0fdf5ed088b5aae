"""Two workers on the loopback train as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

from keras_medattn.train import experiment, ranges, recipe

SMALL = {
    "system": "MIMS",
    "backbone": "small_cnn",
    "stride": 8,
    "kernels": [[1, 3], [2, 4]],
    "scales": [1.0],
    "k": 3,
}
TRAIN = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "optimizer": "sgd", "monitor": "epoch"}


def free_ports(count):
    """Ports of which none is taken, in a row."""
    while True:
        with socket.socket() as one:
            one.bind(("localhost", 0))
            first = one.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("localhost", port))
        except OSError:
            continue
        return list(range(first, first + count))


@pytest.fixture
def processes():
    """Those that a test starts, which are gone at its end."""
    started = []
    yield started
    for one in started:
        if one.poll() is None:
            one.kill()


def state(folder):
    with np.load(folder / "checkpoint" / "state.npz") as file:
        return dict(file)


def test_two_workers_train_as_one(tmp_path, tiny_set, processes):
    """Augmented, of batches of 6, 5 and 5, by the script for one machine."""
    settings = recipe.from_dict(TINY | {"model": SMALL, "train": TRAIN})
    path, out = tmp_path / "recipe.toml", tmp_path / "run"
    path.write_text(ranges.to_toml(settings))
    script = [ROOT / "training" / "launch" / "local_workers.sh", "2", path, "--data", tiny_set, "--out", out]
    tools = {"PORT": str(free_ports(2)[0]), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(tmp_path / "told.txt", "w") as file:
        one = subprocess.Popen(
            [*script, "--save-every", "2"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | tools,
            cwd=tmp_path,
        )
    processes.append(one)
    experiment.train(settings, tiny_set, tmp_path / "alone", write=lambda line: None)
    assert one.wait(500) == 0, (tmp_path / "told.txt").read_text("utf-8")[-3000:]
    assert "2 replicas on 2 machines" in (tmp_path / "told.txt").read_text("utf-8")
    assert "epoch" not in (tmp_path / "worker1.log").read_text("utf-8")  # the chief alone tells

    expected = state(tmp_path / "alone")
    for name, value in state(out).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    histories = [
        np.genfromtxt(folder / "history.csv", delimiter=",", names=True)
        for folder in (tmp_path / "alone", out)
    ]
    for figure in ("loss", "val_loss", "val_auroc"):
        np.testing.assert_allclose(histories[1][figure], histories[0][figure], rtol=1e-5)
