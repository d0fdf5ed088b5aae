import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.ops import crop_bilinear, resize_bilinear

BOXES = np.array([[[3, 2, 9.5, 7.25], [8, 5, 17, 11], [2.2, 3.3, 4.1, 3.9]]] * 2, "float32")


def _images(dtype="float32"):
    return np.random.default_rng(0).integers(0, 256, (2, 13, 19, 3)).astype(dtype)


def _with_tensorflow(images, boxes, size):
    """The same places as `tf.image.crop_and_resize`'s, which counts from centre to centre."""
    step = (boxes[..., 2:] - boxes[..., :2]) / size
    first, last = boxes[..., :2] + 0.5 * step - 0.5, boxes[..., 2:] - 0.5 * step - 0.5
    extent = np.array([images.shape[1] - 1, images.shape[2] - 1])
    places = np.concatenate([first[..., ::-1] / extent, last[..., ::-1] / extent], axis=-1)
    owner = np.repeat(np.arange(len(boxes)), boxes.shape[1])
    crops = tf.image.crop_and_resize(images, places.reshape(-1, 4), owner, (size, size))
    return tf.reshape(crops, (*boxes.shape[:2], size, size, images.shape[-1]))


@pytest.mark.parametrize("size", [2, 5, 12])
def test_equals_tensorflows_in_value_and_gradient(size):
    images, answers = tf.constant(_images()), []
    weights = tf.random.stateless_normal((2, 3, size, size, 3), (1, 2))
    for crop in (crop_bilinear, _with_tensorflow):
        with tf.GradientTape() as tape:
            tape.watch(images)
            crops = crop(images, BOXES, size)
            loss = tf.reduce_sum(weights * crops)
        answers.append((crops, tf.convert_to_tensor(tape.gradient(loss, images))))
    for own, other in zip(*answers, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=2e-3)


def test_a_box_around_the_image_is_a_resize_and_one_of_the_crops_size_a_copy():
    images = _images()
    whole = np.array([[[0, 0, 19, 13]]] * 2, "float32")
    np.testing.assert_allclose(
        crop_bilinear(images, whole, 8)[:, 0],
        resize_bilinear(tf.constant(images), 8, 8),
        rtol=1e-5,
        atol=1e-3,
    )
    part = np.array([[[4, 6, 9, 11]]] * 2, "float32")
    np.testing.assert_array_equal(crop_bilinear(images, part, 5)[:, 0], images[:, 6:11, 4:9])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_images_of_any_type(dtype):
    crops = crop_bilinear(_images(dtype), BOXES, 6)
    assert crops.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_allclose(crops, crop_bilinear(_images(), BOXES, 6), rtol=1e-5, atol=1e-4)


def test_padding_is_not_read_and_images_end_where_they_end():
    images, size = _images(), np.array([[13, 19], [9, 12]], "int32")
    padded = np.pad(images, ((0, 0), (0, 4), (0, 3), (0, 0)), constant_values=np.nan)
    padded[1, 9:] = padded[1, :, 12:] = np.nan
    boxes = np.array([[[-3, -2, 30, 30], [15, 10, 19, 13]], [[-3, -2, 30, 30], [8, 6, 12, 9]]], "float32")
    graph = tf.function(
        lambda *arguments: crop_bilinear(*arguments[:2], 7, arguments[2]),
        input_signature=[
            tf.TensorSpec((None, None, None, 3)),
            tf.TensorSpec((None, None, 4)),
            tf.TensorSpec((None, 2), "int32"),
        ],
    )
    for run in (lambda *arguments: crop_bilinear(*arguments[:2], 7, arguments[2]), graph):
        crops = run(padded, boxes, size)
        for b, (rows, columns) in enumerate(size):
            alone = crop_bilinear(images[b : b + 1, :rows, :columns], boxes[b : b + 1], 7)
            np.testing.assert_allclose(crops[b], alone[0], rtol=1e-5, atol=1e-3)


def test_maps_are_an_error():
    with pytest.raises(ValueError, match=r"\(B, H, W, C\).*Received: images.shape=\(2, 3, 4\)"):
        crop_bilinear(np.zeros((2, 3, 4), "float32"), BOXES, 2)
