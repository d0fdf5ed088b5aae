"""What the comparison modules do beyond the checks of every layer."""

import conformance
import keras
import numpy as np
import pytest
import reference.comparison as equations
import tensorflow as tf
from rows import normal

from keras_medattn.layers import (
    AttentionGate,
    ChannelSelfAttention,
    DualAttention,
    GlobalContext,
    NonLocal,
    PixelWeights,
    ResidualAttention,
    SqueezeExcite,
)

MAPS = normal(2, 7, 9, 8)
PAIR = [MAPS, normal(2, 8, seed=1)]
WIDER = [MAPS, normal(2, 11, seed=1)]
CASES = {
    "non-local": (NonLocal(4), MAPS, equations.non_local),
    "trilinear": (ChannelSelfAttention(), MAPS, equations.trilinear),
    "danet": (ChannelSelfAttention("danet"), MAPS / 4, equations.danet_channels),
    "dual": (DualAttention(4), MAPS / 4, equations.dual_attention),
    "squeeze-excite": (SqueezeExcite(4), MAPS, equations.squeeze_excite),
    "global-context": (GlobalContext(4), MAPS, equations.global_context),
    "gate-dot": (AttentionGate(), PAIR, lambda w, x: equations.attention_gate(w, *x)),
    "gate-projected": (AttentionGate(), WIDER, lambda w, x: equations.attention_gate(w, *x)),
    "gate-parametrised": (
        AttentionGate("parametrised"),
        WIDER,
        lambda w, x: equations.attention_gate(w, *x),
    ),
    "residual": (
        ResidualAttention((2, 1, 2), depth=2),
        MAPS,
        lambda w, x: equations.residual_attention(w, x, False, (2, 1, 2), 2),
    ),
    "pixels": (PixelWeights(), MAPS, equations.pixel_weights),
}
each = pytest.mark.parametrize(("layer", "inputs", "equation"), CASES.values(), ids=CASES)


def _float32(inputs):
    return keras.tree.map_structure(lambda array: array.astype("float32"), inputs)


@each
def test_maps_equal_the_equations(layer, inputs, equation):
    layer(_float32(inputs))
    conformance.randomise(layer)
    features, scores = layer(_float32(inputs), return_attention_scores=True)
    np.testing.assert_array_equal(features, layer(_float32(inputs)))
    expected = equation(conformance.values_of(layer), inputs)
    np.testing.assert_allclose(features, expected.pop("features"), rtol=1e-5, atol=1e-5)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
@each
def test_symbolic_maps_are_the_eager_ones(layer, inputs, equation, unknown):
    layer(_float32(inputs))
    symbols, _ = conformance.symbolic((inputs, {}), unknown)
    outputs = layer(symbols, return_attention_scores=True)
    model = keras.Model(symbols, outputs)
    eager = layer(_float32(inputs), return_attention_scores=True)
    traced = model(_float32(inputs))
    groups = zip(*map(keras.tree.flatten, (outputs, eager, traced)), strict=True)
    for symbolic, output, again in groups:
        assert symbolic.dtype == keras.backend.standardize_dtype(output.dtype)
        sizes = zip(symbolic.shape, output.shape, strict=True)
        assert all(known in (None, size) for known, size in sizes), (symbolic.shape, output.shape)
        assert unknown or None not in symbolic.shape[1:]
        np.testing.assert_allclose(again, output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (NonLocal(), 1),
        (ChannelSelfAttention("danet"), 1),
        (DualAttention(), 2),
        (GlobalContext(2), 1),
        (PixelWeights(), 1),
    ],
    ids=["non-local", "danet", "dual", "global-context", "pixels"],
)
def test_a_new_layer_changes_a_network_as_documented(layer, factor):
    maps = _float32(MAPS)
    np.testing.assert_allclose(layer(maps), factor * maps, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (NonLocal(), 4 * 64 * 32),
        (ChannelSelfAttention(), 0),
        (ChannelSelfAttention("danet"), 1),
        (DualAttention(), 2 * 64 * 8 + 64 * 64 + 2),
        (SqueezeExcite(), 2 * 64 * 4),
        (GlobalContext(), 64 + 2 * 64 * 4 + 2 * 4),
        # six units of 2 C^2/4 + 9 C^2/16 and norms of C + C/4 + C/4, two convolutions C^2 and norms of C
        (ResidualAttention(), 6 * (2 * 64 * 16 + 9 * 16 * 16 + 2 * 96) + 2 * (64 * 64 + 2 * 64)),
        (PixelWeights(), 5 * 6),
    ],
    ids=lambda value: value.name if isinstance(value, keras.layers.Layer) else None,
)
def test_parameter_counts(layer, count):
    layer.build((None, 5, 6, 64))
    assert sum(np.prod(weight.shape, dtype=int) for weight in layer.trainable_weights) == count


def test_parametrised_gate_cannot_see_the_global_vector():
    """The softmax takes off what is the same at all positions."""
    layer = AttentionGate("parametrised")
    maps, vector = _float32(WIDER)
    layer([maps, vector])
    conformance.randomise(layer)
    np.testing.assert_allclose(layer([maps, vector]), layer([maps, -3 * vector]), rtol=1e-4, atol=1e-5)
    dot = AttentionGate()
    assert np.abs(dot([maps, vector]) - dot([maps, -3 * vector])).max() > 0.1


def test_non_local_mixes_exactly_where_it_takes_blocks():
    maps = normal(1, 60, 50, 2)  # 9 million scores: more than are held at once
    layer = NonLocal(1)
    layer(_float32(maps))
    conformance.randomise(layer)
    expected = equations.non_local(conformance.values_of(layer), maps)["features"]
    np.testing.assert_allclose(layer(_float32(maps)), expected, rtol=1e-5, atol=1e-5)


def test_residual_attention_keeps_statistics_in_training_only():
    layer = ResidualAttention()
    maps = _float32(MAPS)
    layer(maps)
    start = [weight.numpy() for weight in layer.non_trainable_weights]
    layer(maps, training=False)
    for weight, before in zip(layer.non_trainable_weights, start, strict=True):
        np.testing.assert_array_equal(weight, before)
    layer(maps, training=True)
    moved = [
        np.abs(weight - before).max()
        for weight, before in zip(layer.non_trainable_weights, start, strict=True)
    ]
    assert min(moved) > 0


def test_residual_attention_works_on_the_smallest_maps():
    layer = ResidualAttention(depth=3)
    maps = normal(2, 1, 2, 8)
    layer(_float32(maps))
    conformance.randomise(layer)
    expected = equations.residual_attention(conformance.values_of(layer), maps, False, (1, 2, 1), 3)
    np.testing.assert_allclose(layer(_float32(maps)), expected["features"], rtol=1e-5, atol=1e-5)


def test_pixel_weights_add_their_mean_to_the_loss():
    layer = PixelWeights(l1=3.0)
    layer(_float32(MAPS))
    conformance.randomise(layer)
    with tf.GradientTape() as tape:
        [loss] = layer.losses
    pixels = layer.pixels.numpy()
    np.testing.assert_allclose(loss, 3 * np.abs(pixels).mean(), rtol=1e-6)
    gradient = tape.gradient(loss, layer.pixels.value)
    np.testing.assert_allclose(gradient, 3 * np.sign(pixels) / pixels.size, rtol=1e-6)


def test_errors():
    maps = _float32(MAPS)
    for layer in (NonLocal(16), DualAttention(9), SqueezeExcite(9), GlobalContext(8), NonLocal(0)):
        with pytest.raises(ValueError, match=r"`ratio` must.*Received: ratio=\d+, channels=8"):
            layer(maps)
    with pytest.raises(ValueError, match="Received: ratio=4, channels=3"):
        ResidualAttention()(maps[..., :3])
    with pytest.raises(ValueError, match=r"`form` must.*Received: form='dot'"):
        ChannelSelfAttention("dot")
    with pytest.raises(ValueError, match=r"`compatibility` must.*Received: compatibility='sum'"):
        AttentionGate("sum")
    with pytest.raises(ValueError, match=r"Received: units=\(1, 2\)"):
        ResidualAttention((1, 2))
    with pytest.raises(ValueError, match=r"Received: units=\(1, 2, -1\)"):
        ResidualAttention((1, 2, -1))
    with pytest.raises(ValueError, match="Received: depth=0"):
        ResidualAttention(depth=0)
    with pytest.raises(ValueError, match="Received: l1=-1"):
        PixelWeights(-1)
    with pytest.raises(ValueError, match=r"size must be known. Received: shape=\(None, None, None, 3\)"):
        PixelWeights()(keras.Input((None, None, 3)))
    sized = PixelWeights()
    sized(maps)
    with pytest.raises(ValueError, match="expected axis 1 of input shape to have value 7"):
        sized(maps[:, 1:])
    for layer in (NonLocal(), ChannelSelfAttention(), SqueezeExcite(), ResidualAttention()):
        with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
            layer(maps[0])
