"""Splits: stratified, by patient, and a function of the seed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keras_medattn.data import manifest, splits
from keras_medattn.data.manifest import Manifest, ManifestError, patients_on_two_sides


def images(labels, patients=None, sides=None, classes=("a", "b", "c")) -> Manifest:
    labels = np.asarray(labels)
    names = tuple(f"{i}.png" for i in range(len(labels)))
    return Manifest(Path("data"), names, labels, classes[: labels.max() + 1], patients, sides)


def shares(split: Manifest, side: str) -> np.ndarray:
    return np.bincount(split.split(side).labels, minlength=len(split.class_names)) / np.bincount(split.labels)


def test_images_are_stratified():
    labels = np.random.default_rng(0).permutation([0] * 300 + [1] * 60 + [2] * 40)
    split = splits.with_splits(images(labels), seed=1, val=0.2, test=0.25)
    np.testing.assert_allclose(shares(split, "test"), 0.25, atol=0.02)
    np.testing.assert_allclose(shares(split, "val"), 0.75 * 0.2, atol=0.02)
    np.testing.assert_allclose(shares(split, "train"), 0.75 * 0.8, atol=0.02)


def test_same_seed_same_split():
    table = images(np.arange(100) % 2, tuple(f"p{i // 3}" for i in range(100)))
    assert splits.with_splits(table, 5).splits == splits.with_splits(table, 5).splits
    assert splits.with_splits(table, 5).splits != splits.with_splits(table, 6).splits
    assert splits.fold_splits(table, 5, 2, 5).splits == splits.fold_splits(table, 5, 2, 5).splits


@pytest.mark.parametrize("seed", range(25))
def test_patients_stay_together(seed):
    """Random tables: few or many images a patient, patients of one class or of several."""
    rng = np.random.default_rng(seed)
    count, people = int(rng.integers(60, 300)), int(rng.integers(40, 60))
    patient = rng.integers(people, size=count)
    of_patients, of_images = rng.permutation(np.arange(people) % 2), rng.integers(2, size=count)
    labels = of_patients[patient] if seed % 2 else of_images
    table = images(labels, tuple(f"p{i}" for i in patient))

    split = splits.with_splits(table, seed)
    assert patients_on_two_sides(split) == []
    assert set(split.splits) == {"train", "val", "test"}

    dealt = splits.folds(table, 5, seed)
    assert sorted(np.concatenate(dealt)) == list(range(count))
    for fold in range(5):
        one = splits.fold_splits(table, 5, fold, seed)
        assert patients_on_two_sides(one) == []
        assert set(one.splits) == {"train", "val", "test"}
        np.testing.assert_array_equal(np.flatnonzero(np.array(one.splits) == "test"), dealt[fold])


def test_groups_are_stratified_as_well_as_they_can_be():
    patients = np.repeat(np.arange(100), 4)
    labels = (np.arange(100) % 4 == 0).astype(int)[patients]
    split = splits.with_splits(images(labels, tuple(f"p{i}" for i in patients)), seed=0, val=0.2, test=0.2)
    np.testing.assert_allclose(shares(split, "test"), 0.2, atol=0.05)
    np.testing.assert_allclose(shares(split, "val"), 0.16, atol=0.05)


def test_splits_of_the_data_are_kept():
    sides = ("train",) * 40 + ("test",) * 10
    table = images(np.arange(50) % 2, sides=sides)
    split = splits.with_splits(table, seed=0, val=0.25)
    assert split.splits[40:] == ("test",) * 10
    assert split.splits.count("val") == 10  # out of train
    np.testing.assert_allclose(shares(split, "val"), 0.2)
    whole = replace(table, splits=("train",) * 30 + ("val",) * 10 + ("test",) * 10)
    assert splits.with_splits(whole, seed=0).splits == whole.splits


def test_a_patient_on_two_sides_is_named():
    sides = ("train", "train", "train", "val", "test", "test")
    table = images([0, 1, 0, 1, 0, 1], ("ann", "bob", "cat", "dan", "bob", "ann"), sides)
    with pytest.raises(
        ManifestError, match=r"2 patients stand in more than one split.*: ann, bob\. Move each"
    ):
        splits.with_splits(table, seed=0)


def test_too_few_for_the_folds():
    with pytest.raises(ManifestError, match="class 'b' has 4 images, too few for 5 folds"):
        splits.folds(images([0] * 10 + [1] * 4), 5, 0)
    patients = tuple("abcdefghijxxxxyy")
    with pytest.raises(ManifestError, match="class 'b' has 2 patients, too few for 3 folds"):
        splits.folds(images([0] * 10 + [1] * 6, patients), 3, 0)


def test_nothing_to_train_on():
    with pytest.raises(ManifestError, match="no images in the split 'train'"):
        splits.with_splits(images([0, 1, 0, 1], sides=("val", "val", "test", "test")), seed=0)
    with pytest.raises(ManifestError, match="no images in the split 'val'"):
        splits.with_splits(images([0, 1] * 20), seed=0, val=0.0)
    with pytest.raises(ManifestError, match="too few"):
        splits.with_splits(images([0, 1], sides=("test", "test")), seed=0)


def test_a_written_split_reads_back(tmp_path):
    table = images(np.arange(60) % 3, tuple(f"p,{i // 2}" for i in range(60)), classes=("1", "2", "10"))
    split = splits.with_splits(table, seed=3)
    splits.write(split, tmp_path / "split.csv")
    back = manifest.load(tmp_path / "split.csv", split.class_names)
    assert (back.names, back.patients, back.splits) == (split.names, split.patients, split.splits)
    np.testing.assert_array_equal(back.labels, split.labels)


def given() -> Manifest:
    """Forty images of twenty patients, and two folds of which the second has a validation side."""
    people = tuple(f"p{i // 2}" for i in range(40))
    first = ("test",) * 8 + ("train",) * 32
    second = ("train",) * 30 + ("val",) * 4 + ("test",) * 6
    table = images(np.arange(40) // 2 % 2, people)
    return replace(table, folds=(first, second), columns={"zoom": ("40", "100") * 20})


def test_given_folds_are_kept():
    table = given()
    first = splits.fold_splits(table, 2, 0, seed=5, val=0.25)
    assert [side == "test" for side in first.splits] == [side == "test" for side in table.folds[0]]
    assert first.splits.count("val") == 8  # a quarter of the rest, whole patients
    assert patients_on_two_sides(first) == []
    assert splits.fold_splits(table, 2, 0, seed=5, val=0.25).splits == first.splits
    assert splits.fold_splits(table, 2, 1, seed=5).splits == table.folds[1]  # with a side of its own
    with pytest.raises(ManifestError, match=r"gives 2 folds of its own: use as many\. Received: 5"):
        splits.fold_splits(table, 5, 0, seed=0)
    torn = replace(table, folds=(("test",) * 7 + ("train",) * 33,))
    with pytest.raises(ManifestError, match=r"1 patients stand in more than one split.*: p3"):
        splits.fold_splits(torn, 1, 0, seed=0)


def test_folds_and_columns_are_written(tmp_path):
    split = splits.fold_splits(given(), 2, 1, seed=0)
    splits.write(split, tmp_path / "split.csv")
    back = manifest.load(tmp_path / "split.csv")
    assert (back.folds, back.columns, back.splits) == (split.folds, split.columns, split.splits)
