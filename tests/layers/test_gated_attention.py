import conformance
import keras
import numpy as np
import pytest
import reference.gated
import tensorflow as tf

from keras_medattn.layers import GatedAttention


def _post_relu(*shape, smooth=False, seed=0):
    """Features as they come out of a ReLU: each cell on its own, or with neighbours alike."""
    x = np.random.default_rng(seed).normal(size=shape)
    if smooth:
        x = sum(np.roll(x, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 3
    return np.maximum(x, 0).astype("float32")


def _entropy(semantic):
    """Of each image's semantic map, as a part of the most there can be."""
    s = semantic.numpy().astype("float64").reshape(len(semantic), -1)
    return -(s * np.log(s + 1e-300)).sum(axis=1) / np.log(s.shape[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("sequential", [False, True])
def test_maps_equal_the_equation(sequential, reduce, training):
    options = {"dilations": (1, 3, 2), "sequential": sequential, "reduce": reduce}
    x = np.random.default_rng(0).normal(size=(3, 6, 5, 4)).astype("float32")
    layer = GatedAttention(filters=2, **options)
    layer.build(x.shape)
    conformance.randomise(layer)
    weights = conformance.values_of(layer)
    assert ("temperature" in weights) == (reduce == "mean")
    gated, maps = layer(x, training=training, return_attention_scores=True)
    expected = reference.gated.gated_attention(weights, x.astype("float64"), training=training, **options)
    np.testing.assert_allclose(gated, expected.pop("gated"), rtol=1e-4, atol=1e-5)
    assert maps.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name], values, rtol=1e-4, atol=1e-5)


def test_the_sum_is_a_temperature_of_as_many_as_there_are_filters():
    x = _post_relu(2, 7, 7, 8)
    layers = [GatedAttention(filters=6, reduce=reduce) for reduce in ("mean", "sum")]
    for layer in layers:
        layer.build(x.shape)
    for ours, theirs in zip(layers[0].kernels, layers[1].kernels, strict=True):
        ours.assign(theirs)
    layers[0].temperature.assign(6)
    maps = [layer(x, training=True, return_attention_scores=True)[1]["semantic"] for layer in layers]
    np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smooth", [False, True], ids=["independent cells", "smooth"])
@pytest.mark.parametrize(("channels", "size"), [(64, 7), (64, 14), (256, 14), (512, 7)])
@pytest.mark.parametrize("sequential", [False, True], ids=["parallel", "sequential"])
def test_the_semantic_map_starts_between_one_hot_and_uniform(sequential, channels, size, smooth):
    """Its entropy is about half of the most there can be, where a plain mean leaves it uniform."""
    x = _post_relu(8, size, size, channels, smooth=smooth)
    layer = GatedAttention(filters=min(channels, 128), sequential=sequential)
    _, maps = layer(x, training=True, return_attention_scores=True)
    assert 0.25 < _entropy(maps["semantic"]).mean() < 0.75
    layer.temperature.assign(1)
    assert _entropy(layer(x, training=True, return_attention_scores=True)[1]["semantic"]).min() > 0.98


def test_the_sum_starts_almost_one_hot():
    layer = GatedAttention(reduce="sum")
    _, maps = layer(_post_relu(8, 7, 7, 256), training=True, return_attention_scores=True)
    assert _entropy(maps["semantic"]).mean() < 0.15


def _kernel_gradients(x, start=None, **options):
    """Norms of the gradients of the dilated kernels, of a linear classifier on the pooled gated features."""
    keras.utils.set_random_seed(0)
    layer, head = GatedAttention(**options), keras.layers.Dense(5)
    layer.build(x.shape)
    if start is not None:
        layer.temperature.assign(start)
    with tf.GradientTape() as tape:
        scores = head(tf.reduce_mean(layer(x, training=True), axis=(1, 2)))
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(np.arange(len(x)) % 5, scores))
    kernels = [kernel.value for kernel in layer.kernels]
    return np.array([float(tf.norm(gradient)) for gradient in tape.gradient(loss, kernels)])


@pytest.mark.parametrize("sequential", [False, True], ids=["parallel", "sequential"])
def test_the_loss_reaches_the_dilated_kernels_through_the_gates(sequential):
    x = _post_relu(8, 7, 7, 128)
    found = _kernel_gradients(x, sequential=sequential)
    plain = _kernel_gradients(x, start=1, sequential=sequential)
    summed = _kernel_gradients(x, reduce="sum", sequential=sequential)
    assert (found > 10 * plain).all()  # a plain mean hardly trains them
    assert (found > summed / 10).all()
    assert (found < 10 * summed).all()


def test_gates_close_on_features_from_before_a_relu_alone():
    x = np.random.default_rng(0).normal(size=(4, 7, 7, 32)).astype("float32")
    layer = GatedAttention()
    before = layer(x, return_attention_scores=True)[1]["gates"].numpy()
    after = layer(np.maximum(x, 0), return_attention_scores=True)[1]["gates"].numpy()
    assert 0.2 < (before == 0).mean() < 0.8
    assert (after > 0).all()
    assert after.max() < 1


def test_the_attention_map_is_the_mean_of_the_answer():
    gated, maps = GatedAttention()(_post_relu(2, 7, 5, 16), return_attention_scores=True)
    np.testing.assert_allclose(maps["attention"], np.mean(gated, axis=3), rtol=1e-5)
    np.testing.assert_allclose(np.sum(maps["semantic"], axis=(1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * (9 * 64 * 64 + 2 * 64) + 1),
        ({"filters": 8}, 2 * (9 * 64 * 8 + 2 * 8) + 1),
        ({"filters": 8, "sequential": True, "reduce": "sum"}, 9 * 64 * 8 + 9 * 8 * 8 + 2 * 2 * 8),
    ],
)
def test_parameters(options, count):
    layer = GatedAttention(**options)
    layer.build((None, None, None, 64))
    assert sum(int(np.prod(weight.shape)) for weight in layer.trainable_weights) == count


def test_symbolic_maps_have_the_eager_shapes_and_types():
    inputs = keras.Input((None, None, 6))
    outputs = GatedAttention(dtype="mixed_float16")(inputs, return_attention_scores=True)
    eager = keras.Model(inputs, outputs)(_post_relu(2, 7, 5, 6))
    for symbolic, output in zip(*map(keras.tree.flatten, (outputs, eager)), strict=True):
        assert symbolic.dtype == output.dtype == "float16"
        assert all(a in (None, b) for a, b in zip(symbolic.shape, output.shape, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": 0}, "at least 1. Received: filters=0"),
        ({"dilations": ()}, r"Received: dilations=\(\)"),
        ({"dilations": (2, 0)}, r"Received: dilations=\(2, 0\)"),
        ({"reduce": "max"}, '"mean" or "sum". Received: reduce=\'max\''),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        GatedAttention(**options)


def test_a_bag_is_no_map():
    with pytest.raises(ValueError, match=r"takes maps \(B, h, w, C\). Received: shape=\(2, 9, 4\)"):
        GatedAttention()(np.zeros((2, 9, 4), "float32"))
