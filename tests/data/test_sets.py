"""Public sets: true names in, the papers' tables out, and every missing thing named."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import TREES, picture

from keras_medattn.cli import main
from keras_medattn.data import manifest, sets, splits
from keras_medattn.data.manifest import ManifestError, patients_on_two_sides
from keras_medattn.data.sets import common, idrid, ucsb


@pytest.fixture
def tree(tmp_path):
    return lambda name: TREES[name](tmp_path / "set")


@pytest.mark.parametrize("name", sorted(sets.SETS))
def test_every_set_loads_splits_and_checks(name, tree, tmp_path, capsys):
    root = tree(name)
    table = sets.load(name, root, tmp_path / "out")
    assert all(path.is_file() for path in table.paths)
    assert set(table.labels.tolist()) == set(range(len(table.class_names)))
    split = splits.with_splits(table, seed=0)
    assert patients_on_two_sides(split) == []
    splits.write(split, tmp_path / "split.csv")
    assert manifest.load(tmp_path / "split.csv", split.class_names).columns == table.columns
    assert main(["check", str(root), "--set", name]) == 0
    printed = capsys.readouterr().out
    assert f"images    {len(table)}" in printed
    assert f"the set as published has {sets.SETS[name].images}" in printed


def test_no_set_is_written_into_its_own_folder(tree, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tree("idrid_edema").rglob("*")}
    sets.load("idrid_edema", tmp_path / "set", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before


def test_unknown_names_and_folders():
    with pytest.raises(ManifestError, match=r"choose from \['bach', 'breakhis', .*Received: 'breakhist'"):
        sets.find("breakhist", ".")
    for name in sets.SETS:
        with pytest.raises(ManifestError, match="nowhere: no such folder"):
            sets.find(name, "nowhere")


@pytest.mark.parametrize("name", sorted(sets.SETS))
def test_an_empty_folder_is_said_to_lack_what_the_set_holds(name, tmp_path):
    with pytest.raises(ManifestError, match=str(tmp_path)):
        sets.find(name, tmp_path)


class TestBreakHis:
    def test_names_tell_patient_magnification_and_subtype(self, tree):
        found = sets.find("breakhis", tree("breakhis"))
        table = found.manifest
        assert found.problems == ()
        assert table.class_names == ("benign", "malignant")
        assert len(table) == 4 * 25
        assert len(set(table.patients)) == 25
        assert Counter(table.columns["magnification"]) == {"40": 25, "100": 25, "200": 25, "400": 25}
        place = next(i for i, name in enumerate(table.names) if "SOB_B_F-14-2010-" in name)
        assert table.patients[place] == "14-2010"
        assert table.columns["subtype"][place] == "fibroadenoma"
        assert table.labels[place] == 0

    def test_the_patient_who_stands_twice_stands_once(self, tree):
        found = sets.find("breakhis", tree("breakhis"))
        his = [i for i, patient in enumerate(found.manifest.patients) if patient == "14-13412"]
        assert {found.manifest.columns["subtype"][i] for i in his} == {"lobular_carcinoma"}
        assert any("4 images SOB_M_DC-14-13412-*.png are left out" in note for note in found.notes)
        assert [patients_on_two_sides(found.manifest, sides) for sides in found.manifest.folds] == [[]] * 5

    def test_folds_of_lists_and_of_folders_are_the_same(self, tree):
        root = tree("breakhis")
        listed = sets.find("breakhis", root).manifest
        for fold in range(1, 6):
            for line in (root / f"dsfold{fold}.txt").read_text().splitlines():
                name, magnification, _, side = line.split("|")
                copy = root / f"fold{fold}" / side / f"{magnification}X" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.touch()
            (root / f"dsfold{fold}.txt").unlink()
        again = sets.find("breakhis", root).manifest
        assert again.folds == listed.folds
        assert again.names == listed.names
        first = splits.fold_splits(listed, 5, 0, seed=0)
        held = {Path(name).name for name in first.split("test").names}
        there = {path.name for path in root.glob("fold1/test/*/*.png")}
        assert held == {name for name in there if not name.startswith("SOB_M_DC-14-13412")}
        shutil.rmtree(root / "fold3")
        assert sets.find("breakhis", root).problems == ("fold 3 of the given folds is missing",)

    def test_without_lists_folds_are_drawn(self, tree):
        root = tree("breakhis")
        for path in root.glob("dsfold*.txt"):
            path.unlink()
        found = sets.find("breakhis", root)
        assert found.manifest.folds is None
        assert any("folds are drawn by patient" in note for note in found.notes)

    def test_faults_are_named(self, tree, tmp_path, capsys):
        root = tree("breakhis")
        breast = root / "BreaKHis_v1/histology_slides/breast"
        [gone] = breast.rglob("SOB_B_A-14-2000-40-001.png")
        gone.unlink()
        picture(breast / "benign" / "SOB_B_A-14-1-50-001.png", 0, 0)
        picture(breast / "benign" / "SOB_M_DC-14-1-40-001.png", 0, 0)
        with pytest.raises(
            ManifestError, match="fold 1 names 1 images that are missing: SOB_B_A-14-2000-40-001"
        ):
            sets.load("breakhis", root, tmp_path)
        assert main(["check", str(root), "--set", "breakhis"]) == 1
        printed = capsys.readouterr().out
        assert "2 images are ignored, their names are not the set's" in printed
        assert printed.count("problem   fold") == 5
        with (root / "dsfold2.txt").open("a") as file:
            file.write("SOB_B_A-14-2000-40-001.png|40|2|dev\n")
        with pytest.raises(ManifestError, match=r"dsfold2\.txt: line 105 must read name\|magnification"):
            sets.find("breakhis", root)
        shutil.rmtree(breast / "malignant")
        with pytest.raises(ManifestError, match=r"breast: the folders \['malignant'\] are missing"):
            sets.find("breakhis", root)

    def test_any_of_its_folders_may_be_given(self, tree):
        root = tree("breakhis")
        for inner in ("BreaKHis_v1", "BreaKHis_v1/histology_slides/breast"):
            assert len(sets.find("breakhis", root / inner).manifest) == 100


class TestFolders:
    def test_bach_follows_its_table(self, tree):
        root = tree("bach")
        found = sets.find("bach", root)
        assert found.manifest.class_names == ("Normal", "Benign", "InSitu", "Invasive")
        assert Counter(found.manifest.labels.tolist()) == dict.fromkeys(range(4), 10)
        photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
        (photos / "Normal" / "n001.tif").rename(photos / "Benign" / "n001.tif")
        (photos / "InSitu" / "is002.tif").unlink()
        assert sets.find("bach", root).problems == (
            "1 images of microscopy_ground_truth.csv are missing: is002.tif",
            "1 images lie in another class than microscopy_ground_truth.csv says: n001.tif",
        )

    def test_crc_msi_moves_whole_patients(self, tree):
        root = tree("crc_msi")
        table = sets.find("crc_msi", root).manifest
        sides = np.array(table.splits)
        as_distributed = np.array(table.columns["distributed"])
        assert patients_on_two_sides(table) == []
        assert table.class_names == ("MSS", "MSIMUT")
        for label in (0, 1):  # of 51 tiles 2% are 1.02: the patient of one tile moves, those of ten do not
            mine = (table.labels == label) & (as_distributed == "test")
            assert (sides[mine] == "train").sum() == 1
        assert (sides[as_distributed == "train"] == "train").all()
        assert {name.split("/")[0] for name in table.names} == {"CRC_DX_TRAIN", "CRC_DX_TEST"}
        assert "TCGA-AA-3400" in table.patients
        (root / "CRC_DX_TRAIN" / "MSS").rename(root / "CRC_DX_TRAIN_MSS")  # as the archives may unpack
        assert sets.find("crc_msi", root).manifest.splits == table.splits
        shutil.rmtree(root / "CRC_DX_TEST" / "MSIMUT")
        with pytest.raises(ManifestError, match="MSIMUT: no such folder; it holds the class MSIMUT"):
            sets.find("crc_msi", root)

    def test_lymphoma_by_case_and_by_image(self, tree):
        root = tree("lymphoma")
        cases, images = (sets.find(name, root).manifest for name in ("lymphoma", "lymphoma_by_image"))
        assert cases.class_names == ("CLL", "FL", "MCL")
        assert len(set(cases.patients)) == 30
        assert cases.patients[0] == "sj-05-1000"
        assert images.patients is None
        assert images.names == cases.names


class TestIdrid:
    def test_the_lists_of_right_eyes_are_the_papers(self):
        counts = {side: (len(places), max(places)) for side, places in idrid.RIGHT.items()}
        assert counts == {"train": (204, 412), "test": (47, 102)}

    def test_protocol(self, tree, tmp_path):
        root = tree("idrid_edema")
        table = sets.load("idrid_edema", root, tmp_path / "out")
        assert (table.class_names, table.splits.count("train")) == (("0", "1", "2"), 50)
        for place in (0, 1):  # of the training side's first two the first is a right eye
            with Image.open(root / table.names[place].replace(".png", ".jpg")) as image:
                pixels = np.asarray(image.convert("RGB"))[:, 260:3686].astype(np.float64)
            expected = np.rint(area(pixels, 224))
            expected = expected[:, ::-1] if place == 0 else expected
            with Image.open(table.paths[place]) as image:
                written = np.asarray(image).astype(np.float64)
            assert np.abs(written - expected).max() <= 1  # float32 sums, rounded
            assert np.abs(written - expected[:, ::-1]).max() > 5
        before = table.paths[0].stat().st_mtime_ns
        again = sets.load("idrid_retinopathy", root, tmp_path / "out")  # the same pixels serve both tasks
        assert again.paths == table.paths
        assert again.paths[0].stat().st_mtime_ns == before
        assert again.labels.tolist() == [int(grade) for grade in table.columns["retinopathy"]]

    def test_referable_reads_the_images_as_they_are(self, tree, tmp_path):
        table = sets.load("idrid_referable", tree("idrid_referable"), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        grades = np.array(table.columns["retinopathy"]).astype(int)
        np.testing.assert_array_equal(table.labels, grades >= 2)
        assert table.paths[0].suffix == ".jpg"

    def test_what_the_label_file_names_must_be_there(self, tree, tmp_path, capsys):
        root = tree("idrid_edema")
        images = root / "B. Disease Grading" / "1. Original Images" / "a. Training Set"
        for number in (3, 7):
            (images / f"IDRiD_{number:03d}.jpg").unlink()
        picture(images / "IDRiD_400.jpg", 0, 0)
        words = "2 of 50 images that .* names are missing in 'a. Training Set': IDRiD_003, IDRiD_007"
        with pytest.raises(ManifestError, match=words):
            sets.load("idrid_edema", root, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert main(["check", str(root), "--set", "idrid_edema"]) == 1
        assert "1 images are ignored" in capsys.readouterr().out

    @pytest.mark.parametrize("row", ["IDRiD_001,5,0", "IDRiD_001,,0", "IDRiD_001,1,12", "../IDRiD_001,1,1"])
    def test_rows_that_are_none(self, tree, row):
        root = tree("idrid_edema")
        path = root / "B. Disease Grading" / "2. Groundtruths" / idrid.SIDES["train"][1]
        path.write_text(f"Image name,Retinopathy grade,Risk of macular edema \n{row}\n")
        with pytest.raises(ManifestError, match=r"Training Labels\.csv: a row needs IDRiD_NNN"):
            sets.find("idrid_edema", root)

    def test_another_width_is_refused(self, tree, tmp_path):
        root = tree("idrid_edema")
        [path] = root.rglob("*/a. Training Set/IDRiD_001.jpg")
        picture(path, 0, 0, (2144, 16))
        with pytest.raises(ManifestError, match=r"IDRiD_001\.jpg: .* 4288 columns wide.*Received: 2144"):
            sets.load("idrid_edema", root, tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*IDRiD_001*"))

    def test_flips_agree_with_the_optic_discs(self):
        """Seen from the front, a right eye's disc lies to the right: known from masks of the real set."""
        folder = os.environ.get("IDRID")
        if not folder:
            pytest.skip("set IDRID to a folder with `lesion_masks/SPLIT_IDRiD_NNN_OD.png` of the real set")
        discs = sorted((Path(folder) / "lesion_masks").glob("*_OD.png"))
        assert len(discs) >= 10
        for path in discs:
            with Image.open(path) as image:
                columns = np.flatnonzero(np.asarray(image).any(axis=0))
            side, name = path.stem.split("_", 1)
            assert (columns.mean() > idrid.WIDTH / 2) == idrid.flipped(side, name), path.name


class TestJaffe:
    def test_the_largest_rating_is_the_label(self, tree, tmp_path):
        root = tree("jaffe")
        table = sets.load("jaffe", root, tmp_path / "out")
        assert table.class_names == ("HAP", "SAD", "SUR", "ANG", "DIS", "FEA")
        assert len(set(table.patients)) == 10
        poses = {"HA": 0, "SA": 1, "SU": 2, "AN": 3, "DI": 4, "FE": 5}
        for name, label, person in zip(table.names, table.labels, table.patients, strict=True):
            stem = Path(name).name
            assert (stem[:2], poses[stem[3:5]]) == (person, label)
        with Image.open(table.paths[0]) as image:
            assert image.size == (224, 224)

    def test_ties_slips_and_what_is_not_there(self, tree):
        root = tree("jaffe")
        readme = root / "README_FIRST.txt"
        text = readme.read_text()
        text = text.replace("1 4.50 1.60", "1 4.50 4.50", 1)  # KA-HA1: two largest
        text = text.replace(
            "60 1.50 1.60 1.70 1.80 1.90 4.50 YM-FE1", "60 1.50 1.60 1.70 1.80 1.90 4.50 YN-FE1"
        )
        text = text.replace(" KL-HA1", " KL-HA9", 1)  # neither by name nor by number and pose
        readme.write_text(text)
        (root / "jaffe" / "copy of KA.HA1.1.tiff").write_bytes(b"")
        found = sets.find("jaffe", root)
        assert len(found.manifest) == 59
        assert found.manifest.labels[found.manifest.names.index("jaffe/KA.HA1.1.tiff")] == 0
        assert found.manifest.names[-1] == "jaffe/YM.SU1.57.tiff"
        assert any("1 images have two largest ratings" in note for note in found.notes)
        assert any("YN-FE1 for YM.FE1.60.tiff" in note for note in found.notes)
        assert any("2 images are ignored" in note and "KL.HA1.7.tiff" in note for note in found.notes)
        assert found.problems == ("1 rated images are missing: KL-HA9",)
        readme.unlink()
        with pytest.raises(ManifestError, match=r"expected one text file with the semantic ratings"):
            sets.find("jaffe", root)


def area(pixels: np.ndarray, size: int) -> np.ndarray:
    """Mean over exact areas, by overlaps of intervals in float64."""

    def overlaps(count):
        edges = np.arange(size + 1) * count / size
        low, high = (
            np.maximum(edges[:-1, None], np.arange(count)),
            np.minimum(edges[1:, None], np.arange(count) + 1),
        )
        return np.clip(high - low, 0, None) * size / count  # (size, count)

    rows, columns = overlaps(pixels.shape[0]), overlaps(pixels.shape[1])
    return np.einsum("ih,hwc,jw->ijc", rows, pixels, columns, optimize=True)


@pytest.mark.parametrize(("rows", "columns", "size"), [(13, 31, 5), (224, 256, 224), (16, 100, 24)])
def test_shrink_is_the_exact_area_mean(rows, columns, size):
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, columns, 3), np.uint8)
    expected = area(pixels.astype(np.float64), size)
    assert np.abs(common.shrink(pixels, size) - expected).max() <= 0.5 + 1e-3


def test_bags_of_a_csv(tmp_path):
    path = tmp_path / "bags.csv"
    path.write_text("1,2,.5,1\n0,1,3,4\n1,2,7,8\n")
    bags, labels = ucsb.bags(path)
    assert [bag.tolist() for bag in bags] == [[[3, 4]], [[0.5, 1], [7, 8]]]
    assert labels.tolist() == [0, 1]
    for text, words in (
        ("1,2,3\n0,2,4\n", r"a bag has one label\. These have two: \[2\]"),
        ("1,2\n", "rows must be finite numbers"),
        ("1,2,nan\n", "rows must be finite numbers"),
        ("label,bag,x\n", "not a CSV of numbers"),
    ):
        path.write_text(text)
        with pytest.raises(ManifestError, match=words):
            ucsb.bags(path)
