import conformance
import keras
import numpy as np
import pytest
import reference.channel_spatial
import tensorflow as tf

from keras_medattn.layers import ChannelAttn, SpatialAttn


def _maps(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32") / 4


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "strides"),
    [(8, 12, 4, 4), (5, 7, 4, 4), (1, 3, 4, 4), (9, 6, 7, 4), (6, 7, 1, 2)],
)
def test_answer_and_scores_equal_the_equation(height, width, kernel_size, strides):
    layer = ChannelAttn(kernel_size, strides)
    maps = _maps(2, height, width, 3)
    layer.build(maps.shape)
    conformance.randomise(layer)
    expected = reference.channel_spatial.channel_attn(
        conformance.values_of(layer), maps.astype("float64"), kernel_size=kernel_size, strides=strides
    )
    answer, scores = layer(maps, return_attention_scores=True)
    np.testing.assert_allclose(answer, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(maps), answer, rtol=1e-6)


def test_columns_of_the_scores_sum_to_one():
    layer = ChannelAttn()
    _, scores = layer(_maps(2, 8, 8, 5), return_attention_scores=True)
    np.testing.assert_allclose(np.sum(scores, axis=1), 1, rtol=1e-5)
    assert np.abs(np.sum(scores, axis=2) - 1).max() > 0.01


def test_scores_are_summed_in_float32_under_half_precision():
    """The sum over the positions is beyond float16's range."""
    layer = ChannelAttn(dtype="mixed_float16")
    maps = np.full((1, 64, 64, 2), 2.0, "float16")
    layer.build(maps.shape)
    layer.query.assign(np.full((4, 4, 2, 2), 0.25))
    layer.key.assign(np.full((4, 4, 2, 2), 0.25))
    layer.value.assign(np.eye(2))
    answer, scores = layer(maps, return_attention_scores=True)  # all scores are 256 * 16 * 16 = 65536
    assert (answer.dtype, scores.dtype) == ("float16", "float32")
    np.testing.assert_allclose(scores, 0.5)
    np.testing.assert_allclose(answer, 4)


def test_symbolic_scores_have_the_eager_shapes_and_types():
    inputs = keras.Input((None, None, 3))
    outputs = ChannelAttn(dtype="mixed_bfloat16")(inputs, return_attention_scores=True)
    answers = keras.Model(inputs, outputs)(_maps(2, 5, 6, 3))
    for symbolic, answer, size in zip(outputs, answers, ((5, 6, 3), (3, 3)), strict=True):
        assert answer.shape == (2, *size)
        assert all(known in (None, size) for known, size in zip(symbolic.shape, answer.shape, strict=True))
        assert symbolic.shape[-1] == 3
        assert tf.as_dtype(symbolic.dtype) == answer.dtype


def test_parameters_in_vgg19_are_those_of_the_paper():
    """C-Attn after blocks 1 and 2, S-Attn after blocks 3 to 5, at 224 x 224."""
    places = {
        ChannelAttn: [(224, 64), (112, 128)],
        SpatialAttn: [(56, 256), (28, 512), (14, 512)],
    }
    total = 0
    for kind, sizes in places.items():
        for side, channels in sizes:
            layer, maps = kind(), keras.Input((side, side, channels))
            assert layer(maps).shape == maps.shape
            total += layer.count_params()
    assert total == 1_413_120


@pytest.mark.parametrize("arguments", [{"kernel_size": 0}, {"strides": 0}])
def test_argument_errors(arguments):
    with pytest.raises(ValueError, match=r"Received: kernel_size=\d, strides=\d"):
        ChannelAttn(**arguments)


def test_shape_errors():
    with pytest.raises(ValueError, match=r"Received: shape=\(2, 4, 3\)"):
        ChannelAttn()(_maps(2, 4, 3))
