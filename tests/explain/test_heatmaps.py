"""The heatmap against its equation, and what `explain` says against the model's own score."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY

from keras_medattn.explain import heatmaps
from keras_medattn.train import recipe, trainer


class Squares:
    """Scores `y_c = sum_hwi W_ic X_hwi^2`, so that `T_hw = sum_i 2 W_ic X_hwi^2`."""

    def __init__(self, weights):
        self.weights = weights

    def features(self, images, training=None):
        return tf.cast(images, tf.float32)

    def score(self, maps, training=None):
        return tf.einsum("bhwi,ic->bc", maps**2, tf.constant(self.weights, tf.float32))


def test_contributions_are_gradient_times_input():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(3, 4, 5, 2)), rng.normal(size=(2, 3))
    scores = np.einsum("bhwi,ic->bc", x**2, weights)
    found = heatmaps.contributions(Squares(weights), tf.constant(x))
    chosen = scores.argmax(axis=-1)
    np.testing.assert_array_equal(found["classes"], chosen)
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5)
    expected = np.einsum("bhwi,bi->bhw", 2 * x**2, weights[:, chosen].T)
    np.testing.assert_allclose(found["contributions"], expected, rtol=1e-4, atol=1e-5)
    asked = heatmaps.contributions(Squares(weights), tf.constant(x), tf.constant([2, 0, 1]))
    expected = np.einsum("bhwi,bi->bhw", 2 * x**2, weights[:, [2, 0, 1]].T)
    np.testing.assert_allclose(asked["contributions"], expected, rtol=1e-4, atol=1e-5)


def test_attention_keeps_what_argues_for_the_class():
    argued = tf.constant([[[-4.0, 2.0], [1.0, 0.0]], [[-1.0, -2.0], [0.0, -3.0]]])
    kept = heatmaps.attention(argued).numpy()
    np.testing.assert_array_equal(kept, [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]])


@pytest.fixture(scope="module")
def model():
    built = trainer.build(recipe.from_dict(TINY), 2)
    rng = np.random.default_rng(1)
    for variable in built.head.weights + built.ms_conv.weights:
        if variable.name not in ("moving_variance", "seed_generator_state"):
            variable.assign(rng.normal(size=variable.shape))
    return built


def test_contributions_sum_to_the_slope_of_the_score(model, monkeypatch):
    """Sum T = dy_c(t X)/dt at t = 1, here by central differences."""
    maps = np.random.default_rng(2).normal(size=(2, 8, 10, model.backbone.output.shape[-1])).astype("float32")
    monkeypatch.setattr(model, "features", lambda images, training=None: tf.constant(maps))
    found = heatmaps.contributions(model, maps)
    ends = [np.array(model.score(maps * (1 + step))) for step in (1e-3, -1e-3)]
    slope = (ends[0] - ends[1])[np.arange(2), found["classes"]] / 2e-3
    assert np.abs(slope).min() > 0.1
    np.testing.assert_allclose(found["contributions"].numpy().sum(axis=(1, 2)), slope, rtol=2e-2)


def test_evidence_adds_up_to_the_score(model):
    images = np.random.default_rng(3).integers(0, 255, (3, 64, 80, 3)).astype("uint8")
    named = model.explain(images)
    scores = np.array(named["scores"])
    np.testing.assert_allclose(scores, model(images), atol=1e-4)
    chosen = scores.argmax(axis=-1)
    total = np.array(named["weights"]).sum(axis=1) + np.array(model.head.bias)[chosen]
    np.testing.assert_allclose(total, scores[np.arange(3), chosen], rtol=1e-3, atol=1e-3)
    weights = np.array(named["weights"])
    assert (np.diff(weights, axis=1) <= 0).all()
    assert weights.shape == (3, 7 * 3)


def test_boxes_lie_where_the_maps_are_hot(model, monkeypatch):
    """One cell of the primary maps is hot, and every channel loves it: what weighs much covers that cell."""
    maps = np.zeros((1, 8, 10, model.backbone.output.shape[-1]), "float32")
    maps[0, 5, 7] = 50.0
    for variable in [*model.ms_conv.weights, model.head.kernel]:
        if variable.name in ("kernel", "sw"):
            variable.assign(np.abs(variable))
    monkeypatch.setattr(model, "features", lambda images, training=None: tf.constant(maps))
    named = model.explain(np.zeros((1, 64, 80, 3), "uint8"))
    boxes, weights = np.array(named["boxes"][0]), np.array(named["weights"][0])
    heavy = boxes[weights > 0.5 * weights.max()]
    assert len(heavy) > 0
    for x0, y0, x1, y1 in heavy:
        assert x0 <= 60 <= x1
        assert y0 <= 44 <= y1


class Pyramid(Squares):
    """Two levels, the second of half the size; the score adds those of both."""

    def features(self, images, training=None):
        images = tf.cast(images, tf.float32)
        return [images[:, ::2, ::2], images]

    def score(self, maps, training=None):
        return sum(Squares.score(self, level) for level in maps)


def test_levels_of_a_pyramid_are_added():
    rng = np.random.default_rng(4)
    x, weights = rng.normal(size=(2, 4, 6, 2)), rng.normal(size=(2, 3))
    small = x[:, ::2, ::2]
    classes = np.einsum("bhwi,ic->bc", x**2, weights) + np.einsum("bhwi,ic->bc", small**2, weights)
    chosen = weights[:, classes.argmax(axis=-1)].T
    expected = np.einsum("bhwi,bi->bhw", 2 * x**2, chosen)
    expected += np.einsum("bhwi,bi->bhw", 2 * small**2, chosen).repeat(2, axis=1).repeat(2, axis=2) / 4
    found = heatmaps.contributions(Pyramid(weights), tf.constant(x))
    np.testing.assert_allclose(found["contributions"], expected, rtol=1e-4, atol=1e-5)


def test_the_papers_sign_keeps_what_argues_against():
    rng = np.random.default_rng(5)
    x, model = tf.constant(rng.normal(size=(1, 3, 3, 2))), Squares(rng.normal(size=(2, 2)))
    plain, turned = (heatmaps.contributions(model, x, sign=sign)["contributions"] for sign in (1, -1))
    np.testing.assert_array_equal(plain, -turned)
