import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.ops import gated_attention
from keras_medattn.ops.gating import dilated_convolution


def _features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _equation(x, m):
    e = np.exp(m - m.max(axis=(1, 2), keepdims=True))
    s = e / e.sum(axis=(1, 2), keepdims=True)
    g = np.maximum(np.tanh((x * s[..., None]).sum(axis=(1, 2))), 0)
    gated = x * g[:, None, None, :]
    return gated, {"semantic": s, "gates": g, "attention": gated.mean(axis=3)}


def test_equals_the_equation_with_known_and_unknown_sizes():
    x, m = _features(3, 5, 6, 4), 3 * _features(3, 5, 6, seed=1)
    expected, expected_maps = _equation(x.astype("float64"), m.astype("float64"))
    graph = tf.function(
        gated_attention, input_signature=[tf.TensorSpec((None, None, None, 4)), tf.TensorSpec((None,) * 3)]
    )
    for run in (gated_attention, graph):
        gated, maps = run(x, m)
        np.testing.assert_allclose(gated, expected, rtol=1e-5, atol=1e-6)
        assert maps.keys() == expected_maps.keys()
        for name, values in expected_maps.items():
            np.testing.assert_allclose(maps[name], values, rtol=1e-5, atol=1e-6)


def test_gates_read_the_one_cell_that_an_extreme_map_names():
    x, m = _features(1, 4, 4, 3), np.zeros((1, 4, 4), "float32")
    m[0, 2, 1] = 1e4  # no overflow
    _, maps = gated_attention(x, m)
    np.testing.assert_allclose(maps["gates"][0], np.maximum(np.tanh(x[0, 2, 1]), 0), rtol=1e-6)
    assert float(maps["semantic"][0, 2, 1]) == 1


def test_a_constant_added_to_the_map_changes_nothing():
    x, m = _features(2, 4, 4, 3), _features(2, 4, 4, seed=1)
    np.testing.assert_allclose(gated_attention(x, m)[0], gated_attention(x, m + 8)[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_taken_in_float32(dtype):
    """A sum of 40,000 terms in half precision would stop growing at 2,048 or 256 of them."""
    x = tf.ones((1, 200, 200, 2), dtype)
    gated, maps = gated_attention(x, tf.zeros((1, 200, 200), dtype))
    assert gated.dtype == maps["gates"].dtype == dtype
    np.testing.assert_allclose(tf.cast(maps["gates"], "float32"), np.tanh(1), rtol=5e-3)


@pytest.mark.parametrize("rate", [1, 2, 5])
def test_dilated_convolution_is_keras_own(rate):
    """In value and gradient, on maps smaller and larger than the kernel's reach."""
    rng = np.random.default_rng(0)
    x, kernel = tf.constant(rng.normal(size=(2, 6, 9, 4))), tf.constant(rng.normal(size=(3, 3, 4, 5)))
    answers = []
    for convolve in (
        lambda: dilated_convolution(x, kernel, rate),
        lambda: keras.ops.conv(x, kernel, padding="same", dilation_rate=rate, data_format="channels_last"),
    ):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            maps = convolve()
            loss = tf.reduce_sum(tf.sin(maps))
        answers.append([maps, *tape.gradient(loss, [x, kernel])])
    for own, other in zip(*answers, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-9, atol=1e-9)
