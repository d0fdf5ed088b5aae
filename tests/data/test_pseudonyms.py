"""Ids in place of names: a keyed hash, the same in all that is written of a run."""

import csv
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from keras_medattn import cli
from keras_medattn.data.manifest import Manifest
from keras_medattn.data.pseudonyms import Pseudonyms
from keras_medattn.files import read_json


def test_ids_are_a_keyed_hash(tmp_path):
    ids = Pseudonyms(tmp_path)
    path = tmp_path / "pseudonyms.key"
    assert path.stat().st_mode & 0o777 == 0o600
    key = bytes.fromhex(path.read_text()).ljust(64, b"\0")  # RFC 2104, blocks of 64 bytes
    inner, outer = bytes(one ^ 0x36 for one in key), bytes(one ^ 0x5C for one in key)
    for name in ("a.png", "größe/b.png"):
        assert ids(name) == sha256(outer + sha256(inner + name.encode()).digest()).hexdigest()[:16]
    assert Pseudonyms(tmp_path)("a.png") == ids("a.png")
    (tmp_path / "other").mkdir()
    assert Pseudonyms(tmp_path / "other")("a.png") != ids("a.png")


@pytest.mark.parametrize("patients", [("ann", "ann", "bob"), None])
def test_a_table_keeps_who_belongs_together_and_nothing_that_names(tmp_path, patients):
    labels, columns = np.array([0, 1, 1]), {"surname": ("x", "x", "y")}
    table = Manifest(Path("/ward/7"), ("a", "b", "c"), labels, ("no", "yes"), patients, columns=columns)
    made = Pseudonyms(tmp_path).table(table)
    assert len(set(made.names)) == 3
    assert made.columns == {}
    assert "ward" not in str(made.root)
    np.testing.assert_array_equal(made.labels, labels)
    if patients is None:
        assert made.patients is None
    else:
        assert [one == made.patients[0] for one in made.patients] == [True, True, False]
        assert not set(made.patients) & set(patients)


def test_the_command_writes_ids_alone(tiny_run, tmp_path):
    run, test = str(tiny_run.folder), tiny_run.manifest.split("test")
    for command in (["evaluate", run], ["explain", run, "--split", "test", "--most", "2"]):
        assert cli.main([*command, "--pseudonymise", "--out", str(tmp_path / command[0])]) == 0
    with open(tmp_path / "evaluate" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ids = Pseudonyms(tiny_run.folder)
    assert [row["path"] for row in rows] == [ids(name) for name in test.names]
    assert [row["patient"] for row in rows] == [ids(name) for name in test.patients]
    assert [row["label"] for row in rows] == [test.class_names[label] for label in test.labels]
    records = read_json(tmp_path / "explain" / "explanations.json")
    assert [record["image"] for record in records] == [ids(name) for name in test.names[:2]]
    files = {path.name for path in (tmp_path / "explain").iterdir()}
    assert {record["overlay"] for record in records} < files  # without a folder
    named = [path.stem for path in test.paths]
    assert not [name for name in files for stem in named if f"-{stem}." in name]
    for path in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.csv")):
        text = path.read_text()
        assert not [name for name in (*test.names, str(test.root)) if name in text], path
