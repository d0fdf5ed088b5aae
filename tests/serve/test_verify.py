"""The check of a server's numbers, as a user runs it: the script, in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_medattn.serve import Server

SCRIPT = Path(__file__).resolve().parents[2] / "serving" / "verify.sh"


@pytest.fixture(scope="module")
def served(tiny_export):
    """The folder of exported models, and their server."""
    folder = tiny_export[0].parent.parent
    server = Server(folder, port=0, rest_port=0)
    server.start()
    yield folder, (f"127.0.0.1:{server.port}", str(server.rest_port))
    assert server.stop()


def run(folder, address: str, *rest: str) -> subprocess.CompletedProcess:
    command, own = [SCRIPT, address, *rest, "--models", folder], {"PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=own)


def test_known_answers_are_keras_answers_to_drawn_images(tiny_export, tiny_run):
    folder = tiny_export[0] / "assets.extra" / "verify"
    known = json.loads((folder / "answers.json").read_text())
    assert known["tolerance"] == 1e-4
    assert sorted(known["probabilities"]) == ["disc.jpg", "ramp.png", "waves.bmp"]
    for name, probabilities in known["probabilities"].items():
        pixels = np.asarray(Image.open(folder / name))
        assert pixels.shape == (60, 84, 3)
        sized = tf.image.resize(pixels, (64, 80), antialias=True)
        scores = tiny_run.model()(tf.cast(tf.round(sized), tf.uint8)[None], training=False)
        np.testing.assert_allclose(probabilities, tf.nn.softmax(scores)[0], atol=1e-5)


def test_every_signature_by_grpc_and_rest(served):
    folder, server = served
    done = run(folder, *server)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    signatures = ("serving_default", "tensor", "explain")
    assert {tuple(row[:5]) for row in rows} == {
        ("tiny", "4", signature, door, batch)
        for signature in signatures
        for door in ("gRPC", "REST")
        for batch in ("1", "3")
    }
    assert all(float(row[5]) <= 1e-4 and row[6:] == ["ok"] for row in rows)
    assert done.stdout.splitlines()[-1] == "all 24 checks hold"


def test_a_server_of_other_numbers_fails(served, tmp_path):
    folder, server = served
    shutil.copytree(folder, tmp_path / "models")
    path = tmp_path / "models" / "tiny" / "4" / "assets.extra" / "verify" / "answers.json"
    known = json.loads(path.read_text())
    known["probabilities"]["ramp.png"][0] += 3e-4
    path.write_text(json.dumps(known))
    shutil.copytree(folder / "tiny", tmp_path / "models" / "other")
    done = run(tmp_path / "models", *server)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.endswith("more than 0.0001")]
    # alone and among the three, of three signatures, by two doors; and a model that is not served, by two
    assert len(wrong) == 12
    assert done.stdout.count("serves no model 'other'") == 2
    assert done.stdout.splitlines()[-1] == "14 of 26 checks failed"


def test_without_models_or_a_server(served, tmp_path):
    folder, server = served
    done = run(tmp_path, *server)
    assert (done.returncode, "Expected NAME/VERSION/saved_model.pb" in done.stderr) == (1, True)
    done = run(folder, "127.0.0.1:1")
    assert (done.returncode, "No server answers at 127.0.0.1:1" in done.stdout) == (1, True)
