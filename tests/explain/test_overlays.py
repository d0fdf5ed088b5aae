import numpy as np
import pytest
import tensorflow as tf
from matplotlib import colormaps
from PIL import Image

from keras_medattn.explain.overlays import (
    FOUND,
    TRUTH,
    PanelRow,
    draw_boxes,
    draw_outline,
    heat_levels,
    overlay,
    panel,
    save_png,
    to_image_size,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 9), (14, 10), (64, 51), (3, 4), (224, 300)])
def test_resize_is_tensorflows(size):
    heat = RNG.random((7, 5)).astype(np.float32)
    expected = tf.image.resize(heat[..., None], size, method="bilinear", antialias=False)[..., 0]
    found = to_image_size(heat, *size)
    assert found.dtype == np.float32
    assert found.shape == size
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_overlay_is_the_papers_formula():
    image = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    heat = RNG.normal(size=(6, 8))  # of the image's size: no resize between
    levels = np.rint(np.maximum(heat, 0) / heat.max() * 255).astype(int)
    mixed = 0.6 * image + 0.3 * 255 * colormaps["jet"](levels)[..., :3]
    before = image.copy()
    found = overlay(image, heat)
    assert found.dtype == np.uint8
    assert np.abs(found - np.clip(mixed, 0, 255)).max() <= 0.5 + 1e-3
    assert np.array_equal(image, before)


def test_the_heat_is_rounded_before_it_is_enlarged():
    found = overlay(np.zeros((1, 8, 3), np.uint8), [[-3.0, 0.0, 1.0, 2.0]], "gray")[0, :, 0]
    levels = to_image_size([[0.0, 0.0, 128.0, 255.0]], 1, 8)[0]
    assert np.array_equal(found, np.rint(0.3 * np.rint(levels)))


def test_no_heat_anywhere_is_the_colour_of_zero():
    image = np.full((4, 4, 3), 200, np.uint8)
    assert (overlay(image, np.zeros((2, 2))) == [120, 120, 158]).all()  # jet(0) = (0, 0, 0.5)
    assert (overlay(image, -np.ones((2, 2)), "inferno") == overlay(image, [[0.0]], "inferno")).all()
    assert (overlay(np.full((1, 1, 3), 255, np.uint8), [[1.0]], "gray") == 230).all()


def test_boxes_are_drawn_around_their_pixels():
    image = np.zeros((20, 30, 3), np.uint8)
    found = draw_boxes(image, [[10, 5, 14, 8]], (1, 2, 3))
    line = (found == [1, 2, 3]).all(axis=2)
    expected = np.zeros((20, 30), bool)
    expected[4:9, 9:15] = True
    expected[5:8, 10:14] = False
    assert np.array_equal(line, expected)
    assert not image.any()
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4))), image)
    thick = (draw_boxes(np.zeros((600, 600, 3), np.uint8), [[100, 100, 200, 200]]) == TRUTH).all(axis=2)
    assert np.flatnonzero(thick[150]).tolist() == [97, 98, 99, 200, 201, 202]


def test_an_outline_lies_outside_its_mask():
    mask = np.zeros((12, 12), bool)
    mask[4:7, 5:9] = True
    image = np.zeros((12, 12, 3), np.uint8)
    line = (draw_outline(image, mask) == TRUTH).all(axis=2)
    boxed = (draw_boxes(image, [[5, 4, 9, 7]]) == TRUTH).all(axis=2)
    assert np.array_equal(line, boxed)
    assert not image.any()


def test_a_panel_shows_truth_on_the_left_and_what_was_found_on_the_right(tmp_path):
    rows = [
        PanelRow(
            RNG.integers(0, 80, (h, w, 3), dtype=np.uint8),
            RNG.random((4, 5)),
            truth=np.array([[20, 20, 60, 60]]) if h == 100 else np.eye(h, w, dtype=bool),
            found=[[40, 40, 80, 80]],
            title="lésion 0.93 (true: lesion)",
        )
        for h, w in ((100, 140), (120, 120))
    ]
    panel(rows, tmp_path / "panel.png")
    panel([PanelRow(rows[0].image, rows[0].heat)], tmp_path / "plain.png")
    picture = np.asarray(Image.open(tmp_path / "panel.png").convert("RGB")).astype(int)
    middle = picture.shape[1] // 2
    for colour, side in ((TRUTH, 0), (FOUND, 1)):
        columns = np.nonzero((np.abs(picture - colour) < 60).all(axis=2))[1]
        assert len(columns) > 100
        assert ((columns > middle) == side).all()
    plain = np.asarray(Image.open(tmp_path / "plain.png").convert("RGB")).astype(int)
    assert not (np.abs(plain - TRUTH) < 60).all(axis=2).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["panel.png", "plain.png"]


def test_png_comes_back_as_it_was(tmp_path):
    image = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(image, tmp_path / "image.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), image)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: overlay(np.zeros((4, 4, 3)), [[1.0]]),  # pyright: ignore[reportArgumentType]
        lambda: overlay(np.zeros((4, 4), np.uint8), [[1.0]]),
        lambda: overlay(np.zeros((4, 4, 3), np.uint8), [[np.nan]]),
        lambda: heat_levels([1.0, 2.0]),
        lambda: to_image_size([[1.0]], 0, 4),
        lambda: draw_outline(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), bool)),
        lambda: draw_outline(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4))),
        lambda: panel([], "never.png"),
    ],
)
def test_wrong_inputs_are_named(wrong):
    with pytest.raises(ValueError, match="Received: "):
        wrong()
