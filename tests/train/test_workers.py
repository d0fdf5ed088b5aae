"""Two workers on the loopback: they train as one, and go on after one of them was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
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
LINES = """
import sys, time
from keras_medattn.train import experiment, recipe, strategy
strategy.get()
def write(line):
    print(line, flush=True)
    time.sleep(5)
experiment.train(recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3], write=write, save_every=2)
"""  # the chief waits behind each line: there is time to kill the other


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


@pytest.fixture
def small(tmp_path):
    """The settings, augmented, of batches of 6, 5 and 5; and the file of them."""
    settings, path = recipe.from_dict(TINY | {"model": SMALL, "train": TRAIN}), tmp_path / "recipe.toml"
    path.write_text(ranges.to_toml(settings))
    return settings, path


def start(processes, log, command, **variables):
    with open(log, "w") as file:
        one = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables, cwd=log.parent
        )
    processes.append(one)
    return one


def by_script(processes, log, path, data, out, *more):
    """Two workers, by the script for one machine."""
    script = [ROOT / "training" / "launch" / "local_workers.sh", "2", path, "--data", data, "--out", out]
    tools = {"PORT": str(free_ports(2)[0]), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return start(processes, log, [*script, *more], **tools)


def assert_trained_as_one(process, log, out, alone):
    assert process.wait(500) == 0, log.read_text("utf-8")[-3000:]
    assert "2 replicas on 2 machines" in log.read_text("utf-8")
    assert "epoch" not in (log.parent / "worker1.log").read_text("utf-8")  # the chief alone tells
    expected = state(alone)
    for name, value in state(out).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    histories = [np.genfromtxt(folder / "history.csv", delimiter=",", names=True) for folder in (alone, out)]
    for figure in ("loss", "val_loss", "val_auroc"):
        np.testing.assert_allclose(histories[1][figure], histories[0][figure], rtol=1e-5)


def test_two_workers_train_as_one(tmp_path, tiny_set, processes, small):
    settings, path = small
    log, out = tmp_path / "told.txt", tmp_path / "run"
    one = by_script(processes, log, path, tiny_set, out, "--save-every", "2")
    experiment.train(settings, tiny_set, tmp_path / "alone", write=lambda line: None)
    assert_trained_as_one(one, log, out, tmp_path / "alone")


@pytest.mark.slow
def test_two_workers_go_on_after_a_kill_and_train_as_one(tmp_path, tiny_set, processes, small):
    """SIGKILL behind a checkpoint: the other one ends and says so; both go on to one device's weights."""
    settings, path = small
    out, cluster = tmp_path / "run", {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    logs = [tmp_path / f"{index}.txt" for index in range(2)]
    command = [sys.executable, "-c", LINES, path, tiny_set, out]
    chief, other = (
        start(
            processes,
            log,
            command,
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index, log in enumerate(logs)
    )
    deadline = time.monotonic() + 500
    while not (out / "checkpoint" / "state.npz").is_file():
        assert chief.poll() is None, logs[0].read_text("utf-8")[-3000:]
        assert time.monotonic() < deadline, f"no checkpoint yet: {logs[0].read_text('utf-8')[-3000:]}"
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGKILL)
    experiment.train(settings, tiny_set, tmp_path / "alone", write=lambda line: None)
    assert chief.wait(120) == 1
    assert "worker 0 of 2 has lost another one" in logs[0].read_text("utf-8")
    assert "epoch   2/2" not in logs[0].read_text("utf-8")  # it was killed before the end

    log = tmp_path / "resumed.txt"
    again = by_script(processes, log, path, tiny_set, out, "--resume")
    assert_trained_as_one(again, log, out, tmp_path / "alone")
