"""Semi-synthetic views: the seed fixes them, and only those with lesions have masks."""

import numpy as np
import pytest
from PIL import Image

from keras_medattn.data import manifest, semi_synthetic
from keras_medattn.data.semi_synthetic import Lesions, view

pytest.importorskip("skimage", reason="scikit-image brings the photograph: the extra [demo]")


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return semi_synthetic.make(folder, train=4, val=2, test=2, size=256, seed=3)


def test_the_table_and_the_masks(views):
    table = manifest.load(views, semi_synthetic.CLASSES)
    assert table.splits == ("train",) * 4 + ("val",) * 2 + ("test",) * 2
    assert table.labels.tolist() == [0, 1] * 4
    for path, label in zip(table.paths, table.labels, strict=True):
        mask = path.parent.parent / "masks" / f"{path.stem}.png"
        assert mask.is_file() == bool(label)
        with Image.open(path) as image:
            assert image.size == (256, 256)
        if label:
            with Image.open(mask) as drawn:
                assert drawn.size == (256, 256)
                assert 0 < np.asarray(drawn).astype(bool).mean() < 0.05


def test_the_same_seed_gives_the_same_bytes(views, tmp_path):
    def content(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    again = semi_synthetic.make(tmp_path / "again", train=4, val=2, test=2, size=256, seed=3)
    other = semi_synthetic.make(tmp_path / "other", train=4, val=2, test=2, size=256, seed=4)
    assert content(views.parent) == content(again.parent)
    assert content(other.parent)["images/train_0000.jpg"] != content(again.parent)["images/train_0000.jpg"]


def test_sides_come_from_disjoint_halves():
    photograph = np.zeros((800, 1000, 3), np.uint8)
    photograph[:, :500] = (200, 100, 0)  # no blue on the left,
    photograph[:, 500:] = (0, 100, 200)  # no red on the right
    for seed in range(6):
        for right, absent, present in ((False, 2, 0), (True, 0, 2)):
            image, _ = view(photograph, right, False, 128, Lesions(), np.random.default_rng(seed))
            assert image[..., absent].max() < 6 * semi_synthetic.NOISE[1]
            assert image[..., present].mean() > 100


def test_lesions_darken_their_places_and_nothing_else():
    photograph = np.full((800, 1000, 3), 150, np.uint8)
    ill, mask = view(photograph, False, True, 128, Lesions(), np.random.default_rng(0))
    well, none = view(photograph, False, False, 128, Lesions(), np.random.default_rng(0))
    assert mask.any()
    assert not none.any()
    change = ill.astype(float)[..., 1] - well[..., 1]
    assert change[mask].mean() < -10
    assert abs(np.median(change[~mask])) < 2
