"""Which mask belongs to which image, and of which kind."""

import re

import numpy as np
import pytest
from PIL import Image

from keras_medattn.explain.truth import TruthError, load_truth


def write_mask(path, *places, size=(6, 8)):
    mask = np.zeros(size, np.uint8)
    for place in places:
        mask[place] = 255
    Image.fromarray(mask).save(path)
    return path


def marked(truth) -> list[tuple[int, int]]:
    assert truth.dtype == bool
    return [(int(row), int(column)) for row, column in np.argwhere(truth)]


@pytest.fixture
def images(tmp_path):
    """The same names in two folders, as some sets number their training and their test images."""
    return [tmp_path / folder / "IDRiD_007.jpg" for folder in ("a. Training Set", "b. Testing Set")]


@pytest.fixture
def masks(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    write_mask(folder / "train_IDRiD_007_MA.png", (0, 1))
    write_mask(folder / "train_IDRiD_007_HE.png", (2, 3))
    write_mask(folder / "test_IDRiD_007_HE.png", (4, 5))
    write_mask(folder / "train_IDRiD_008_SE.png", (5, 5))
    return folder


def test_kinds_are_united_in_each_folder(images, masks):
    train, test = load_truth(masks, images)
    assert marked(train) == [(0, 1), (2, 3)]
    assert marked(test) == [(4, 5)]
    train, test = load_truth(masks, images, ["MA"])
    assert marked(train) == [(0, 1)]
    assert test is None


def test_the_longest_name_is_meant(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    write_mask(folder / "train_7.png", (0, 0))  # the image train_7, not kind "" of train/7
    write_mask(folder / "7.png", (1, 1))
    write_mask(folder / "7_MA.png", (2, 2))
    write_mask(folder / "7_MA_OLD.png", (3, 3))  # neither 7 nor of one kind
    paths = [tmp_path / "train" / "train_7.jpg", tmp_path / "train" / "7.jpg", tmp_path / "train" / "9.jpg"]
    first, second, none = load_truth(folder, paths)
    assert marked(first) == [(0, 0)]
    assert marked(second) == [(1, 1), (2, 2)]
    assert none is None


def test_an_image_of_several_folds_is_one(images, masks):
    assert [marked(truth) for truth in load_truth(masks, [images[1]] * 2)] == [[(4, 5)]] * 2


def test_a_blank_mask_marks_nothing(tmp_path, images, masks):
    write_mask(masks / "train_IDRiD_007_EX.png")
    with pytest.raises(TruthError, match=r"marks none of the 1 images"):
        load_truth(masks, images[:1], ["EX"])


def test_a_large_mask_is_shrunk_and_loses_no_dot(tmp_path):
    write_mask(tmp_path / "a.png", (0, 0), (1199, 1599), (1601, 3), size=(2400, 3200))
    [truth] = load_truth(tmp_path, [tmp_path / "a.jpg"])
    assert truth.shape == (1200, 1600)
    assert marked(truth) == [(0, 0), (599, 799), (800, 1)]
    [whole] = load_truth(tmp_path, [tmp_path / "a.jpg"], side=3200)
    assert marked(whole) == [(0, 0), (1199, 1599), (1601, 3)]


def test_boxes_of_some_classes(tmp_path):
    table = tmp_path / "boxes.csv"
    table.write_text(
        "path,xmin,ymin,xmax,ymax,class\nx/a.jpg,1,2,3,4,MA\na.jpg,5,6,7,8,HE\nb.jpg,0,0,2,2,OD\n"
    )
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    first, second = load_truth(table, paths, ["MA", "HE"])
    np.testing.assert_array_equal(first, [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert second is None
    assert all(truth is not None for truth in load_truth(table, paths))
    with pytest.raises(TruthError, match=r"marks no EX on these images\. It has: HE, MA, OD"):
        load_truth(table, paths, ["EX"])


def test_faults_are_named(tmp_path, images, masks):
    with pytest.raises(TruthError, match=r"marks no EX on these images\. It has: HE, MA"):
        load_truth(masks, images, ["EX"])
    both = write_mask(masks / "IDRiD_007.png", (0, 0))
    with pytest.raises(TruthError, match=re.escape(f"{both}: could be of 2 images")):
        load_truth(masks, images)
    both.unlink()
    other = write_mask(masks / "train_IDRiD_007_OD.png", (0, 0), size=(5, 5))
    with pytest.raises(TruthError, match=re.escape(f"{other}: (5, 5) pixels, but ")):
        load_truth(masks, images)
    other.write_bytes(b"no image")
    with pytest.raises(TruthError, match=re.escape(f"{other}: cannot be read as a mask")):
        load_truth(masks, images)
    with pytest.raises(TruthError, match="no such folder of masks"):
        load_truth(tmp_path / "nothing", images)
