import keras
import numpy as np
import pytest
import reference.sampler
import tensorflow as tf

from keras_medattn import ops

SIZES = [(10, 13), (15, 20), (7, 6), (29, 31)]


def _image(*shape, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("patch_size", [1, 4, 7])
@pytest.mark.parametrize("size", SIZES)
def test_each_cell_is_found_again_from_its_patch(size, patch_size, stride):
    """Every cell, those at the borders too; the corners are those of exact fractions."""
    height, width = (length // stride for length in size)
    cells = np.arange(height * width)[None]
    corners = np.array(ops.cells_to_corners(cells, (height, width), size, patch_size, stride))
    expected = [
        [
            reference.sampler.corner(row, reference.sampler.side(height, size[0], stride), patch_size),
            reference.sampler.corner(column, reference.sampler.side(width, size[1], stride), patch_size),
        ]
        for row in range(height)
        for column in range(width)
    ]
    np.testing.assert_array_equal(corners[0], expected)
    again = ops.corners_to_cells(corners, (height, width), size, patch_size, stride)
    np.testing.assert_array_equal(again, cells)


@pytest.mark.parametrize("patch_size", [1, 6, 9])
@pytest.mark.parametrize(("map_size", "size"), [((3, 4), (10, 13)), ((7, 6), (7, 11)), ((5, 3), (64, 64))])
def test_each_cell_of_a_map_over_the_whole_image_is_found_again(map_size, size, patch_size):
    cells = np.arange(map_size[0] * map_size[1])[None]
    corners = np.array(ops.cells_to_corners(cells, map_size, size, patch_size))
    for cell, corner in zip(cells[0], corners[0], strict=True):
        for axis, index in enumerate(divmod(int(cell), map_size[1])):
            side = reference.sampler.side(map_size[axis], size[axis], None)
            assert corner[axis] == reference.sampler.corner(index, side, patch_size)
    np.testing.assert_array_equal(ops.corners_to_cells(corners, map_size, size, patch_size), cells)


def test_a_patch_of_the_cells_size_is_the_cell():
    """With the overview: the mean of the patch under a cell is the cell's value."""
    image = _image(2, 17, 23, 3)
    cells = np.broadcast_to(np.arange(3 * 4), (2, 12))
    corners = ops.cells_to_corners(cells, (3, 4), (17, 23), patch_size=5, stride=5)
    means = np.array(ops.gather_patches(image, corners, 5)).mean(axis=(2, 3)).reshape(2, 3, 4, 3)
    np.testing.assert_allclose(ops.overview(image, 5), means, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("size", [(9, 11), (1, 4), (3, 2)])
def test_patches_are_those_of_a_reflected_image(size, dtype):
    """Also where a patch is larger than the image, and reflected several times."""
    image = _image(2, *size, 2, dtype=dtype)
    corners = np.random.default_rng(1).integers(-9, 12, (2, 5, 2))
    patches = np.array(ops.gather_patches(image, corners, 6))
    assert patches.dtype == dtype
    for b in range(2):
        for p in range(5):
            np.testing.assert_array_equal(patches[b, p], reference.sampler.patch(image[b], *corners[b, p], 6))


def test_padding_of_a_batch_is_not_read():
    image = _image(2, 9, 11, 3, dtype="float32")
    padded = np.pad(image, ((0, 0), (0, 4), (0, 6), (0, 0)), constant_values=np.nan)
    corners = np.random.default_rng(1).integers(-5, 14, (2, 6, 2))
    size = np.array([[9, 11]] * 2)
    expected = ops.gather_patches(image, corners, 4)
    np.testing.assert_array_equal(ops.gather_patches(padded, corners, 4, size), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize(("size", "stride"), [((10, 13), 5), ((11, 7), 2), ((6, 6), 1), ((3, 9), 3)])
def test_overview_is_the_mean_of_squares(size, stride, dtype):
    image = _image(3, *size, 2, dtype=dtype)
    cells = ops.overview(image, stride)
    assert cells.dtype == "float32"
    np.testing.assert_allclose(cells, reference.sampler.overview(image, stride), rtol=1e-6)


@pytest.mark.parametrize("rows", [600, 1402, 1604])
def test_overview_of_many_bands(rows):
    """An image that is converted in several bands, of which the last is shorter; sizes known and not."""
    image = _image(2, rows, 700, 3)
    expected = reference.sampler.overview(image, 4)
    np.testing.assert_allclose(ops.overview(image, 4), expected, rtol=1e-6)
    graph = tf.function(
        lambda x: ops.overview(x, 4), input_signature=[tf.TensorSpec((None, None, None, 3), "uint8")]
    )
    np.testing.assert_allclose(graph(image), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_overview_of_a_padded_batch(dtype):
    image = _image(2, 10, 15, 3, dtype=dtype)
    size = np.array([[10, 9], [7, 15]])
    padded = image.copy()
    for b, (height, width) in enumerate(size):
        padded[b, height:] = padded[b, :, width:] = 255 if dtype == "uint8" else np.nan
    cells = np.array(ops.overview(padded, 3, size))
    for b, (height, width) in enumerate(size):
        expected = np.zeros((3, 5, 3))
        whole = reference.sampler.overview(image[b : b + 1, :height, :width], 3)[0]
        expected[: whole.shape[0], : whole.shape[1]] = whole
        np.testing.assert_allclose(cells[b], expected, rtol=1e-6)


def test_cells_of_a_padded_batch_lie_inside_their_images():
    size = np.array([[10, 13], [4, 20], [0, 5]])
    for map_size, image_size, stride in (((5, 6), (15, 20), 3), ((4, 7), (15, 20), None)):
        mask = np.array(ops.cell_mask(size, map_size, image_size, stride))
        for b in range(3):
            for row in range(map_size[0]):
                for column in range(map_size[1]):
                    sides = [reference.sampler.side(map_size[i], image_size[i], stride) for i in (0, 1)]
                    inside = (row + 1) * sides[0] <= size[b, 0] and (column + 1) * sides[1] <= size[b, 1]
                    assert mask[b, row, column] == inside


def test_masked_softmax():
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)) * 20
    mask = np.random.default_rng(1).random((3, 4, 5)) < [[[0.5]], [[1.0]], [[0.0]]]
    weights = np.where(mask, np.exp(logits), 0)
    total = weights.sum(axis=(1, 2), keepdims=True)
    found = ops.masked_softmax(np.where(mask, logits, np.nan), mask)
    np.testing.assert_allclose(found, weights / np.where(total > 0, total, 1), rtol=1e-10)
    np.testing.assert_allclose(ops.masked_softmax(logits)[1], found[1], rtol=1e-10)


def test_masked_softmax_has_a_finite_gradient_where_nothing_counts():
    logits = tf.Variable(np.full((2, 2, 2), np.nan))
    mask = np.array([[[True, True], [False, True]], [[False, False], [False, False]]])
    logits[0].assign([[1.0, 2.0], [np.nan, 500.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(ops.masked_softmax(logits, mask)[:, 0, 1])
    gradient = tape.gradient(loss, logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)


def test_errors_name_what_was_received():
    with pytest.raises(ValueError, match=r"\(B, H, W, C\).*Received: image.shape=\(3, 4, 5\)"):
        ops.overview(np.zeros((3, 4, 5)), 2)
    with pytest.raises(ValueError, match=r"Received: stride=6, image.shape=\(1, 5, 9, 3\)"):
        ops.overview(np.zeros((1, 5, 9, 3)), 6)
    with pytest.raises(ValueError, match=r"Received: image.shape=\(5, 9, 3\)"):
        ops.gather_patches(keras.ops.zeros((5, 9, 3)), np.zeros((1, 1, 2), "int32"), 2)
