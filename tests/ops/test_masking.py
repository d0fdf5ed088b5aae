import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.global_pixel_mask import convolve_same

from keras_medattn.ops import (
    convolve_tiles,
    masking,
    pixel_tiles,
    reducing_matrix,
    share_of_variance,
    tile_transforms,
)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_tile_transforms_are_a_convolution(size):
    inputs, taps, outputs = tile_transforms(size)
    rows, count = outputs.shape
    assert count == rows + size - 1 < rows * size
    pixels, kernel = _normal(count), _normal(size, seed=1)
    answer = outputs @ ((taps @ kernel) * (inputs @ pixels))
    np.testing.assert_allclose(answer, np.correlate(pixels, kernel), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("shape", [(21, 7), (16, 12), (1, 2)], ids=str)
def test_blocks_convolve_as_one(size, shape, monkeypatch):
    """Several blocks of several tiles, heights that fill no tile, images smaller than the kernel."""
    monkeypatch.setattr(masking, "_POSITIONS", 2 * shape[1])
    pixels, kernel = _normal(*shape, 4), _normal(size, size, 4, 3, seed=1)
    upstream = _normal(1, *shape, 3, seed=2)
    tiles = tf.constant(pixel_tiles(pixels, size))
    assert (len(tiles) > 1) == (shape[0] > 1)
    weights = tf.constant(kernel)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        maps = convolve_tiles(tiles, weights, shape[0])
    expected = convolve_same(pixels[None], kernel, np.zeros(3))
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-11)
    gradient = tape.gradient(maps, weights, tf.constant(upstream))
    direction = _normal(*kernel.shape, seed=3)  # the answer is linear in the kernel
    along = (convolve_same(pixels[None], direction, np.zeros(3)) * upstream).sum()
    np.testing.assert_allclose(np.sum(gradient * direction), along, rtol=1e-10)


def test_a_block_is_bounded_for_many_images():
    assert masking.tiles_shape(224, 224, 30_000, 3)[2] == 1
    assert masking.tiles_shape(224, 224, 1_239, 3)[2] == 8


def test_tiles_stay_on_the_host_and_blocks_are_taken_one_by_one(monkeypatch):
    """The graph reads a block on the CPU, in a loop, and leaves the products to the device."""
    monkeypatch.setattr(masking, "_POSITIONS", 16)
    tiles = tf.constant(pixel_tiles(_normal(32, 8, 4).astype("float32"), 3))
    assert len(tiles) == 4

    @tf.function
    def step(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            loss = tf.reduce_sum(tf.sin(convolve_tiles(tiles, kernel, 32)))
        return loss, tape.gradient(loss, kernel)

    graph = step.get_concrete_function(tf.TensorSpec((3, 3, 4, 2))).graph.as_graph_def()
    bodies = [f.node_def for f in graph.library.function if "while_body" in f.signature.name]
    nodes = {node.name: node for body in bodies for node in body}
    products = [node for node in nodes.values() if node.op.startswith("BatchMatMul")]
    reads = [node for node in nodes.values() if "CPU:0" in node.device and node.op == "StridedSlice"]
    assert len(bodies) == len(products) == len(reads) == 2  # forward and backward
    assert not any(node.device for node in products)


def test_the_rest_of_the_pixel_cnn_is_checked_where_it_is_used():
    maps = keras.ops.convert_to_tensor(_normal(1, 4, 5, 2).astype("float32"))
    kernels = [_normal(3, 3, 2, 2, seed=1).astype("float32"), _normal(1, 1, 4, 1, seed=2).astype("float32")]
    biases = [_normal(n, seed=3).astype("float32") for n in (2, 2, 1)]
    hidden = np.maximum(maps.numpy() + biases[0], 0)
    more = np.maximum(convolve_same(hidden, kernels[0], biases[1]), 0)
    expected = np.concatenate([hidden, more], -1) @ kernels[1][0, 0] + biases[2]
    answer = masking.pixel_mask(maps, biases, kernels, dense=True)
    np.testing.assert_allclose(answer, 1 / (1 + np.exp(-expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "columns"), [("subsample", 6), ("projection", 3), ("pca", 3)])
def test_columns_are_orthonormal_and_repeatable(method, columns):
    pixels = _normal(50, 24)
    count = 2 if method == "subsample" else 3
    matrix = reducing_matrix(pixels, method, count, channels=3)
    assert matrix.shape == (24, columns)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(columns), atol=1e-12)
    np.testing.assert_array_equal(matrix, reducing_matrix(pixels, method, count, channels=3))
    centred = pixels - pixels.mean(axis=0)
    share = np.square(centred @ matrix).sum() / np.square(centred).sum()
    np.testing.assert_allclose(share_of_variance(pixels, matrix), share, rtol=1e-12)


def test_subsample_takes_whole_images():
    matrix = reducing_matrix(np.ones((2, 15)), "subsample", 2, channels=3)
    images = matrix.argmax(axis=0).reshape(2, 3)
    np.testing.assert_array_equal(images % 3, [[0, 1, 2]] * 2)
    assert (images // 3 == images[:, :1] // 3).all()


def test_principal_axes_are_those_of_the_singular_values():
    scores, axes = np.linalg.qr(_normal(200, 5))[0], np.linalg.qr(_normal(40, 5, seed=1))[0]
    scores -= scores.mean(axis=0)
    pixels = (scores * [16, 8, 4, 2, 1]) @ axes.T + 1e-3 * _normal(200, 40, seed=2) + 3.0
    found = reducing_matrix(pixels, "pca", 3, channels=1)
    _, values, right = np.linalg.svd(pixels - pixels.mean(axis=0))
    np.testing.assert_allclose(np.abs((found * right[:3].T).sum(axis=0)), 1, atol=1e-8)
    kept = np.square(values[:3]).sum() / np.square(values).sum()
    np.testing.assert_allclose(share_of_variance(pixels, found), kept, rtol=1e-8)
    assert (found[np.abs(found).argmax(axis=0), np.arange(3)] > 0).all()
