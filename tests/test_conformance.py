"""Checks on every public layer: configuration, shapes, precisions, graphs, masks, gradients, learning."""

import conformance
import keras
import numpy as np
import pytest
import tensorflow as tf
from conformance import CASE_IDS, CASES, ROW_IDS, ROWS

from keras_medattn import layers

each_case = pytest.mark.parametrize(("row", "example"), CASES, ids=CASE_IDS)
each_row = pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)


def _floats(outputs) -> list[tf.Tensor]:
    return [output for output in keras.tree.flatten(outputs) if keras.backend.is_float_dtype(output.dtype)]


def _loss(outputs) -> tf.Tensor:
    """A loss that gives each number a gradient of its own."""
    return sum(tf.reduce_sum(tf.sin(output)) for output in _floats(outputs))


def test_each_public_layer_has_one_row():
    public = [getattr(layers, name) for name in layers.__all__]
    assert sorted(layer.__name__ for layer in public) == sorted(ROW_IDS)


@each_row
def test_config_round_trip(row):
    layer = row.make()
    config = layer.get_config()
    assert set(row.arguments) <= set(config)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is row.layer
    assert again.get_config() == config
    assert keras.saving.get_registered_name(row.layer) == f"keras_medattn>{row.layer.__name__}"


@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
@each_case
def test_symbolic_shapes_are_the_eager_ones(row, example, unknown):
    inputs = row.examples[example](2)
    model, layer = conformance.functional(row, inputs, unknown)
    for batch in (2, 3):
        first, named = conformance.cast(row.examples[example](batch))
        eager = keras.tree.flatten(layer(first, **named))
        traced = keras.tree.flatten(model(keras.tree.flatten((first, named))))
        for symbolic, output, again in zip(model.outputs, eager, traced, strict=True):
            assert symbolic.dtype == keras.backend.standardize_dtype(output.dtype)
            sizes = zip(symbolic.shape, output.shape, strict=True)
            assert all(known in (None, size) for known, size in sizes), (symbolic.shape, output.shape)
            assert unknown or None not in symbolic.shape[1:]
            np.testing.assert_allclose(again, output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "float64"])
@each_case
def test_precisions(row, example, policy):
    inputs = row.examples[example](3)
    layer = conformance.built(row, inputs, dtype=policy)
    expected = row.equation(conformance.values_of(layer), inputs[0], training=False, **inputs[1])
    first, named = conformance.cast(inputs, layer.compute_dtype if policy == "float64" else "float32")
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 0.1, "mixed_float16": 0.01, "float64": 1e-12}[policy]
    for output, reference in zip(keras.tree.flatten(layer(first, **named)), expected, strict=True):
        if reference.dtype.kind == "f":
            assert output.dtype == layer.compute_dtype
        output = tf.cast(output, "float64").numpy()
        np.testing.assert_allclose(output, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@each_case
def test_graph_equals_eager_in_value_and_gradient(row, example, jit_compile):
    inputs = row.examples[example](3)
    layer = conformance.built(row, inputs)
    first, named = keras.tree.map_structure(tf.convert_to_tensor, conformance.cast(inputs))

    def step(first, named):
        with tf.GradientTape() as tape:
            outputs = layer(first, **named)
            loss = _loss(outputs)
        weights = [weight.value for weight in layer.trainable_weights]
        gradients = tape.gradient(loss, weights, unconnected_gradients="zero")
        return _floats(outputs), gradients

    graph = tf.function(step, jit_compile=jit_compile)
    for eager, compiled in zip(
        *map(keras.tree.flatten, (step(first, named), graph(first, named))), strict=True
    ):
        np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-4)


def _with_gradients(layer, inputs, training):
    """Outputs, gradients of the trainable weights, gradients of the float inputs."""
    first, named = keras.tree.map_structure(tf.convert_to_tensor, conformance.cast(inputs))
    varied = _floats(first)
    with tf.GradientTape() as tape:
        tape.watch(varied)
        outputs = layer(first, **named, training=training)
        loss = _loss(outputs)
    weights = [weight.value for weight in layer.trainable_weights]
    gradients = tape.gradient(loss, [*weights, *varied], unconnected_gradients="zero")
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    return outputs, gradients[: len(weights)], gradients[len(weights) :]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@each_row
def test_padding_changes_nothing_and_is_not_read(row, training):
    """The padding is NaN, so that whatever reads it shows."""
    plain, padded, _ = row.padded()
    layers = [conformance.built(row, plain) for _ in range(2)]
    expected, answer = (
        _with_gradients(layer, inputs, training)
        for layer, inputs in zip(layers, (plain, padded), strict=True)
    )
    for output, reference in zip(row.kept(answer[0]), row.kept(expected[0]), strict=True):
        np.testing.assert_allclose(output, reference, rtol=1e-5, atol=1e-5)
    states = [layer.non_trainable_weights for layer in layers]
    for state, reference in zip(*states, strict=True):
        np.testing.assert_allclose(state, reference, rtol=1e-5, atol=1e-6)
    for gradient in answer[2]:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@each_row
def test_all_masked_stays_finite(row, training):
    _, _, nothing = row.padded()
    layer = conformance.built(row, nothing)
    outputs, weights, inputs = _with_gradients(layer, nothing, training)
    for array in [*_floats(outputs), *weights, *inputs, *layer.weights]:
        assert np.isfinite(array).all()
    for gradient in inputs:
        np.testing.assert_array_equal(gradient, 0)


@each_case
def test_gradients_reach_every_weight_but_those_listed(row, example):
    layer = conformance.built(row, row.examples[example](3))
    _, gradients, inputs = _with_gradients(layer, row.examples[example](3), training=True)
    largest = max(float(tf.reduce_max(tf.abs(gradient))) for gradient in gradients)
    listed = set(row.vanishing)
    for weight, gradient in zip(layer.trainable_weights, gradients, strict=True):
        name = conformance.below(weight)
        assert np.isfinite(gradient).all()
        if name in listed:
            assert np.abs(gradient).max() < 1e-4 * largest, row.vanishing[name]
            listed.remove(name)
        else:
            assert np.abs(gradient).max() > 1e-3 * largest, name
    assert not listed
    assert all(np.abs(gradient).max() > 0 for gradient in inputs)


@each_case
def test_training_lowers_a_loss(row, example):
    """Compiled by XLA at sizes that are unknown when the graph is made, as `fit` does by default."""
    inputs = row.examples[example](3)
    model, _ = conformance.functional(row, inputs)
    model = keras.Model(model.inputs, _floats(model.outputs))
    arrays = keras.tree.flatten(conformance.cast(inputs))
    rng = np.random.default_rng(4)
    targets = [
        rng.normal(size=output.shape).astype("float32") for output in keras.tree.flatten(model(arrays))
    ]
    model.compile("adam", ["mse"] * len(targets), jit_compile=True)
    losses = model.fit(arrays, targets, batch_size=3, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
