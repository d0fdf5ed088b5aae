import keras
import numpy as np
import pytest
import tensorflow as tf
import test_conformance_export as exports

from keras_medattn.layers import GatedAttention, InstanceCrops
from keras_medattn.ops import above_threshold, crop_bilinear


def _spots():
    """Attention on 8 x 8 cells: a wide weak spot, a small strong one, and one that weighs least."""
    attention = np.zeros((1, 8, 8), "float32")
    attention[0, 0:3, 0:4] = 3  # 36
    attention[0, 5, 6] = 20
    attention[0, 6, 7] = 30  # touches the one before at a corner: 50
    attention[0, 7, 1] = 10
    return attention


def _images(*shape, dtype="uint8"):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def _attention(batch, size=7, seed=0):
    return np.random.default_rng(seed).gamma(2, size=(batch, size, size)).astype("float32")


def test_the_heaviest_components_come_first_and_empty_slots_hold_nothing():
    images = _images(1, 64, 80, 3)
    layer = InstanceCrops(k=4, crop_size=16, label_size=8)
    crops, boxes, mask, maps = layer(_spots(), images, return_attention_scores=True)
    expected = [[60, 40, 80, 56], [0, 0, 40, 24], [10, 56, 20, 64], [0, 0, 0, 0]]
    assert boxes[0].numpy().tolist() == expected
    assert mask[0].numpy().tolist() == [True, True, True, False]
    np.testing.assert_allclose(crops[:, :3], crop_bilinear(images, boxes[:, :3], 16), rtol=1e-6)
    assert not crops[0, 3].numpy().any()
    np.testing.assert_allclose(maps["weights"][0], np.array([50, 36, 10, 0]) / 96, rtol=1e-6)
    slots = np.where(_spots() == 0, 0, np.where(_spots() == 3, 2, np.where(_spots() == 10, 3, 1)))
    np.testing.assert_array_equal(maps["components"], slots)
    np.testing.assert_array_equal(maps["above"], slots > 0)


@pytest.mark.parametrize(
    ("threshold", "level", "found"),
    [("mean", 0.5, 3), ("max", 0.5, 1), ("max", 0.3, 2), ("quantile", 0.9, 3), ("otsu", 0.5, 1)],
)
def test_thresholds_let_through_what_they_should(threshold, level, found):
    layer = InstanceCrops(crop_size=2, label_size=8, threshold=threshold, level=level)
    _, _, mask = layer(_spots() + _small_slope(), np.zeros((1, 8, 8, 1), "float32"))
    assert int(np.sum(mask)) == found


def _small_slope():
    """Makes all values different, so that quantiles do not fall on equal ones."""
    return np.linspace(0, 1e-3, 64, dtype="float32").reshape(1, 8, 8)


def test_more_components_than_slots_and_other_components_are_left_out():
    layer = InstanceCrops(k=2, crop_size=2, label_size=8)
    _, boxes, mask, maps = layer(_spots(), np.zeros((1, 8, 8, 1), "float32"), return_attention_scores=True)
    assert boxes[0].numpy().tolist() == [[6, 5, 8, 7], [0, 0, 4, 3]]
    assert mask.numpy().all()
    assert int(np.max(maps["components"])) == 2
    assert np.sum(maps["above"]) > np.sum(np.asarray(maps["components"]) > 0)
    np.testing.assert_allclose(maps["weights"][0], np.array([50, 36]) / 96, rtol=1e-6)


def test_boxes_lie_in_each_image_s_own_size():
    attention = np.repeat(_spots(), 2, axis=0)
    size = np.array([[64, 80], [32, 16]], "int32")
    _, boxes, _ = InstanceCrops(crop_size=2, label_size=8)(attention, _images(2, 70, 90, 3), size=size)
    grid = boxes.numpy() / np.array([80, 64, 80, 64])
    np.testing.assert_allclose(grid[0], boxes[1] / np.array([16, 32, 16, 32]))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_what_is_found_does_not_depend_on_the_precision(policy):
    """Neither the components nor the edges of boxes, which half precision could not write down."""
    attention, images = _attention(3), _images(3, 300, 5000, 1)
    plain, mixed = (
        InstanceCrops(crop_size=8, dtype=dtype)(attention, images) for dtype in ("float32", policy)
    )
    assert mixed[1].dtype == "float32"
    np.testing.assert_array_equal(mixed[1], plain[1])
    np.testing.assert_array_equal(mixed[2], plain[2])
    assert mixed[0].dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(tf.cast(mixed[0], "float32"), plain[0], rtol=1e-2)


def test_pixels_carry_a_gradient_and_places_none():
    attention, images = tf.constant(_attention(2)), tf.constant(_images(2, 30, 40, 3, dtype="float32"))
    layer = InstanceCrops(k=2, crop_size=5, label_size=14)
    with tf.GradientTape() as tape:
        tape.watch([attention, images])
        crops, boxes, mask = layer(attention, images)
        loss = tf.reduce_sum(crops) + tf.reduce_sum(boxes)
    places, pixels = tape.gradient(loss, [attention, images])
    assert places is None
    # each number of a real slot's crop is a mean of pixels with weights of sum 1
    np.testing.assert_allclose(tf.reduce_sum(tf.convert_to_tensor(pixels)), 75 * np.sum(mask), rtol=1e-5)


def test_only_crops_are_converted_to_float():
    layer = InstanceCrops(k=2, crop_size=4, label_size=14)
    graph = tf.function(layer).get_concrete_function(
        tf.TensorSpec((2, 7, 7)), tf.TensorSpec((2, 200, 300, 3), "uint8")
    )
    tensors = [tensor for op in graph.graph.get_operations() for tensor in op.outputs]
    whole = [tensor for tensor in tensors if (tensor.shape.num_elements() or 0) >= 2 * 200 * 300 * 3]
    assert whole
    assert {tensor.dtype for tensor in whole} <= {tf.uint8, tf.resource}


@pytest.mark.parametrize("value", [0.0, 0.1, np.nan])
def test_nothing_is_found_on_a_map_without_contrast(value):
    crops, boxes, mask, maps = InstanceCrops(crop_size=4)(
        np.full((2, 7, 7), value, "float32"), _images(2, 20, 20, 3), return_attention_scores=True
    )
    for array in (crops, boxes, mask, *maps.values()):
        assert not np.any(array)


@pytest.mark.parametrize("export", [exports._onnx, exports._litert], ids=["onnx", "litert"])
def test_long_paths_and_sorting_thresholds_exported(export, tmp_path):
    """Random maps on the grid itself: components wind through all of it."""
    attention, images = keras.Input((None, None)), keras.Input((None, None, 3), dtype="uint8")
    outputs = InstanceCrops(crop_size=9, threshold="otsu")(attention, images)
    above = keras.layers.Lambda(lambda x: above_threshold(x, "quantile", 0.6), output_shape=(None, None))
    model = keras.Model([attention, images], [*outputs, above(attention)])
    arrays = [np.random.default_rng(0).random((5, 56, 56)).astype("float32"), _images(5, 50, 70, 3)]
    expected = model(arrays)
    for answer, reference in zip(export(model, tmp_path)(arrays), expected, strict=True):
        np.testing.assert_allclose(answer, reference, rtol=1e-4, atol=1e-4)


def test_with_gated_attention_in_one_compiled_model():
    """The loss trains the blocks that say where to look, beside the crops that they choose."""
    maps, images = keras.Input((7, 7, 8)), keras.Input((None, None, 3), dtype="uint8")
    gate = GatedAttention(dilations=(2,))
    gated, scores = gate(maps, return_attention_scores=True)
    crops, _, _ = InstanceCrops(k=2, crop_size=4, label_size=14)(scores["attention"], images)
    instances = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(crops))
    pooled = keras.layers.GlobalAveragePooling2D()(gated)
    answer = keras.layers.Dense(2)(keras.layers.Concatenate()([pooled, instances]))
    model = keras.Model([maps, images], answer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=True)
    data = [np.random.default_rng(0).gamma(2, size=(8, 7, 7, 8)).astype("float32"), _images(8, 90, 120, 3)]
    before = [kernel.numpy() for kernel in gate.kernels]
    losses = model.fit(data, np.arange(8) % 2, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for kernel, old in zip(gate.kernels, before, strict=True):
        assert np.abs(kernel - old).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "Received: k=0"),
        ({"k": 10, "label_size": 3}, "Received: k=10"),
        ({"crop_size": 0}, "Received: crop_size=0"),
        ({"label_size": 4096}, "Received: label_size=4096"),
        ({"threshold": "median"}, "Received: threshold='median'"),
        ({"level": 1.5}, "Received: level=1.5"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        InstanceCrops(**options)


def test_ranks_are_checked():
    with pytest.raises(
        ValueError, match=r"takes attention \(B, h, w\) and images .*images.shape=\(2, 9, 9\)"
    ):
        InstanceCrops()(np.zeros((2, 3, 3), "float32"), np.zeros((2, 9, 9), "float32"))
