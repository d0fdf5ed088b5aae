"""Stains: the separation of scikit-image, and the distribution of what RandomStain draws."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from skimage import color

from keras_medattn.data import stain
from keras_medattn.data.stain import RandomStain

IMAGE = np.random.default_rng(0).integers(1, 256, (9, 7, 3), np.uint8)


def test_the_matrix_is_that_of_scikit_image():
    np.testing.assert_array_equal(stain.DENSITIES, color.rgb_from_hed)


def test_stains_are_those_of_scikit_image():
    """It divides log(rgb) by log(1e-6), so its amounts are a sixth of ours; and it cuts them at 0."""
    ours = np.asarray(stain.to_stains(IMAGE))
    np.testing.assert_allclose(np.maximum(ours, 0) / 6, color.rgb2hed(IMAGE), atol=1e-6)
    mixtures = np.random.default_rng(1).uniform(0, 0.8, (5, 4, 3))
    np.testing.assert_allclose(stain.from_stains(mixtures), 255 * color.hed2rgb(mixtures / 6), atol=1e-3)


def test_there_and_back():
    black = np.zeros((1, 3), np.uint8)
    np.testing.assert_allclose(stain.from_stains(stain.to_stains(IMAGE)), IMAGE, atol=1e-3)
    np.testing.assert_allclose(stain.from_stains(stain.to_stains(black)), 1, atol=1e-3)


def test_what_is_drawn_is_uniform_and_applied():
    count, alpha, beta = 600, 0.2, 0.1
    mixture = np.array([0.5, 0.3, 0.2], np.float32)  # stays inside 0..255 whatever is drawn
    pixel = np.asarray(stain.from_stains(mixture[None, None, None]))
    layer = RandomStain(alpha, beta, seed=3)
    factor, shift = (np.asarray(part) for part in layer.get_random_transformation(np.repeat(pixel, count, 0)))
    changed = layer.transform_images(np.repeat(pixel, count, 0), (factor, shift))
    np.testing.assert_allclose(
        stain.to_stains(changed), factor * mixture + shift, atol=1e-4
    )  # (count, 1, 1, 3)
    for drawn, middle, half in ((factor, 1, alpha), (shift, 0, beta)):
        assert np.abs(drawn - middle).max() <= half + 1e-6
        np.testing.assert_allclose(drawn.mean(axis=0), middle, atol=5 * half * (1 / 3 / count) ** 0.5)
        np.testing.assert_allclose(drawn.std(axis=0), half / 3**0.5, rtol=0.1)
    both = np.corrcoef(np.concatenate([factor, shift], axis=-1).reshape(count, 6).T)
    assert np.abs(both - np.eye(6)).max() < 5 / count**0.5  # dyes, and a and b, are drawn apart


def test_nothing_changes_out_of_training_or_without_strength():
    batch = IMAGE[None]
    np.testing.assert_array_equal(RandomStain(0.5, 0.5)(batch), batch)
    np.testing.assert_allclose(RandomStain(0, 0)(batch, training=True), batch, atol=1e-3)


def test_in_a_data_pipeline_single_images_and_a_saved_model(tmp_path):
    layer = RandomStain(0.1, 0.05, seed=1)
    data = tf.data.Dataset.from_tensors(IMAGE).repeat(4).map(lambda image: layer(image, training=True))
    changed = [one.numpy() for one in data]
    assert len({one.tobytes() for one in changed}) == 4
    assert all(1 < np.abs(one - IMAGE).max() < 128 for one in changed)
    model = keras.Sequential([keras.Input((9, 7, 3)), RandomStain(0.1, 0.05, seed=1)])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").layers[0]
    assert (again.alpha, again.beta, again.seed) == (0.1, 0.05, 1)


@pytest.mark.parametrize(("alpha", "beta", "words"), [(1, 0, "alpha"), (-0.1, 0, "alpha"), (0, -1, "beta")])
def test_strengths_out_of_range(alpha, beta, words):
    with pytest.raises(ValueError, match=rf"{words} must be .*Received: -?\d"):
        RandomStain(alpha, beta)
