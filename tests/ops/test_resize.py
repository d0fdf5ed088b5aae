import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from keras_medattn.ops import resize_bilinear, scaled_size

SIZES = [
    ((8, 8), (4, 4)),
    ((7, 9), (3, 6)),
    ((7, 9), (5, 6)),
    ((5, 3), (11, 8)),
    ((1, 4), (3, 1)),
    ((33, 30), (24, 22)),
]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_equals_tensorflow_and_the_equation(before, after):
    x = np.random.default_rng(0).normal(size=(2, *before, 3)).astype("float32")
    answer = resize_bilinear(x, *after)
    np.testing.assert_allclose(answer, reference.resize_bilinear(x.astype("float64"), *after), atol=1e-6)
    np.testing.assert_allclose(answer, tf.image.resize(x, after, "bilinear", antialias=False), atol=1e-5)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_sizes_known_only_at_run_time(before, after):
    x = np.random.default_rng(0).normal(size=(2, *before, 3)).astype("float32")
    graph = tf.function(
        resize_bilinear,
        input_signature=[tf.TensorSpec((None, None, None, 3)), *[tf.TensorSpec((), tf.int32)] * 2],
    )
    np.testing.assert_array_equal(graph(x, *map(tf.constant, after)), resize_bilinear(x, *after))


def test_same_size_is_the_same_map_and_no_size_is_empty():
    x = keras.random.normal((1, 4, 5, 2))
    np.testing.assert_array_equal(resize_bilinear(x, 4, 5), x)
    assert resize_bilinear(x, 0, 5).shape == (1, 0, 5, 2)


def test_large_maps_keep_their_precision():
    ramp = np.arange(20_001, dtype="float64").reshape(1, -1, 1, 1)
    answer = resize_bilinear(keras.ops.convert_to_tensor(ramp, "float64"), 15_000, 1)
    np.testing.assert_allclose(answer, reference.resize_bilinear(ramp, 15_000, 1), rtol=1e-12)


def test_gradient_equals_tensorflows():
    x, weights = (
        tf.random.stateless_normal((1, 7, 9, 2), (1, 2)),
        tf.random.stateless_normal((1, 5, 6, 2), (3, 4)),
    )
    gradients = []
    for resize in (lambda x: resize_bilinear(x, 5, 6), lambda x: tf.image.resize(x, (5, 6))):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(weights * resize(x))
        gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "scale", "scaled"), [(30, 0.1, 3), (100, 0.57, 57), (10, 1 / 3, 3), (7, 0.75, 5)]
)
def test_scaled_size_is_the_same_in_python_and_in_the_graph(size, scale, scaled):
    assert scaled_size(size, scale) == scaled
    assert int(tf.function(lambda n: scaled_size(n, scale))(tf.constant(size))) == scaled


def test_errors():
    with pytest.raises(ValueError, match="Received: x"):
        resize_bilinear(np.zeros((3, 3, 1)), 2, 2)
    with pytest.raises(ValueError, match="Received: scale"):
        scaled_size(3, 0)
