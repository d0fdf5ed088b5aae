"""Every public layer on two replicas: the same answers and the same training step as on one."""

import conformance
import keras
import numpy as np
import pytest
import tensorflow as tf
from conformance import CASE_IDS, CASES


def _step(layer, optimizer, first, named):
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(layer(first, **named, training=True))
        floats = [output for output in outputs if keras.backend.is_float_dtype(output.dtype)]
        loss = sum(tf.reduce_mean(tf.sin(output)) for output in floats)
        loss /= tf.distribute.get_strategy().num_replicas_in_sync  # the optimiser adds them up
    weights = layer.trainable_weights
    optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
    return outputs


@pytest.mark.parametrize(("row", "example"), CASES, ids=CASE_IDS)
def test_two_replicas_train_as_one(row, example, mirrored):
    """Each replica gets the same examples, so that statistics and gradients are those of one replica."""
    inputs = row.examples[example](3)
    first, named = keras.tree.map_structure(tf.convert_to_tensor, conformance.cast(inputs))

    alone = conformance.built(row, inputs)
    expected = _step(alone, keras.optimizers.SGD(0.1), first, named)

    with mirrored.scope():
        layer, optimizer = conformance.built(row, inputs), keras.optimizers.SGD(0.1)
        optimizer.build(layer.trainable_variables)
    run = tf.function(lambda: mirrored.run(lambda: _step(layer, optimizer, first, named)))
    for output, reference in zip(run(), expected, strict=True):
        for replica in mirrored.experimental_local_results(output):
            np.testing.assert_allclose(replica, reference, rtol=1e-5, atol=1e-5)
    assert mirrored.num_replicas_in_sync == 2
    for weight, reference in zip(layer.weights, alone.weights, strict=True):
        np.testing.assert_allclose(weight, reference, rtol=1e-5, atol=1e-5)
