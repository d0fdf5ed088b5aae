"""MIMS: its configurations against their equations, and a saved model against itself."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import reference.mims

import keras_medattn
from keras_medattn.models import MIMS, arguments, system

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 64, 80, 3)).astype("uint8")


def backbone():
    """Maps at stride 8, by plain pooling: what is tested is what follows."""
    image = keras.Input((None, None, 3))
    pooled = keras.layers.AveragePooling2D(8)(image)
    return keras.Model(image, keras.layers.Rescaling(1 / 64, -2.0)(pooled))


def build(**arguments):
    model = MIMS(3, backbone(), stride=8, **arguments)
    model.build((None, 64, 80, 3))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "seed_generator_state":
            value = rng.normal(size=weight.shape) * 0.5
            weight.assign(np.abs(value) + 0.5 if weight.name in ("moving_variance", "sw") else value)
    return model


def maps_of(model):
    return np.float64(model.features(IMAGES))


def head(model, features):
    return features @ np.float64(model.head.kernel) + np.float64(model.head.bias)


@pytest.mark.parametrize("aggregation", ["mean", "max", "top_k"])
def test_primary_maps_pooled(aggregation):
    """`kernels=()` is the paper's MI-Pre; with the mean, global average pooling and a linear probe."""
    model = build(kernels=(), aggregation=aggregation, k=4)
    bag = maps_of(model).reshape(2, -1, 3)
    highest = -np.sort(-bag, axis=1)
    if aggregation == "top_k":
        logits = np.float64(model.pool.weights[0])
        weights = np.exp(logits) / np.exp(logits).sum()
        pooled = np.einsum("bkn,k->bn", highest[:, :4], weights)
    else:
        pooled = bag.mean(axis=1) if aggregation == "mean" else highest[:, 0]
    mean, variance = (np.float64(w) for w in model.standardise.get_weights())
    standard = (pooled - mean) / np.sqrt(variance + model.standardise.epsilon)
    np.testing.assert_allclose(model(IMAGES), head(model, standard), rtol=1e-4, atol=1e-4)


def test_whole_system_is_conv_pool_head():
    """Maps -> tied convolutions over scales, normalised -> top k -> linear, by the reference's equations."""
    model = build(kernels=((1, 2), (2, 3)), scales=(0.5, 1.0), k=3)
    conv = {weight.path.split("ms_conv/", 1)[1]: np.float64(weight) for weight in model.ms_conv.weights}
    pool = {weight.path.split("pool/", 1)[1]: np.float64(weight) for weight in model.pool.weights}
    bags = reference.mims.ms_conv(
        conv, maps_of(model), None, training=False, kernels=((1, 2), (2, 3)), scales=(0.5, 1.0)
    )
    pooled = reference.mims.top_k_pool(pool, bags)["pooled"]
    np.testing.assert_allclose(model(IMAGES), head(model, pooled), rtol=1e-4, atol=1e-4)


def test_bottleneck_is_relu_of_a_projection():
    model = build(kernels=(), aggregation="mean", bottleneck=5)
    norm, conv = model.bottleneck.layers
    mean, variance = (np.float64(w) for w in norm.get_weights())
    kernel, bias = (np.float64(w) for w in conv.get_weights())
    standard = (maps_of(model) - mean) / np.sqrt(variance + norm.epsilon)
    pooled = np.maximum(standard @ kernel[0, 0] + bias, 0).mean(axis=(1, 2))
    mean, variance = (np.float64(w) for w in model.standardise.get_weights())
    standard = (pooled - mean) / np.sqrt(variance + model.standardise.epsilon)
    np.testing.assert_allclose(model(IMAGES), head(model, standard), rtol=1e-4, atol=1e-4)


def test_saved_and_reloaded_in_a_fresh_process_is_bit_equal(tmp_path):
    model = MIMS(2, "mobilenet_v3_small", 8, None, kernels=((2, 3),), k=3, dropout=0.1, bottleneck=4)
    model.build((None, 64, 80, 3))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np, keras_medattn\n"
        "model = keras_medattn.load_model(sys.argv[1] + '/model.keras')\n"
        "norms = [one for one in model.backbone.layers if 'BatchNorm' in type(one).__name__]\n"
        "assert norms and not any(one.trainable for one in norms)\n"
        "np.save(sys.argv[1] + '/scores.npy', model(np.load(sys.argv[1] + '/images.npy')))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), model(IMAGES))


def test_fit_as_any_keras_model_and_frozen_batch_norm_stays():
    keras.utils.set_random_seed(0)
    model = MIMS(2, "mobilenet_v3_small", 8, None, kernels=((1, 4),), scales=(1.0,), k=2)
    norms = [one for one in model.backbone.layers if isinstance(one, keras.layers.BatchNormalization)]
    before = [one.get_weights() for one in norms]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    labels = np.array([0, 1])
    history = model.fit(IMAGES, labels, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for one, old in zip(norms, before, strict=True):
        for new, first in zip(one.get_weights(), old, strict=True):
            np.testing.assert_array_equal(new, first)


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"`aggregation` must be one of .* Received: 'sum'"):
        MIMS(2, backbone(), aggregation="sum")
    with pytest.raises(ValueError, match=r"`num_classes` must be 2 or more. Received: 1"):
        MIMS(1, backbone())
    with pytest.raises(ValueError, match=r"Did you mean 'MIMS'\? Received: 'mims'"):
        system("mims")
    with pytest.raises(ValueError, match=r"Known: AttentionSampling, .*MIMS\. Received: 'resnet'"):
        system("resnet")
    assert "num_classes" not in arguments("MIMS")
    assert keras_medattn.models.SYSTEMS["MIMS"] is MIMS
