import conformance
import keras
import numpy as np
import pytest
import reference.mims
import tensorflow as tf

from keras_medattn.layers import MSConv, TopKPool

OCT, FUNDUS, HISTOLOGY = ((2, 8), (3, 10)), ((2, 10), (3, 10)), ((1, 20), (2, 40))


def _maps(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize(("kernels", "count"), [(OCT, 249_874), (FUNDUS, 266_260), (HISTOLOGY, 368_700)])
def test_the_papers_parameter_counts(kernels, count):
    layer = MSConv(kernels)
    layer.build((None, None, None, 2048))
    assert sum(convolution.count_params() for convolution in layer.convolutions) == count
    assert layer.sw.shape == (3, sum(channels for _, channels in kernels))
    np.testing.assert_array_equal(layer.sw, 1)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_defaults_and_the_plain_batch_norm_equal_the_equation(center, training):
    maps = _maps(2, 9, 8, 5)
    layer = MSConv(center=center)
    layer(maps)
    conformance.randomise(layer)
    weights = conformance.values_of(layer)
    assert any("beta" in name for name in weights) == center
    assert not any("gamma" in name for name in weights)
    expected = reference.mims.ms_conv(
        weights, maps.astype("float64"), kernels=OCT, scales=layer.scales, training=training
    )
    for bag, (answer, _) in zip(layer(maps, training=training), expected, strict=True):
        np.testing.assert_allclose(bag, answer, rtol=1e-5, atol=1e-5)


def test_moving_statistics_follow_the_batch_with_the_momentum():
    maps, layer = _maps(4, 8, 8, 3), MSConv(((2, 3),), (1.0,), momentum=0.9)
    layer(maps, training=True)
    kernel, bias = (weight.numpy().astype("float64") for weight in layer.convolutions[0].weights)
    answers = reference.convolve_valid(maps.astype("float64"), kernel, bias)
    normalization = layer.normalizations[0]
    np.testing.assert_allclose(
        normalization.moving_mean, 0.1 * answers.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        normalization.moving_variance, 0.9 + 0.1 * answers.var(axis=(0, 1, 2)), rtol=1e-5
    )


def test_activation_comes_last():
    maps = _maps(1, 6, 6, 2)
    layer = MSConv(((2, 3),), (1.0,), activation="relu")
    layer(maps)
    conformance.randomise(layer)
    linear = MSConv(((2, 3),), (1.0,))
    linear.build(maps.shape)
    linear.set_weights(layer.get_weights())
    np.testing.assert_array_equal(layer(maps)[0], np.maximum(linear(maps)[0], 0))
    assert layer.get_config()["activation"] == "relu"


def test_a_volume_is_its_slices():
    """Outside training each slice is worked on alone; a scale holds all slices before the next begins."""
    volume, layer = _maps(2, 3, 8, 7, 4), MSConv()
    bags = layer(volume)
    alone = [layer(volume[:, s]) for s in range(3)]
    for group, (size, _) in enumerate(layer.kernels):
        first, places = 0, []
        for scale in layer.scales:
            cells = (int(8 * scale) - size + 1) * (int(7 * scale) - size + 1)
            places += [bags_of[group][:, first : first + cells] for bags_of in alone]
            first += cells
        np.testing.assert_allclose(bags[group], np.concatenate(places, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height", [8, 5, 4, 3, 2, 1])
def test_small_maps_of_unknown_size_give_fewer_positions_and_no_nan(height):
    layer = MSConv()
    graph = tf.function(
        lambda maps: layer(maps, training=True), input_signature=[tf.TensorSpec((None, None, None, 3))]
    )
    maps = _maps(2, height, 7, 3)
    bags = graph(maps)
    for group, (size, _) in enumerate(layer.kernels):
        cells = [max(int(height * s) - size + 1, 0) * max(int(7 * s) - size + 1, 0) for s in layer.scales]
        assert bags[group].shape[1] == sum(cells)
        assert np.isfinite(bags[group]).all()
    assert all(np.isfinite(weight).all() for weight in layer.get_weights())


def test_sizes_known_only_at_run_time_change_no_batch_statistics():
    maps, layers = _maps(2, 8, 7, 3), [MSConv(), MSConv()]
    for layer in layers:
        layer(maps)
        conformance.randomise(layer)
    signature = [tf.TensorSpec((None, None, None, 3))]
    graph = tf.function(lambda maps: layers[1](maps, training=True), input_signature=signature)
    for bag, known in zip(graph(maps), layers[0](maps, training=True), strict=True):
        np.testing.assert_allclose(bag, known, rtol=1e-4, atol=1e-5)
    for weight, known in zip(layers[1].weights, layers[0].weights, strict=True):
        np.testing.assert_allclose(weight, known, rtol=1e-5, atol=1e-6)


def test_a_map_without_any_position_pools_to_zero():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, TopKPool()(MSConv()(inputs)))
    run = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 3))])
    np.testing.assert_array_equal(run(_maps(2, 1, 1, 3)), 0)


def test_a_mask_with_slices_of_its_own_gives_the_mask_of_each_position():
    mask = np.array([[True, False, True], [False, True, True]])
    for bag, valid in MSConv(((2, 3),), (0.5, 1.0))(_maps(2, 3, 6, 6, 2), mask=mask):
        expected = np.concatenate([np.repeat(mask, 4, axis=1), np.repeat(mask, 25, axis=1)], axis=1)
        np.testing.assert_array_equal(valid, expected)
        assert bag.shape == (2, 87, 3)


@pytest.mark.parametrize("shape", [(1, 4, 8, 3), (1, 8, 5, 3), (1, 2, 4, 8, 3), (1, None, 4, 3)])
def test_a_map_smaller_than_a_kernel_names_the_scale(shape):
    with pytest.raises(ValueError, match=r"At scale 0\.5 .* size 3.*Received: shape="):
        MSConv().build(shape)


def test_errors():
    with pytest.raises(ValueError, match="Received: kernels"):
        MSConv(kernels=())
    with pytest.raises(ValueError, match="Received: scales"):
        MSConv(scales=(0.0,))
    with pytest.raises(ValueError, match="Received: shape"):
        MSConv()(_maps(8, 8, 3))
    with pytest.raises(ValueError, match="Received: mask"):
        MSConv()(_maps(1, 8, 8, 3), mask=np.ones((1, 1), bool))
