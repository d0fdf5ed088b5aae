"""Tables of images: what is read from folders and CSVs, and every fault by its line."""

from dataclasses import replace

import numpy as np
import pytest

from keras_medattn.data import manifest
from keras_medattn.data.manifest import ManifestError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "set.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_a_folder_a_class(tmp_path):
    touch(
        tmp_path,
        *("10/a.png", "9/b.JPG", "9/deep/c.tiff", "9/notes.txt", "readme.png"),
        *("9/._b.jpg", "9/.ipynb_checkpoints/b.png", ".git/x.png", "empty/.keep"),
    )
    found = manifest.load(tmp_path)
    assert found.names == ("10/a.png", "9/b.JPG", "9/deep/c.tiff")
    assert found.class_names == ("9", "10")  # by value, not as text
    assert found.labels.tolist() == [1, 0, 0]
    assert found.patients is None
    assert found.splits is None
    assert found.paths[2] == tmp_path / "9/deep/c.tiff"


def test_folders_of_splits(tmp_path):
    touch(tmp_path, "Train/ill/a.png", "train/well/b.png", "validation/ill/c.png", "test/well/d.png")
    found = manifest.load(tmp_path, classes=["well", "ill"])
    rows = {
        name: (found.class_names[label], side)
        for name, label, side in zip(found.names, found.labels, found.splits or (), strict=True)
    }
    assert rows == {
        "Train/ill/a.png": ("ill", "train"),
        "train/well/b.png": ("well", "train"),
        "validation/ill/c.png": ("ill", "val"),
        "test/well/d.png": ("well", "test"),
    }
    assert found.class_names == ("well", "ill")
    assert found.split("val").names == ("validation/ill/c.png",)


def test_folders_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ManifestError, match="no images"):
        manifest.load(tmp_path)
    touch(tmp_path, "manifest.csv")
    with pytest.raises(ManifestError, match=r"holds a manifest\.csv: pass that file"):
        manifest.load(tmp_path)
    touch(tmp_path, "a/x.png")
    with pytest.raises(ManifestError, match=r"two classes or more\. Received: \['a'\]"):
        manifest.load(tmp_path)
    with pytest.raises(ManifestError, match="no such folder or CSV"):
        manifest.load(tmp_path / "absent")


def test_a_table_with_byte_order_mark_spaces_and_quotes(tmp_path):
    text = "label , path,patient, split,age\r\nill, a b.png ,p1,Train,3\r\n\r\n"
    text += 'well,"c,d.png",p2, validation ,4\r\n'
    found = manifest.load(table(tmp_path, text, "utf-8-sig"))
    assert found.names == ("a b.png", "c,d.png")
    assert found.root == tmp_path
    assert found.class_names == ("ill", "well")
    assert found.labels.tolist() == [0, 1]
    assert found.patients == ("p1", "p2")
    assert found.splits == ("train", "val")
    assert found.groups.tolist() == ["p1", "p2"]


def test_every_fault_is_named_with_its_line(tmp_path):
    text = (
        "path,label,patient,split\n"
        "a.png,x,p,train\n"
        ",x,p,train\n"
        "\n"
        'b.png,,"p\nq",test\n'
        "c.png,x, ,train\n"
        "d.png,x,p,holdout\n"
        "./a.png,y,p,test\n"
        "e.png,y,p,test,more\n"
        "f.png\n"
    )
    with pytest.raises(ManifestError) as caught:
        manifest.load(table(tmp_path, text))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'set.csv'}: 9 faults:",
        "  line 3: path is empty",
        "  line 6: label is empty",
        "  line 7: patient is empty",
        "  line 8: split must be train, val or test. Received: 'holdout'",
        "  line 9: a.png stands in line 2 already",
        "  line 10: more fields than columns",
        "  line 11: label is empty",
        "  line 11: patient is empty",
        "  line 11: split must be train, val or test. Received: ''",
    ]


def test_of_many_faults_fifty_are_shown(tmp_path):
    with pytest.raises(ManifestError, match="70 faults") as caught:
        manifest.load(table(tmp_path, "path,label\n" + ",x\n" * 70))
    assert len(str(caught.value).splitlines()) == 52
    assert str(caught.value).endswith("... and 20 more")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,class\na,b\n", r"columns \['label'\] are missing\. Received columns: \['path', 'class'\]"),
        (
            "path;label\na;b\n",
            r"columns \['label', 'path'\] are missing\. Received columns: \['path;label'\]",
        ),
        ("path,label,label\na,b,c\n", r"columns \['label'\] stand more than once"),
        ("path,label\n", "1 faults:\n  no rows"),
        ("", "are missing"),
        ("path,label\na,x\nb,x\n", r"two classes or more\. Received: \['x'\]"),
    ],
)
def test_tables_that_are_none(tmp_path, text, words):
    with pytest.raises(ManifestError, match=words):
        manifest.load(table(tmp_path, text))


def test_other_encodings_are_named(tmp_path):
    with pytest.raises(ManifestError, match=r"set\.csv: not a CSV in UTF-8"):
        manifest.load(table(tmp_path, "path,label\nMüller.png,x\n", "latin-1"))
    with pytest.raises(ManifestError, match=r"set\.csv: not a CSV in UTF-8|missing"):
        manifest.load(table(tmp_path, "path,label\na.png,x\n", "utf-16"))


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "-1", "2.5"], ("-1", "2.5", "9", "10")),
        (["1", "01", "1.0"], ("01", "1", "1.0")),  # one value, three names: the text decides
        (["b", "a", "10"], ("10", "a", "b")),
        (["2", "nan", "1"], ("1", "2", "nan")),
        (["inf", "3", "20"], ("20", "3", "inf")),
    ],
)
def test_the_order_of_classes(tmp_path, labels, order):
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    found = manifest.load(table(tmp_path, "path,label\n" + rows))
    assert found.class_names == order
    assert [order[i] for i in found.labels] == labels


def test_classes_that_are_given(tmp_path):
    path = table(tmp_path, "path,label\na,x\nb,y\n")
    assert manifest.load(path, ["y", "z", "x"]).labels.tolist() == [2, 0]
    with pytest.raises(ManifestError, match=r"labels \['y'\] are not among the classes \['x', 'z'\]"):
        manifest.load(path, ["x", "z"])


def test_take_and_split(tmp_path):
    text = "path,label,patient,split\na,x,1,train\nb,y,2,test\nc,x,1,test\n"
    found = manifest.load(table(tmp_path, text))
    some = found.take(np.array([2, 0]))
    assert (some.names, some.labels.tolist(), some.patients, some.splits) == (
        ("c", "a"),
        [0, 0],
        ("1", "1"),
        ("test", "train"),
    )
    assert len(found.take([])) == 0
    assert manifest.patients_on_two_sides(found) == ["1"]
    assert manifest.patients_on_two_sides(some.take([0])) == []
    bare = manifest.load(table(tmp_path, "path,label\na,x\nb,y\n"))
    assert manifest.patients_on_two_sides(bare) == []
    with pytest.raises(ManifestError, match="no splits, so none is called 'val'"):
        bare.split("val")


def test_given_folds_and_further_columns(tmp_path):
    text = "path,fold2,label,zoom,fold1\na,Test,x,40,train\nb,train,y, 100 ,testing\n"
    found = manifest.load(table(tmp_path, text))
    assert found.folds == (("train", "test"), ("test", "train"))
    assert found.columns == {"zoom": ("40", "100")}
    assert found.splits is None
    last = found.take([1])
    assert (last.folds, last.columns) == ((("test",), ("train",)), {"zoom": ("100",)})
    patients = replace(found, patients=("ann", "ann"))
    assert [manifest.patients_on_two_sides(patients, sides) for sides in found.folds] == [["ann"], ["ann"]]
    assert manifest.patients_on_two_sides(patients) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label,fold1,fold3\na,x,train,test\n", r"in a row\. Received: \['fold1', 'fold3'\]"),
        ("path,label,fold1\na,x,2\nb,y,test\n", r"line 2: fold1 must be train, val or test\. Received: '2'"),
    ],
)
def test_folds_that_are_none(tmp_path, text, words):
    with pytest.raises(ManifestError, match=words):
        manifest.load(table(tmp_path, text))
