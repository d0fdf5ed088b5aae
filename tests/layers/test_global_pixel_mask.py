import subprocess
import sys
import zipfile

import conformance
import keras
import numpy as np
import pytest
import reference.global_pixel_mask
import tensorflow as tf

from keras_medattn.layers import GlobalPixelMask
from keras_medattn.ops import masking


def _images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def _ready(images, **arguments):
    """An adapted, built layer and a batch for it."""
    layer, batch = GlobalPixelMask(**arguments), images[:2]
    layer.adapt(images)
    layer(batch)
    return layer, batch


@pytest.mark.parametrize(
    ("count", "channels", "hidden"), [(5, 3, 32), (9, 1, 62), (2, 3, 1)], ids=["a", "b", "c"]
)
def test_parameter_count(count, channels, hidden):
    layer, _ = _ready(_images(count, 5, 6, channels), channels=hidden)
    trained = sum(int(np.prod(weight.shape)) for weight in layer.trainable_weights)
    assert trained == hidden * (9 * count * channels + 1) + (hidden + 1)


def test_streamed_equals_whole_at_scale(monkeypatch):
    """N = 96, 64 x 64: the mask and every gradient, against Keras's convolutions over the whole P."""
    monkeypatch.setattr(masking, "_POSITIONS", 256)
    images, upstream = _images(96, 64, 64, 3), _images(1, 64, 64, 1, seed=1)
    layer, _ = _ready(images, channels=32)
    assert len(layer._tiles) == 4
    whole = keras.Sequential(
        [
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )
    pixels = images.transpose(1, 2, 0, 3).reshape(1, 64, 64, 288)
    whole(pixels[:, :3, :3])
    for weight, value in zip(layer.trainable_weights, whole.weights, strict=True):
        weight.assign(value)

    def step(make, weights):
        with tf.GradientTape() as tape:
            mask = make()
            loss = tf.reduce_sum(mask * upstream)
        return mask, tape.gradient(loss, [weight.value for weight in weights])

    mask, gradients = step(layer.pixel_mask, layer.trainable_weights)
    expected, references = step(lambda: whole(pixels), whole.weights)
    np.testing.assert_allclose(mask, expected, rtol=0, atol=1e-5)
    assert np.ptp(mask) > 0.3
    for gradient, other in zip(gradients, references, strict=True):
        assert np.abs(gradient - other).max() < 1e-5 * np.abs(other).max()


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 5},
        {"kernel_size": 7, "last_kernel_size": 3},
        {"channels": (4, 3, 2)},
        {"channels": (4, 3, 2), "dense": True, "last_kernel_size": 5},
    ],
    ids=str,
)
def test_variants_equal_the_equation(arguments):
    images = _images(3, 7, 9, 2)
    layer, batch = _ready(images, **{"channels": 5, **arguments})
    for weight in layer.trainable_weights:
        weight.assign(np.random.default_rng(3).normal(size=weight.shape) * 0.3)
    mask = reference.global_pixel_mask.mask(
        conformance.values_of(layer), images.astype("float64"), layer.dense
    )
    np.testing.assert_allclose(layer(batch), batch * mask, rtol=1e-5, atol=1e-5)
    assert np.ptp(mask) > 0.1


def test_arrays_data_sets_and_readers_are_alike():
    images = _images(7, 4, 5, 3)
    data_set = tf.data.Dataset.from_tensor_slices(images)
    given = [
        tf.constant(images),
        data_set.batch(3),
        data_set,
        (image for image in images),
        iter([images[:1], images[1:6], images[6]]),
    ]
    layer, _ = _ready(images, channels=4)
    for each in given:
        layer.adapt(each)  # an error if they were others
        again = GlobalPixelMask(channels=4)
        again.adapt(each if not hasattr(each, "__next__") else images)
        np.testing.assert_array_equal(again._tiles, layer._tiles)
    whole_numbers = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), "uint8")
    layer, again = GlobalPixelMask(), GlobalPixelMask()
    layer.adapt(whole_numbers)
    again.adapt(whole_numbers.astype("float32"))
    np.testing.assert_array_equal(again._tiles, layer._tiles)


def test_other_images_are_an_error():
    images = _images(5, 4, 6, 3)
    layer, _ = _ready(images, channels=2)
    for other in (images[::-1], images[:4], images + 1e-3, images.reshape(5, 6, 4, 3)):
        with pytest.raises(ValueError, match=r"other images, or .* another order.*Received"):
            layer.adapt(other)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 4, 4, 3)), "Received: none"),
        ([np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 5, 3))], r"one size.*\(4, 5, 3\)"),
        (np.full((1, 4, 4, 3), np.nan), "finite"),
        ([(np.zeros((2, 4, 4, 3)), np.zeros(2))], "images alone. Received: a tuple"),
        (np.zeros((4, 4)), r"shape \(4, 4\)"),
    ],
    ids=["none", "sizes", "nan", "labels", "no images"],
)
def test_images_that_are_none(images, message):
    with pytest.raises(ValueError, match=message):
        GlobalPixelMask().adapt(images)


def test_errors():
    with pytest.raises(ValueError, match=r"call `adapt`.*Received: no images"):
        GlobalPixelMask()(_images(1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"call `adapt`.*Received: no images"):
        GlobalPixelMask()(keras.Input((4, 4, 3)))
    for arguments in (
        {"channels": 0},
        {"kernel_size": 4},
        {"last_kernel_size": 2},
        {"l1": -1.0},
        {"reduction": "max"},
        {"reduce": ("svd", 3)},
    ):
        with pytest.raises(ValueError, match="Received: "):
            GlobalPixelMask(**arguments)
    layer = GlobalPixelMask()
    with pytest.raises(ValueError, match="never called"):
        layer.freeze()
    layer.adapt(_images(2, 4, 5, 3))
    for unlike in (_images(1, 4, 6, 3), keras.Input((5, None, 3))):
        with pytest.raises(ValueError, match=r"\[4, 5\] pixels"):
            layer(unlike)
    layer(_images(1, 4, 5, 3))
    layer.freeze()
    with pytest.raises(ValueError, match="is frozen"):
        layer.adapt(_images(2, 4, 5, 3))


@pytest.mark.parametrize(("reduction", "norm"), [("sum", np.sum), ("mean", np.mean)])
def test_l1_joins_the_loss_until_frozen(reduction, norm):
    layer, batch = _ready(_images(3, 4, 5, 3), channels=4, l1=0.5, reduction=reduction)
    with tf.GradientTape() as tape:
        layer(batch)
        [loss] = layer.losses
    np.testing.assert_allclose(loss, 0.5 * norm(layer.pixel_mask()), rtol=1e-6)
    gradients = tape.gradient(loss, [weight.value for weight in layer.trainable_weights])
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)
    layer.freeze()
    layer(batch)
    assert not layer.losses


def test_attention_is_the_mask_for_each_image():
    layer, batch = _ready(_images(3, 4, 5, 3), channels=4)
    masked, scores = layer(batch, return_attention_scores=True)
    mask = np.broadcast_to(layer.pixel_mask()[..., 0], (2, 4, 5))
    np.testing.assert_array_equal(scores["attention"], mask)
    np.testing.assert_allclose(masked, batch * mask[..., None], rtol=1e-6)
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layer(inputs, return_attention_scores=True))
    np.testing.assert_allclose(model(batch)[1]["attention"], mask, rtol=1e-6)


def test_the_mask_is_computed_once_a_call(monkeypatch):
    layer, _ = _ready(_images(3, 4, 5, 3), channels=4)
    calls, plain = [], masking.convolve_tiles
    monkeypatch.setattr(masking, "convolve_tiles", lambda *args: calls.append(1) or plain(*args))
    layer(_images(9, 4, 5, 3))
    assert len(calls) == 1


def test_initializer_of_the_papers_framework():
    start = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=0)
    layer, _ = _ready(_images(20, 5, 6, 3), kernel_initializer=start)
    limit = 1 / np.sqrt(9 * 20 * 3)
    assert 0.99 * limit < np.abs(layer.kernel_0).max() <= limit


def test_bfloat16_agrees_with_float32():
    images = _images(24, 16, 16, 3)
    layer, _ = _ready(images)
    other, _ = _ready(images, dtype="mixed_bfloat16")
    other.set_weights(layer.get_weights())
    assert other._tiles.dtype == "bfloat16"
    difference = np.abs(other.pixel_mask() - layer.pixel_mask())
    assert 0 < difference.max() < 1e-2


RELOAD = """
import sys
import keras, numpy as np
import keras_medattn.layers
model = keras.models.load_model(sys.argv[1] + "/model.keras")
assert [weight.name for weight in model.get_layer("mask").weights] == ["mask"]
images = np.load(sys.argv[1] + "/images.npy")
np.save(sys.argv[1] + "/again.npy", keras.ops.convert_to_numpy(model(images)))
"""


def _model(layer):
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, layer(inputs))


@pytest.mark.parametrize("reduce", [None, ("pca", 4)], ids=str)
def test_frozen_in_a_fresh_process_without_the_images(reduce, tmp_path):
    layer, batch = _ready(_images(120, 8, 9, 3), channels=4, name="mask", reduce=reduce)
    model = _model(layer)
    expected = model(batch)
    layer.freeze()
    frozen = model(batch)
    np.testing.assert_allclose(frozen, expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", batch)
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert sum(item.file_size for item in file.filelist) < 120 * 8 * 9 * 3  # one byte a number
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "again.npy"), frozen)


@pytest.mark.parametrize("reduce", [None, ("pca", 4)], ids=str)
def test_a_file_saved_before_asks_for_the_same_images(reduce, tmp_path):
    images = _images(6, 8, 9, 3)
    layer, batch = _ready(images, channels=4, name="mask", reduce=reduce)
    model = _model(layer)
    expected = model(batch)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"call `adapt`.*Received: no images"):
        again(batch)
    with pytest.raises(ValueError, match="other images"):
        again.get_layer("mask").adapt(images[::-1])
    again.get_layer("mask").adapt(images)
    np.testing.assert_array_equal(again(batch), expected)


def test_reduced_images():
    images = _images(12, 6, 7, 3)
    all_axes, _ = _ready(images, reduce=("pca", 36))
    np.testing.assert_allclose(all_axes.variance_kept, 1, rtol=1e-5)
    for method, count in (("pca", 6), ("projection", 6), ("subsample", 2)):
        layer, _ = _ready(images, channels=4, reduce=(method, count))
        assert layer.kernel_0.shape == (3, 3, 6, 4)
        assert 0.1 < layer.variance_kept < 0.6
        mask = reference.global_pixel_mask.mask
        values = conformance.values_of(layer)
        full = np.einsum("fq,ijqk->ijfk", values["projection"], values["kernel_0"])
        expected = mask({**values, "kernel_0": full}, images.astype("float64"))
        np.testing.assert_allclose(layer.pixel_mask(), expected, rtol=1e-4, atol=1e-5)


def test_algorithm_1_trains_both_and_then_the_image_cnn_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 48)
    images = rng.normal(size=(48, 8, 8, 1)).astype("float32")
    images[:, :4] += 0.5 * (2 * labels - 1)[:, None, None, None]
    layer = GlobalPixelMask(channels=8, l1=0.001)
    layer.adapt(images)
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs))))

    def fit():
        model.compile(keras.optimizers.Adam(0.02), keras.losses.BinaryCrossentropy(from_logits=True))
        return model.fit(images, labels, batch_size=16, epochs=8, verbose=0).history["loss"]

    before = layer.get_weights()
    losses = fit()
    assert losses[-1] < 0.7 * losses[0]
    for weight, start in zip(layer.trainable_weights, before[1:], strict=True):
        assert np.abs(weight - start).max() > 1e-3
    layer.freeze()
    mask = layer.pixel_mask().numpy()
    assert fit()[-1] < losses[-1]
    np.testing.assert_array_equal(layer.pixel_mask(), mask)
    assert [weight.path for weight in layer.weights] == [layer.mask.path]
