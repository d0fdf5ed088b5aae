"""The pages that `medattn explain` writes: what stands on them, and where."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_medattn import models
from keras_medattn.explain import figures
from keras_medattn.explain.pages import Cell, Row, page
from keras_medattn.explain.report import Finding
from keras_medattn.metrics import plots

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)


def finding(boxes=(), weights=(), **named) -> Finding:
    boxes = np.array(boxes, float).reshape(-1, 4)
    shares = np.array([0.3, 0.7])
    return Finding(Path("a.png"), shares, 1, RNG.random((3, 4)), (60, 80), boxes, np.array(weights), named)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, which are saved all the same."""
    made, save = [], plots.save_figure
    monkeypatch.setattr(
        "keras_medattn.explain.pages.save_figure",
        lambda figure, path: (made.append(figure), save(figure, path)),
    )
    return made


def titles(rows) -> list[str]:
    return [cell.title for row in rows for cell in row.cells]


def test_a_page_shows_images_maps_and_their_numbers(drawn, tmp_path):
    ramp = np.linspace(-0.5, 1.5, 12).reshape(3, 4)
    row = Row(
        [Cell(IMAGE, "image"), Cell(ramp, "map", aspect=0.75), Cell(np.zeros((2, 2)), "flat")], "heading"
    )
    page([row, Row([Cell(IMAGE)], columns=2)], tmp_path / "page.png")
    [figure] = drawn
    axes = [one for one in figure.axes if one.get_images()]
    assert [one.get_title(loc="left") for one in axes] == ["image", "map", "flat", ""]
    np.testing.assert_array_equal(axes[0].get_images()[0].get_array(), IMAGE)
    np.testing.assert_array_equal(axes[1].get_images()[0].get_array(), ramp)
    bars = [[text.get_text() for text in one.child_axes[0].get_yticklabels()] for one in axes[1:3]]
    assert bars == [["-0.5", "0.5", "1.5"], ["0"]]
    lefts = [one.get_position().x0 for one in axes]
    assert lefts[0] < lefts[1] < lefts[2]
    assert axes[0].get_position().y0 > axes[3].get_position().y1  # the rows, from top to bottom
    assert [one.get_position().width * 3 for one in axes[:3]] == pytest.approx([0.8] * 3)
    assert figure.texts[0].get_text() == "heading"
    assert Image.open(tmp_path / "page.png").width > 1000


def test_instances_show_the_strongest_of_the_channels_with_the_lowest_gate():
    maps = RNG.random((3, 4, 5)) + 1
    maps[..., 3] *= 9
    found = finding(
        [[10, 20, 30, 50], [0, 0, 8, 8]],
        [1.25, -0.5],
        maps=maps,
        semantic=RNG.random((3, 4)),
        gates=np.array([0.0, 0.9, 0.4, 0.0, 0.2]),
        attention=RNG.random((3, 4)),
    )
    rows = figures.instances(found, IMAGE, "what it says")
    assert titles(rows) == [
        "image, instances",
        "X, mean of 5 channels",
        "S, sum 1",
        "attention map Omega",
        "channel 3, lowest gate, 0.00",
        "channel 1, highest gate, 0.90",
        "+1.25",
        "-0.50",
    ]
    cells = [cell for row in rows for cell in row.cells]
    np.testing.assert_allclose(cells[1].values, maps.mean(axis=-1), rtol=1e-6)
    np.testing.assert_allclose(cells[4].values, maps[..., 3], rtol=1e-6)
    np.testing.assert_allclose(cells[5].values, maps[..., 1], rtol=1e-6)
    assert all(cell.aspect == 60 / 80 for cell in cells[1:6])
    whole = np.asarray(Image.fromarray(IMAGE[20:50, 10:30]).resize((160, 160), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(cells[6].values, whole)
    ungated = finding(maps=maps, attention=RNG.random((3, 4)))
    assert titles(figures.instances(ungated, IMAGE, "")) == [
        "image, instances",
        "X, mean of 5 channels",
        "attention map Omega",
    ]


def test_blocks_stand_in_their_order():
    maps = {f"attention_{block}": np.full((2, 2), block, float) for block in (10, 2, 3)}
    rows = figures.blocks(finding(**maps), IMAGE, "title")
    assert titles(rows) == ["image", "block 2, 2 x 2", "block 3, 2 x 2", "block 10, 2 x 2"]
    assert [len(row.cells) for row in rows] == [3, 1]
    assert rows[1].cells[0].values[0, 0] == 10


def test_patches_show_the_chosen_and_the_drawn():
    attention = np.full((3, 4), 0.05)
    attention[1, 2] = 0.45
    found = finding(
        [[30, 20, 50, 40], [70, 0, 80, 20]],
        [0.6, 0.1],
        cells=np.array([6, 3]),
        attention=attention,
        drawn_boxes=np.array([[0.0, 0.0, 20.0, 20.0]] * 3),
        drawn_probabilities=np.array([[0.4, 0.6], [0.2, 0.8]]),
    )
    rows = figures.patches(found, IMAGE, "title")
    assert titles(rows)[:3] == [
        "attention, 1 = even",
        "2 places chosen, 12.5% of the image",
        "a Monte-Carlo draw",
    ]
    assert rows[0].cells[0].values[1, 2] == pytest.approx(0.45 * 12)
    assert [row.heading for row in rows[1:]] == [
        "chosen, and what each adds to the score",
        "drawn; over 2 draws the predicted class has 0.70 +- 0.14",
    ]
    first, second = rows[1].cells
    np.testing.assert_array_equal(first.values[:20, :20], IMAGE[20:40, 30:50])
    np.testing.assert_array_equal(second.values[:20, :10], IMAGE[:20, 70:])
    assert (second.values[:, 10:] == 255).all()  # of the same scale, although the image ends there
    assert len(rows[2].cells) == 3


def test_a_draw_is_one_of_those_that_are_sampled():
    model = models.AttentionSampling(2, patches=3, patch_size=12, stride=5, seed=1)
    images = IMAGE[None]
    model.build((None, 60, 80, 3))
    found = figures.monte_carlo(model)(images)
    np.testing.assert_allclose(found["drawn_probabilities"].sum(axis=1), 1, rtol=1e-5)
    assert len(np.unique(found["drawn_probabilities"], axis=0)) > 1
    scores = tf.nn.softmax(model.sample(images, draws=1, seed=3)[0, 0])
    np.testing.assert_allclose(found["drawn_probabilities"][3], scores, rtol=1e-5)
    assert (found["drawn_boxes"] >= 0).all()
    assert (found["drawn_boxes"] <= [80, 60, 80, 60]).all()
    assert figures.monte_carlo(object())(images) == {}


def test_masks_are_shown_with_their_raw_range(drawn, tmp_path):
    named = {"mask": np.array([[0.2, 0.6], [0.4, 0.4]]), "initial_mask": np.full((2, 2), 0.5)}
    image = np.full((2, 2, 3), 200, np.uint8)
    figures.masks(named, [image], tmp_path / "mask.png")
    axes = [one for one in drawn[0].axes if one.get_images()]
    assert [one.get_title(loc="left") for one in axes[:2]] == [
        "before learning: 0.5 to 0.5",
        "after learning: 0.2 to 0.6",
    ]
    masked = axes[3].get_images()[0].get_array()
    np.testing.assert_array_equal(masked[..., 0], [[0, 200], [100, 100]])
