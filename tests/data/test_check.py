"""`check` reports all that is wrong with a set, and nothing that is not."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from keras_medattn.data import check, manifest
from keras_medattn.data.check import text


@pytest.fixture
def build(tmp_path):
    """`build({name: bytes or Image or None}, [rows])` -> the manifest of a CSV."""

    def make(files, rows, columns="path,label,patient,split"):
        for name, content in files.items():
            path = tmp_path / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content.save(path)
        (tmp_path / "set.csv").write_text("\n".join([columns, *rows]) + "\n")
        return manifest.load(tmp_path / "set.csv")

    return make


def noise(seed, shape=(20, 24, 3)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def test_a_clean_set(build):
    files = {f"{i}.png": noise(i) for i in range(6)}
    sides = ["train", "train", "val", "val", "test", "test"]
    found = check.check(build(files, [f"{i}.png,{'ab'[i % 2]},p{i},{sides[i]}" for i in range(6)]))
    assert found.ok
    assert found.problems == []
    assert found.warnings == []
    assert found.images == 6
    assert found.patients == 6
    assert found.classes == {"a": 3, "b": 3}
    assert found.splits == {side: {"a": 1, "b": 1} for side in ("train", "val", "test")}
    assert found.sizes == {"24 x 20": 6}
    assert found.kinds == {"png 8 bit RGB": 6}
    assert found.proposed_window is None
    assert text(found).splitlines()[-1] == "ok: nothing stands in the way of training"
    assert "classes   a: 3, b: 3" in text(found)


def test_all_unreadable_files_are_named(build, encode, png):
    whole = encode(noise(0), "JPEG")
    files = {
        "good.png": noise(1),
        "cut.jpg": whole[:-20],
        "empty.png": b"",
        "text.png": b"a text\n",
        "bomb.png": png(20000, 10000, 1, 0, b""),
        "broken.tif": encode(noise(2), "TIFF")[:300],
    }
    bad = [*list(files)[1:], "absent.png"]
    found = check.check(
        build(files, [f"{name},{'ab'[i % 2]},p{i},train" for i, name in enumerate([*files, "absent.png"])])
    )
    assert not found.ok
    assert len(found.problems) == len(bad)
    for name, words in zip(
        bad,
        ["truncated", "0 bytes", "not an image", "200,000,000 pixels", "TIFF", "No such file"],
        strict=True,
    ):
        assert [problem for problem in found.problems if f"/{name}: " in problem and words in problem], name
    assert text(found).splitlines()[-1] == "6 problems"
    assert text(found).count("problem   ") == 6


def test_max_pixels_is_passed_on(build):
    table = build({"a.png": noise(0), "b.png": noise(1)}, ["a.png,a,p,train", "b.png,b,q,train"])
    assert check.check(table, max_pixels=480).ok
    assert len(check.check(table, max_pixels=479).problems) == 2


def test_duplicates_by_content(build, encode):
    one, two, three = noise(1), noise(2), noise(3).convert("L")
    files = {
        "one.png": one,
        "again.bmp": one,  # the same pixels in another file, on another side
        "once more.tif": one,
        "two.png": two,
        "two too.png": encode(two, "PNG", compress_level=1),  # another label
        "grey.png": three,
        "grey.bmp": three.convert("RGB"),  # on the same side with the same label
        "rest.png": noise(4),
    }
    rows = [
        "one.png,a,p1,train",
        "again.bmp,a,p2,test",
        "once more.tif,a,p3,train",
        "two.png,a,p4,train",
        "two too.png,b,p5,train",
        "grey.png,b,p6,train",
        "grey.bmp,b,p6,train",
        "rest.png,b,p7,test",
    ]
    found = check.check(build(files, rows))
    assert sorted(found.problems) == [
        "the same pixels carry different labels: two.png, two too.png",
        "the same pixels stand in more than one split: one.png, again.bmp, once more.tif",
    ]
    assert found.warnings == ["the same pixels stand more than once: grey.png, grey.bmp"]


def test_patients(build):
    files = {f"{i}.png": noise(i) for i in range(4)}
    found = check.check(
        build(files, ["0.png,a,ann,train", "1.png,b,ann,test", "2.png,a,bob,train", "3.png,b,bob,train"])
    )
    assert found.problems == ["patient ann stands in more than one split"]
    assert found.patients == 2
    found = check.check(build(files, [f"{i}.png,{'ab'[i % 2]}" for i in range(4)], "path,label"))
    assert found.ok
    assert found.patients is None
    assert [warning for warning in found.warnings if warning.startswith("no patients are named")]
    assert "patients  unknown" in text(found)


def test_warnings(build, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(90).save(tmp_path / "turned.jpg", exif=exif)
    noise(91).save(tmp_path.parent / "outside.png")
    files = {f"{i}.png": noise(i) for i in range(24)} | {"wide.png": noise(50, (20, 60, 3))}
    rows = [f"{name},a,p{i},train" for i, name in enumerate(files)]
    found = check.check(build(files, [*rows, "turned.jpg,b,q,train", "../outside.png,b,r,train"]))
    assert found.ok
    heads = ["1 images carry an EXIF rotation", "1 paths lead out of", "aspect ratios differ (1.2 to 3.0)"]
    heads.append("classes are out of balance: {'a': 25, 'b': 2}")
    for head, warning in zip(heads, found.warnings, strict=True):
        assert warning.startswith(head)
    assert found.warnings[0].endswith(": turned.jpg")
    assert found.warnings[1].endswith(": ../outside.png")


def test_a_class_without_images_is_counted(build, tmp_path):
    build({"a.png": noise(0), "b.png": noise(1)}, ["a.png,a,p,train", "b.png,b,q,train"])
    found = check.check(manifest.load(tmp_path / "set.csv", ["b", "a", "never"]))
    assert found.classes == {"b": 1, "a": 1, "never": 0}
    assert found.warnings == [
        "classes are out of balance: {'b': 1, 'a': 1, 'never': 0}. See train.class_weights"
    ]


def test_deep_images_need_a_window_and_one_is_proposed(build, tmp_path):
    rng = np.random.default_rng(0)
    dark = [rng.integers(100, 140, (30, 30, 1), np.uint16) for _ in range(3)]
    alpha = np.full((30, 30, 1), 65535, np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", dark[1][..., 0])
    files = {
        "a.png": tf.io.encode_png(dark[0]).numpy(),
        "c.png": tf.io.encode_png(np.concatenate([dark[2], alpha], axis=-1)).numpy(),
    }
    table = build(files, ["a.png,x,p,train", "b.tif,y,q,train", "c.png,x,r,test"])
    found = check.check(table)
    assert len(found.problems) == 1  # not "the same pixels", though 100 to 140 are all 0 in 8 bits
    assert found.problems[0].startswith("3 images have 16 bits and no intensity window is set: ")
    low, high = found.proposed_window
    assert 100 <= low < 102  # of what was measured, not of the alpha channel
    assert 137 < high <= 140
    assert f"window = [{low}, {high}]" in found.problems[0]
    assert check.check(table, window=(low, high)).ok


def test_duplicates_among_deep_images(build, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 9, 1), np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", values[..., 0])
    table = build({"a.png": tf.io.encode_png(values).numpy()}, ["a.png,x,p,train", "b.tif,y,q,train"])
    for window in (None, (0.0, 65535.0)):
        problems = check.check(table, window).problems
        assert "the same pixels carry different labels: a.png, b.tif" in problems


def test_json_round_trip_and_progress(build):
    table = build({"a.png": noise(0), "b.png": b""}, ["a.png,a,p,train", "b.png,b,q,test"])
    seen = []

    def progress(items, total):
        for item in items:
            seen.append(total)
            yield item

    found = check.check(table, progress=progress)
    assert seen == [2, 2]
    values = json.loads(json.dumps(found.to_dict()))
    assert values.pop("ok") is False
    assert check.Report(**values) == found


def test_given_folds_are_shown_and_patients_on_two_of_their_sides_named(build):
    files = {f"{i}.png": noise(i) for i in range(4)}
    rows = ["0.png,a,ann,test,train", "1.png,b,ann,train,train", "2.png,a,bob,train,test"]
    rows.append("3.png,b,cat,test,test")
    found = check.check(build(files, rows, "path,label,patient,fold1,fold2"))
    assert found.problems == ["patient ann stands on more than one side of fold 1"]
    assert found.folds[1] == {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
    assert "fold 1    test: {'a': 1, 'b': 1}" in text(found).splitlines()
