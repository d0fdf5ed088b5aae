import conformance
import keras
import numpy as np
import pytest
import reference.mims
import tensorflow as tf

from keras_medattn.layers import MSConv, TopKPool


def _bag(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_weights_decay_exponentially_at_the_start():
    layer = TopKPool()
    _, scores = layer(_bag(1, 9, 2), return_attention_scores=True)
    np.testing.assert_allclose(scores["weights"][0, 0], [0.434, 0.260, 0.156, 0.094, 0.056], atol=5e-4)
    np.testing.assert_allclose(layer.logits, np.arange(5) * np.log(0.6), rtol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_scores_equal_the_equation(per_channel):
    layer = TopKPool(k=4, per_channel=per_channel)
    bags = [_bag(3, 700, 3), _bag(3, 6, 2, seed=1)]
    masks = [np.arange(700) < [[700], [3], [0]], np.arange(6) < [[2], [6], [0]]]
    pairs = list(zip(bags, masks, strict=True))
    layer(pairs)
    conformance.randomise(layer)
    assert layer.logits.shape == ((5, 4) if per_channel else (4,))
    pooled, scores = layer(pairs, return_attention_scores=True)
    expected = reference.mims.top_k_pool(
        conformance.values_of(layer), [(bag.astype("float64"), mask) for bag, mask in pairs]
    )
    np.testing.assert_allclose(pooled, expected.pop("pooled"), rtol=1e-5, atol=1e-6)
    assert scores.keys() == expected.keys()
    assert scores["indices"].dtype == "int32"
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5, atol=1e-6)


def test_a_bag_a_list_and_pairs_are_pooled_alike():
    bag, mask = _bag(2, 9, 3), np.arange(9) < [[9], [6]]
    layer = TopKPool(3)
    np.testing.assert_array_equal(layer(bag), layer([bag]))
    np.testing.assert_array_equal(layer(bag, mask=mask), layer([(bag, mask)]))
    np.testing.assert_array_equal(layer([bag, bag], mask=[mask, mask]), layer([(bag, mask)] * 2))
    assert np.abs(layer(bag, mask=mask) - layer(bag)).max() > 0


def test_the_answer_does_not_depend_on_the_order_of_positions():
    bag, layer = _bag(2, 900, 3), TopKPool()
    np.testing.assert_allclose(layer(bag), layer(bag[:, ::-1]), rtol=1e-6)


def test_symbolic_scores_have_the_eager_shapes_and_types():
    inputs = keras.Input((None, 3))
    pooled, scores = TopKPool(2)(inputs, return_attention_scores=True)
    eager_pooled, eager = keras.Model(inputs, [pooled, scores])(_bag(2, 7, 3))
    assert pooled.shape[1:] == eager_pooled.shape[1:] == (3,)
    for name, symbolic in scores.items():
        assert symbolic.shape[1:] == eager[name].shape[1:] == (3, 2)
        assert symbolic.dtype == eager[name].dtype


def test_softmax_is_taken_in_float32_under_half_precision():
    layer = TopKPool(k=3, dtype="mixed_float16")
    layer.build((None, None, 1))
    layer.logits.assign([0.0, -9.0, -20.0])  # exp(-20) is 0 in float16
    with tf.GradientTape() as tape:
        pooled = layer(1e3 * np.ones((1, 4, 1), "float16") * np.array([4, 3, 2, 1], "float16")[:, None])
        loss = tf.reduce_sum(tf.cast(pooled, "float32"))
    assert pooled.dtype == "float16"
    gradient = tape.gradient(loss, layer.logits.value)
    np.testing.assert_allclose(gradient[2], -2e3 * np.exp(-20), rtol=1e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_together_with_ms_conv_in_a_functional_model(masked):
    maps, mask = _bag(2, 3, 8, 8, 4), np.array([[1, 1, 0], [1, 0, 0]], bool)
    inputs = keras.Input((None, None, None, 4)), keras.Input((None,), dtype="bool")
    conv, pool = MSConv(), TopKPool()
    model = keras.Model(inputs, pool(conv(inputs[0], mask=inputs[1] if masked else None)))
    bags = reference.mims.ms_conv(
        conformance.values_of(conv),
        maps.astype("float64"),
        mask if masked else None,
        kernels=conv.kernels,
        scales=conv.scales,
    )
    expected = reference.mims.top_k_pool(conformance.values_of(pool), bags)["pooled"]
    np.testing.assert_allclose(model([maps, mask]), expected, rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"fewer than 5 positions.*Received: k=5"):
        TopKPool()(_bag(1, 4, 2))
    with pytest.raises(ValueError, match=r"fewer than 5 positions.*Received: k=5"):
        TopKPool()([_bag(1, 9, 2), _bag(1, 4, 2)])
    with pytest.raises(ValueError, match="Received: k=0"):
        TopKPool(0)
    with pytest.raises(ValueError, match="Received: shape"):
        TopKPool()(_bag(2, 3))
