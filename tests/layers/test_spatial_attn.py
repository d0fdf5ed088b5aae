import conformance
import keras
import numpy as np
import pytest
import reference.channel_spatial
import tensorflow as tf

from keras_medattn.layers import SpatialAttn
from keras_medattn.ops import attention


def _maps(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _layer(maps, **arguments):
    layer = SpatialAttn(**arguments)
    layer.build(maps.shape)
    conformance.randomise(layer)
    return layer


def test_answer_and_scores_equal_the_equation():
    maps = _maps(2, 3, 5, 4)
    layer = _layer(maps, ratio=2)
    expected = reference.channel_spatial.spatial_attn(conformance.values_of(layer), maps.astype("float64"))
    answer, scores = layer(maps, return_attention_scores=True)
    np.testing.assert_allclose(answer, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sum(scores, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(layer(maps), answer, rtol=1e-6)


def test_in_blocks_the_layer_answers_and_learns_the_same(monkeypatch):
    maps = tf.constant(_maps(2, 7, 5, 4))
    layer = _layer(maps, ratio=2)

    def step():
        with tf.GradientTape() as tape:
            tape.watch(maps)
            answer = layer(maps)
            loss = tf.reduce_sum(tf.sin(answer))
        return answer, *tape.gradient(loss, [maps, *(weight.value for weight in layer.weights)])

    whole = step()
    monkeypatch.setattr(attention, "_WHOLE", 100)
    monkeypatch.setattr(attention, "_HELD", 8 * 2 * 35)  # 8 of the 35 queries
    for array, expected in zip(step(), whole, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


def test_the_answer_does_not_depend_on_the_order_of_the_positions():
    maps = _maps(2, 4, 6, 4)
    layer = _layer(maps)
    np.testing.assert_allclose(layer(maps[:, ::-1, ::-1]), layer(maps)[:, ::-1, ::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "ratio", "reduced"), [(16, 8, 2), (3, 8, 1), (5, 2, 2)])
def test_queries_and_keys_have_fewer_channels(channels, ratio, reduced):
    layer = SpatialAttn(ratio)
    assert np.isfinite(layer(_maps(1, 2, 2, channels))).all()
    assert {weight.name: weight.shape for weight in layer.weights} == {
        "query": (channels, reduced),
        "key": (channels, reduced),
        "value": (channels, channels),
    }


def test_symbolic_scores_have_the_eager_shapes_and_types():
    inputs, known = keras.Input((None, None, 3)), keras.Input((5, 6, 3))
    layer = SpatialAttn(dtype="mixed_bfloat16")
    outputs = layer(inputs, return_attention_scores=True)
    assert layer(known, return_attention_scores=True)[1].shape == (None, 30, 30)
    answers = keras.Model(inputs, outputs)(_maps(2, 5, 6, 3))
    for symbolic, answer, shape in zip(outputs, answers, ((2, 5, 6, 3), (2, 30, 30)), strict=True):
        assert answer.shape == shape
        assert tf.as_dtype(symbolic.dtype) == answer.dtype


def test_errors():
    with pytest.raises(ValueError, match="Received: ratio=0"):
        SpatialAttn(0)
    with pytest.raises(ValueError, match=r"Received: shape=\(2, 4, 3\)"):
        SpatialAttn()(_maps(2, 4, 3))
