"""Every row against its equation in float64 NumPy: values and gradients, on the backend in use."""

import inspect

import conformance
import keras
import numpy as np
import pytest
from conformance import CASE_IDS, CASES

TOLERANCE = 1e-5


def _cotangents(outputs: list[np.ndarray]) -> list[np.ndarray | None]:
    """A fixed weight for each number of each float output: the loss is their weighted sum."""
    rng = np.random.default_rng(2)
    return [rng.normal(size=output.shape) if output.dtype.kind == "f" else None for output in outputs]


def _loss(outputs, cotangents):
    pairs = zip(keras.tree.flatten(outputs), cotangents, strict=True)
    return sum(
        keras.ops.sum(output * keras.ops.convert_to_tensor(cotangent, "float32"))
        for output, cotangent in pairs
        if cotangent is not None
    )


def _mode(layer, training):
    """The keyword `training` for layers that take it."""
    return {"training": training} if "training" in inspect.signature(layer.call).parameters else {}


def _gradients(layer, inputs, cotangents, training):
    """Gradients of the loss with respect to the trainable weights and the float inputs, as NumPy arrays."""
    flat = [keras.ops.convert_to_tensor(array) for array in keras.tree.flatten(inputs)]
    floats = [i for i, tensor in enumerate(flat) if keras.backend.is_float_dtype(tensor.dtype)]

    def call(function, varied):
        arguments = [varied[floats.index(i)] if i in floats else tensor for i, tensor in enumerate(flat)]
        first, named = keras.tree.pack_sequence_as(inputs, arguments)
        return function(first, **named, **_mode(layer, training))

    varied = [flat[i] for i in floats]
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(varied)
            loss = _loss(call(layer, varied), cotangents)
        weights = [weight.value for weight in layer.trainable_weights]
        gradients = tape.gradient(loss, weights + varied, unconnected_gradients="zero")
    elif backend == "jax":
        import jax

        fixed = [weight.value for weight in layer.non_trainable_variables]

        def loss_of(weights, varied):
            def function(*args, **kwargs):
                return layer.stateless_call(weights, fixed, *args, **kwargs)[0]

            return _loss(call(function, varied), cotangents)

        weights = [weight.value for weight in layer.trainable_variables]
        gradients = [g for group in jax.grad(loss_of, argnums=(0, 1))(weights, varied) for g in group]
    else:
        import torch

        varied = [tensor.detach().requires_grad_() for tensor in varied]
        loss = _loss(call(layer, varied), cotangents)
        weights = [weight.value for weight in layer.trainable_weights]
        gradients = torch.autograd.grad(loss, weights + varied)
    return [keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(gradient)) for gradient in gradients]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("row", "example"), CASES, ids=CASE_IDS)
def test_equation(row, example, training):
    inputs = row.examples[example](3)
    layer = conformance.built(row, inputs)
    expected = row.equation(conformance.values_of(layer), inputs[0], training=training, **inputs[1])
    first, named = conformance.cast(inputs)
    outputs = conformance.arrays(layer(first, **named, **_mode(layer, training)))
    for output, reference in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, reference, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("row", "example"), CASES, ids=CASE_IDS)
def test_gradients_equal_central_differences(row, example, training):
    """Along random directions of each weight and input; the differences are those of the float64 equation."""
    inputs = row.examples[example](3)
    layer = conformance.built(row, inputs)
    weights = conformance.values_of(layer)
    names = [conformance.below(weight) for weight in layer.trainable_weights]
    cotangents = _cotangents(row.equation(weights, inputs[0], training=training, **inputs[1]))

    def loss_at(name, offset):
        moved = {**weights, name: weights[name] + offset} if isinstance(name, str) else weights
        flat = [a + offset if i == name else a for i, a in enumerate(keras.tree.flatten(inputs))]
        first, keywords = keras.tree.pack_sequence_as(inputs, flat)
        outputs = row.equation(moved, first, training=training, **keywords)
        return sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True) if c is not None)

    places = names + [i for i, array in enumerate(keras.tree.flatten(inputs)) if array.dtype.kind == "f"]
    gradients = _gradients(layer, conformance.cast(inputs), cotangents, training)
    rng, step = np.random.default_rng(3), 1e-6
    for place, gradient in zip(places, gradients, strict=True):
        for _ in range(4):
            direction = rng.normal(size=gradient.shape)
            direction /= np.linalg.norm(direction)
            expected = (loss_at(place, step * direction) - loss_at(place, -step * direction)) / (2 * step)
            found = (gradient * direction).sum()
            scale = max(1.0, float(np.linalg.norm(gradient)))
            assert abs(found - expected) <= TOLERANCE * scale, (place, found, expected)
