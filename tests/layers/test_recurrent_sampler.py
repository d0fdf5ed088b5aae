import conformance
import keras
import numpy as np
import pytest
import reference.sampling
import scipy.stats
import tensorflow as tf

from keras_medattn import ops
from keras_medattn.layers import RecurrentSampler

RNG = np.random.default_rng(0)


def _maps(batch, height=3, width=4, channels=2):
    attention = RNG.random((batch, height, width)).astype("float32")
    return attention, RNG.normal(size=(batch, height, width, channels)).astype("float32")


def test_starts_as_independent_draws_from_the_attention():
    attention, features = _maps(1)
    attention = np.repeat(attention, 20_000, axis=0)
    layer = RecurrentSampler(2, seed=1)
    _, cells, log_probs = layer(attention, np.repeat(features, 20_000, axis=0), training=True)
    chances = attention[0].ravel() / attention[0].sum()
    pairs = np.bincount(cells.numpy() @ [12, 1], minlength=144)
    assert scipy.stats.chisquare(pairs, np.outer(chances, chances).ravel() * 20_000).pvalue > 0.01
    np.testing.assert_allclose(log_probs, np.log(chances[cells.numpy()]), rtol=1e-5)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_each_draw_follows_its_distribution(replacement, training):
    attention, features = _maps(4)
    attention[:, 1, 2] = 0
    layer = RecurrentSampler(11, replacement=replacement, seed=2)
    layer(attention, features)
    conformance.randomise(layer)
    expected = reference.sampling.recurrent_sampler(
        conformance.values_of(layer),
        attention.astype("float64"),
        features.astype("float64"),
        patches=11,
        units=16,
        replacement=replacement,
        seed=2,
        training=training,
    )
    seen, cells, log_probs, distributions = layer(
        attention, features, training=training, return_attention_scores=True
    )
    for found, exact in zip((seen, cells, log_probs), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
    flat = tf.reshape(distributions, (4, 11, 12)).numpy()
    np.testing.assert_allclose(flat.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_array_equal(flat[..., 6], 0)
    drawn = np.take_along_axis(flat, cells.numpy()[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(np.log(drawn), log_probs, atol=1e-5)
    distinct = {len(set(row)) for row in cells.numpy()}
    assert distinct == {11} or (replacement and training)


def test_draws_depend_on_seed_step_and_example_alone():
    attention, features = _maps(6, 9, 9)
    examples = np.arange(6)

    def draw(layer, rows=slice(None), **kwargs):
        return layer(attention[rows], features[rows], training=True, **kwargs)[1].numpy()

    layer = RecurrentSampler(4, seed=5)
    first, second = draw(layer), draw(layer)
    assert int(layer.step) == 2
    layer(attention, features)
    assert int(layer.step) == 2  # inference draws nothing
    assert (first != second).mean() > 0.8
    again = RecurrentSampler.from_config(layer.get_config())
    np.testing.assert_array_equal(draw(again), first)
    alone = RecurrentSampler(4, seed=5)
    np.testing.assert_array_equal(draw(alone, [4, 2], examples=examples[[4, 2]]), first[[4, 2]])
    assert (draw(RecurrentSampler(4, seed=6)) != first).mean() > 0.8
    np.testing.assert_array_equal(draw(layer, draw=1), second)
    np.testing.assert_array_equal(layer(attention, features, draw=0)[1], first)
    assert int(layer.step) == 2  # a number that is given is not counted
    unseeded = [RecurrentSampler(4) for _ in range(2)]
    assert unseeded[0].seed != unseeded[1].seed
    np.testing.assert_array_equal(
        draw(RecurrentSampler.from_config(unseeded[0].get_config())), draw(unseeded[0])
    )


def test_a_network_reads_each_patch_before_the_next_cell_is_drawn():
    attention, features = _maps(3)
    network = keras.layers.Dense(5)
    layer = RecurrentSampler(3, patch_features=5, seed=0)
    asked = []

    def read(cells):
        asked.append(cells.numpy())
        return network(tf.gather(tf.reshape(features, (3, 12, 2)), cells, batch_dims=1))

    layer(attention, features, read=read)
    conformance.randomise(layer)
    asked.clear()
    with tf.GradientTape() as tape:
        seen, cells, log_probs = layer(attention, features, read=read, training=True)
        loss = tf.reduce_sum(log_probs)
    assert seen.shape == (3, 3, 5)
    np.testing.assert_array_equal(np.stack(asked, axis=1), cells)
    for turn in range(3):
        np.testing.assert_allclose(seen[:, turn], read(cells[:, turn]), rtol=1e-5)
    assert np.abs(tape.gradient(loss, network.kernel)).max() > 1e-4
    network.kernel.assign(-network.kernel)  # what a patch shows decides the later draws, and not the first
    again = layer(attention, features, read=read, return_attention_scores=True)[3]
    network.kernel.assign(-network.kernel)
    before = layer(attention, features, read=read, return_attention_scores=True)[3]
    np.testing.assert_array_equal(again[:, 0], before[:, 0])
    assert np.abs(again[:, 1] - before[:, 1]).max() > 1e-3


def test_cells_that_run_out_are_drawn_again_and_empty_ones_never():
    attention, features = _maps(50)
    attention[:, :, 1:] = 0
    for training in (True, False):
        layer = RecurrentSampler(6, replacement=False, seed=1)
        _, cells, log_probs = layer(attention, features, training=training)
        assert set(cells.numpy().ravel()) == {0, 4, 8}
        assert np.isfinite(log_probs).all()


def test_what_empty_cells_hold_enters_no_gradient():
    attention, features = _maps(3)
    attention[:, 1:] = 0
    layer = RecurrentSampler(3, seed=0)
    layer(attention, features)
    conformance.randomise(layer)
    gradients = []
    for held in (0, np.nan):
        features[:, 1:] = held
        with tf.GradientTape() as tape:
            seen, _, log_probs = layer(attention, features, training=True, draw=0)
            loss = tf.reduce_sum(seen) + tf.reduce_sum(log_probs)
        gradients.append(tape.gradient(loss, [weight.value for weight in layer.trainable_weights]))
    for expected, found in zip(*gradients, strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_array_equal(found, expected)


def test_symbolic_answers_have_the_shapes_and_types_of_the_eager_ones():
    layer = RecurrentSampler(3, patch_features=5, dtype="mixed_bfloat16")
    inputs = keras.Input((None, 4)), keras.Input((None, 4, 2))
    attention, features = _maps(2)

    def read(cells):
        return tf.zeros((tf.shape(cells)[0], 5))

    symbolic = layer(*inputs, read=read, return_attention_scores=True)
    eager = layer(attention, features, read=read, return_attention_scores=True)
    assert [each.dtype for each in symbolic] == [each.dtype.name for each in eager]
    assert symbolic[3].shape == (None, 3, None, 4)
    for left, right in zip(symbolic, eager, strict=True):
        assert all(size in (None, other) for size, other in zip(left.shape, right.shape, strict=True))


def test_training_draws_the_second_object():
    """All cells look alike; rewarded are two draws of which the second one is just below the first.

    Independent draws get at best a quarter of the rewards, with all attention in two cells.
    """
    batch, size = 64, 6
    attention = np.full((batch, size, size), 1 / size**2, "float32")
    features = np.ones((batch, size, size, 1), "float32")
    sampler, optimizer = RecurrentSampler(2, units=8, seed=0), keras.optimizers.Adam(0.03)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            _, cells, log_probs = sampler(attention, features, training=True)
            rewards = tf.cast(cells[:, 1] - cells[:, 0] == size, "float32")
            loss = ops.reinforce_surrogate(log_probs, rewards, "batch_mean")
        weights = sampler.trainable_variables
        optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
        return tf.reduce_mean(rewards)

    step()
    rewards = [float(step()) for _ in range(250)]
    assert np.mean(rewards[:20]) < 0.1
    assert np.mean(rewards[-20:]) > 0.5


def test_parameters_are_those_of_the_convolution_and_the_gru():
    channels, seen, units = 32, 7, 16
    layer = RecurrentSampler(2, units=units, patch_features=seen)
    layer.build((None, None, None), (None, None, None, channels))
    count = sum(int(np.prod(weight.shape)) for weight in layer.trainable_weights)
    assert count == (channels + 3 + units) * units + 2 * units + 3 * units * (seen + units + 4)


@pytest.mark.parametrize(
    ("arguments", "shapes", "message"),
    [
        ({"patches": 0}, None, "patches=0"),
        ({"patches": 1, "units": 0}, None, "units=0"),
        ({"patches": 1}, ((2, 3, 4), (2, 3, 5, 1)), r"\(2, 3, 5, 1\)"),
        ({"patches": 1}, ((2, 3, 4, 1), (2, 3, 4, 1)), r"\(2, 3, 4, 1\)"),
    ],
)
def test_errors_say_what_was_received(arguments, shapes, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        RecurrentSampler(**arguments)(*map(np.ones, shapes or ()))
