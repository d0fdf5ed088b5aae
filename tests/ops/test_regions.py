import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.layers import MSConv
from keras_medattn.ops import position_to_box, position_to_cell

SCALES = (0.5, 0.75, 1.0)


def _cells(kernel, height, width, slices):
    """Every position of a bag as `(scale, slice, row, column)`, in the bag's order."""
    return np.array(
        [
            (i, s, row, column)
            for i, scale in enumerate(SCALES)
            for s in range(slices)
            for row in range(int(height * scale) - kernel + 1)
            for column in range(int(width * scale) - kernel + 1)
        ]
    )


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 13), (33, 6)])
def test_positions_come_apart_in_the_bags_order(size, kernel, slices):
    cells = _cells(kernel, *size, slices)
    parts = position_to_cell(np.arange(len(cells)), kernel, SCALES, size, slices)
    np.testing.assert_array_equal(np.stack(parts, axis=-1), cells)
    bag = MSConv(((kernel, 1),), SCALES)(np.zeros((1, slices, *size, 2), "float32"))[0]
    assert bag.shape[1] == len(cells)


@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("size", [(8, 8), (7, 13)])
def test_boxes_lie_where_the_values_come_from(size, stride):
    """On maps that hold their own rows and columns, a mean over a window is its centre in the image."""
    height, width = size
    rows, columns = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    maps = np.stack([rows, columns], axis=-1)[None].astype("float32") * stride
    kernel = 3
    layer = MSConv(((kernel, 2),), SCALES)
    layer.build(maps.shape)
    mean = np.zeros((kernel, kernel, 2, 2))
    mean[..., 0, 0] = mean[..., 1, 1] = 1 / kernel**2
    layer.convolutions[0].kernel.assign(mean)
    centres = layer(maps)[0].numpy()[0] * np.sqrt(
        1.001
    )  # batch norm at its start only divides by sqrt(1 + epsilon)
    box = position_to_box(
        np.arange(len(centres)), kernel, SCALES, size, (height * stride, width * stride)
    ).numpy()
    x, y = (box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2
    np.testing.assert_allclose(np.stack([y, x], axis=-1), centres, atol=1e-3 * stride)


@pytest.mark.parametrize(("size", "image"), [((8, 8), (128, 128)), ((7, 13), (100, 200)), ((5, 4), (37, 31))])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_boxes_of_each_scale_reach_the_images_edges_and_no_further(size, image, kernel):
    scales = _cells(kernel, *size, 1)[:, 0]
    box = position_to_box(np.arange(len(scales)), kernel, SCALES, size, image).numpy()
    for scale in np.unique(scales):
        x0, y0, x1, y1 = box[scales == scale].T
        rim = [x0.min(), y0.min(), x1.max(), y1.max()]
        np.testing.assert_allclose(rim, [0, 0, image[1], image[0]], rtol=1e-6)
        assert (x1 > x0).all()
        assert (y1 > y0).all()


def test_arrays_keep_their_shape_and_sizes_may_be_tensors():
    positions = np.arange(24).reshape(2, 3, 4)
    boxes = position_to_box(positions, 2, SCALES, (8, 6), (80, 60))
    assert boxes.shape == (2, 3, 4, 4)
    graph = tf.function(lambda p, h, w: position_to_box(p, 2, SCALES, (h, w), (10 * h, 10 * w)))
    np.testing.assert_array_equal(graph(positions, tf.constant(8), tf.constant(6)), boxes)


def test_scales_without_positions_are_passed_over():
    scale, _, row, column = position_to_cell(np.arange(4), 3, SCALES, (4, 4))  # 2, 3 and 4 cells wide
    np.testing.assert_array_equal(scale, [1, 2, 2, 2])
    np.testing.assert_array_equal(row, [0, 0, 0, 1])
    np.testing.assert_array_equal(column, [0, 0, 1, 0])
