import conformance
import keras
import numpy as np
import pytest
import reference.sampler

from keras_medattn import load_model, ops
from keras_medattn.models.attention_sampling import attention_network, feature_network


def _random(network):
    conformance.randomise(network)
    return {weight.path.removeprefix(f"{network.name}/"): np.array(weight) for weight in network.weights}


def _trainable(network):
    return sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)


def test_counts_are_those_of_the_paper():
    assert _trainable(attention_network()) == 1513
    assert _trainable(feature_network()) == feature_network().count_params() == 7459
    assert _trainable(attention_network(channels=1)) == 1513 - 2 * 72


@pytest.mark.parametrize("training", [False, True])
def test_attention_network_equals_its_equation(training):
    network = attention_network()
    weights = _random(network)
    view = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    attention = network(view, training=training)
    np.testing.assert_allclose(
        attention, reference.sampler.attention_network(weights, view, training), rtol=1e-4, atol=1e-7
    )


def test_feature_network_equals_its_equation():
    network = feature_network()
    weights = _random(network)
    patches = np.random.default_rng(0).normal(size=(3, 9, 8, 3)).astype("float32")
    scores = network(patches)
    np.testing.assert_allclose(scores, reference.sampler.feature_network(weights, patches), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(scores, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_no_attention_and_is_not_read(training):
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype("float32")
    padded = np.pad(image, ((0, 0), (0, 9), (0, 13), (0, 0)), constant_values=np.nan)
    size = np.array([[20, 24]] * 2)
    states = []
    for pixels, sizes in ((image, None), (padded, size)):
        network = attention_network()
        _random(network)
        view = ops.overview(pixels, 4, sizes)
        mask = None if sizes is None else ops.cell_mask(sizes, view.shape[1:3], pixels.shape[1:3], 4)
        attention = np.array(network(view / 255, mask=mask, training=training))
        states.append([attention[:, :5, :6], *map(np.array, network.non_trainable_weights)])
        np.testing.assert_allclose(attention.sum(axis=(1, 2)), 1, rtol=1e-5)
    for plain, other in zip(*states, strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-6)


def test_networks_are_reloaded(tmp_path):
    view = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    for network in (attention_network(), feature_network(4)):
        _random(network)
        expected = network(view)
        network.save(tmp_path / "network.keras")
        np.testing.assert_array_equal(load_model(tmp_path / "network.keras")(view), expected)


def test_both_train_in_fit():
    """A feature network tells bright from dark patches; an attention network learns where the light is."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(32, 8, 8, 3)).astype("float32") + np.repeat([0, 1], 16)[:, None, None, None]
    network = feature_network(2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(0.01), loss)
    losses = network.fit(patches, np.repeat([0, 1], 16), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]

    places = rng.integers(0, 30, 32)
    views = np.zeros((32, 5, 6, 1), "float32")
    views.reshape(32, 30)[np.arange(32), places] = 1
    inputs = keras.Input((5, 6, 1))
    model = keras.Model(inputs, keras.layers.Flatten()(attention_network(1)(inputs)))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    losses = model.fit(views, places, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
