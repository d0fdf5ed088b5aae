import numpy as np
import pytest
from keras import ops

from keras_medattn.ops.comparison import channel_attention, channel_mean, reduced, softmax_pool


def test_channel_mean_of_half_precision_does_not_overflow():
    features = np.full((1, 1, 2, 100), 6e4, "float16")  # their sum is beyond float16
    mean = channel_mean(ops.convert_to_tensor(features))
    assert mean.dtype == "float16"
    np.testing.assert_array_equal(mean, features[..., 0])


def test_softmax_pool_chooses_and_averages():
    features = np.arange(12, dtype="float32").reshape(1, 2, 3, 2)
    logits = np.zeros((1, 2, 3), "float32")
    pooled, weights = softmax_pool(features, logits)
    np.testing.assert_allclose(pooled, [[5, 6]], rtol=1e-6)
    logits[0, 1, 0] = 1e4  # more than exp can take
    pooled, weights = softmax_pool(features, logits)
    np.testing.assert_array_equal(pooled, features[:, 1, 0])
    np.testing.assert_array_equal(weights, logits > 0)


def test_softmax_pool_of_many_positions_in_half_precision():
    features = np.ones((1, 300, 300, 1), "float16")  # 90,000 equal weights
    pooled, weights = softmax_pool(ops.convert_to_tensor(features), np.zeros((1, 300, 300), "float16"))
    assert pooled.dtype == weights.dtype == "float16"
    np.testing.assert_allclose(pooled, 1, rtol=1e-3)


def test_danet_form_attends_to_the_unlike_channel():
    """Products of a thousand positions, which float16 cannot hold; the third channel is minus the others."""
    features = np.ones((1, 100, 10, 3), "float16") * np.array([9, 9, -9], "float16")
    mixed, affinity = channel_attention(ops.convert_to_tensor(features), "danet")
    np.testing.assert_array_equal(affinity[0], [[0, 0, 1], [0, 0, 1], [0.5, 0.5, 0]])
    np.testing.assert_array_equal(mixed, features[..., ::-1] * np.array([1, -1, 1], "float16"))


def test_trilinear_form_follows_the_brightest_position():
    """The inner softmax picks a channel's brightest position, the outer one the brightest channel there."""
    features = np.zeros((1, 1, 2, 3), "float32")
    features[0, 0, 0], features[0, 0, 1] = [40, 0, 90], [0, 50, 0]
    _, affinity = channel_attention(features)
    np.testing.assert_allclose(affinity[0], [[0, 0, 1], [0, 1, 0], [0, 0, 1]], atol=1e-6)


def test_reduced():
    assert reduced(33, 16) == 2
    for channels, ratio, least in ((15, 16, 1), (31, 16, 2), (8, 0, 1)):
        with pytest.raises(ValueError, match=f"Received: ratio={ratio}, channels={channels}"):
            reduced(channels, ratio, least)
