"""On a map of 12 cells, where all draws can be listed: estimates by enumeration; else by frequencies."""

import itertools

import numpy as np
import pytest
import reference.sampling
import scipy.stats
import tensorflow as tf

from keras_medattn import ops
from keras_medattn.ops import random
from keras_medattn.ops.sampling import advantages, cells_at

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=12)
FEATURES, READ_OUT = RNG.normal(size=(12, 3)), RNG.normal(size=3)
EXACT = 1e-10
modes = pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])


def _softmax(logits):
    weights = np.exp(logits)
    return weights / weights.sum()


ATTENTION = _softmax(LOGITS)


def _outcomes(patches, replacement):
    """All ordered draws `(O, P)` of 12 cells."""
    if replacement:
        return np.array(list(itertools.product(range(12), repeat=patches)))
    return np.array(list(itertools.permutations(range(12), patches)))


def _chances(attention, outcomes, replacement):
    """The probability of each ordered draw."""
    drawn = attention[outcomes]
    return np.prod(drawn if replacement else drawn / (1 - (np.cumsum(drawn, axis=1) - drawn)), axis=1)


def _gradient(function):
    """Of a scalar function of the logits, exact to rounding: by complex steps."""
    return np.array([function(LOGITS + 1e-30j * np.eye(12)[i]).imag / 1e-30 for i in range(12)])


def _weighted_gradient(estimate, outcomes, weights):
    """Sum over outcomes of weight times estimate `(O,)`, and of weight times its gradient in the logits."""
    logits, weights = tf.constant(LOGITS), tf.constant(weights)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        maps = tf.broadcast_to(tf.reshape(tf.nn.softmax(logits), (1, 3, 4)), (len(outcomes), 3, 4))
        total = tf.reduce_sum(weights * estimate(maps))
    return total.numpy(), tape.gradient(total, logits).numpy()


@pytest.mark.parametrize("patches", [1, 2, 3])
@modes
def test_expectation_is_exact_in_value_and_gradient(patches, replacement):
    outcomes = _outcomes(patches, replacement)
    chances = _chances(ATTENTION, outcomes, replacement)
    np.testing.assert_allclose(chances.sum(), 1)

    def estimate(maps):
        drawn = tf.gather(tf.reshape(maps, (-1, 12)), outcomes, batch_dims=1)
        return tf.linalg.matvec(ops.expectation(FEATURES[outcomes], drawn, replacement), READ_OUT)

    value, gradient = _weighted_gradient(estimate, outcomes, chances)
    np.testing.assert_allclose(value, ATTENTION @ FEATURES @ READ_OUT, rtol=EXACT)
    expected = _gradient(lambda logits: _softmax(logits) @ FEATURES @ READ_OUT)
    np.testing.assert_allclose(gradient, expected, atol=EXACT)


def test_the_stopped_gradient_of_what_is_left_matters():
    outcomes = _outcomes(3, False)

    def estimate(maps):
        drawn = tf.gather(tf.reshape(maps, (-1, 12)), outcomes, batch_dims=1)
        before = tf.cumsum(drawn, axis=1, exclusive=True)
        rewards = (FEATURES @ READ_OUT)[outcomes]
        ones = drawn / tf.stop_gradient(drawn)
        return tf.reduce_mean(
            tf.cumsum(drawn * rewards, 1, exclusive=True) + (1 - before) * ones * rewards, 1
        )

    value, gradient = _weighted_gradient(estimate, outcomes, _chances(ATTENTION, outcomes, False))
    expected = _gradient(lambda logits: _softmax(logits) @ FEATURES @ READ_OUT)
    np.testing.assert_allclose(value, ATTENTION @ FEATURES @ READ_OUT, rtol=EXACT)
    assert np.linalg.norm(gradient - expected) > 0.02 * np.linalg.norm(expected)


@modes
def test_mean_is_the_expectation_without_a_gradient(replacement):
    outcomes = _outcomes(2, replacement)
    drawn = tf.constant(ATTENTION[outcomes])
    with tf.GradientTape() as tape:
        tape.watch(drawn)
        answer = ops.aggregate(FEATURES[outcomes], drawn, "mean", replacement=replacement)
    mean = _chances(ATTENTION, outcomes, replacement) @ answer.numpy()
    np.testing.assert_allclose(mean, ATTENTION @ FEATURES, atol=EXACT)
    assert tape.gradient(answer, drawn) is None
    with_gradient = ops.aggregate(FEATURES[outcomes], drawn, "mean", "expectation", replacement)
    np.testing.assert_allclose(with_gradient, answer)


def _pairs(outcomes, replacement):
    """Two independent draws of an image, in rows that follow each other, and each pair's probability."""
    chances = _chances(ATTENTION, outcomes, replacement)
    first, second = (index.ravel() for index in np.indices((len(outcomes),) * 2))
    cells = np.stack([outcomes[first], outcomes[second]], axis=1).reshape(-1, outcomes.shape[1])
    return cells, np.repeat(chances[first] * chances[second], 2) / 2


def _surrogate_gradient(cells, weights, rewards, replacement, as_if=None, **kwargs):
    """The expected gradient of a reward that the loss stands for, in the logits."""

    def estimate(maps):
        rows = tf.cast(len(cells) * weights, "float64")[:, None, None]  # each row by its probability
        weighted = tf.stop_gradient(maps) + rows * (maps - tf.stop_gradient(maps))
        as_drawn = replacement if as_if is None else as_if
        log_probs = ops.log_probabilities(weighted, tf.constant(cells), as_drawn)
        return -ops.reinforce_surrogate(log_probs, tf.constant(rewards), replacement=as_drawn, **kwargs)

    return _weighted_gradient(estimate, cells, np.ones(1))[1]


@modes
def test_surrogate_of_patches_is_exact(replacement):
    outcomes = _outcomes(2, replacement)
    cells, weights = _pairs(outcomes, replacement)
    rewards = FEATURES @ READ_OUT
    expected = _gradient(lambda logits: _softmax(logits) @ rewards)
    found = _surrogate_gradient(cells, weights, rewards[cells], replacement, repeats=2)
    np.testing.assert_allclose(found, expected, atol=EXACT)
    if not replacement:  # its plain logarithms would not do
        biased = _surrogate_gradient(cells, weights, rewards[cells], replacement, as_if=True, repeats=2)
        assert np.linalg.norm(biased - expected) > 0.02 * np.linalg.norm(expected)


@modes
def test_surrogate_of_images_is_exact(replacement):
    outcomes = _outcomes(2, replacement)
    cells, weights = _pairs(outcomes, replacement)

    def rewards(cells):  # of both patches together
        first, second = (FEATURES[cells[:, t]] @ READ_OUT for t in (0, 1))
        return np.tanh(first + 0.5 * second) + first * second

    def mean(logits):
        return _chances(_softmax(logits), outcomes, replacement) @ rewards(outcomes)

    found = _surrogate_gradient(cells, weights, rewards(cells), replacement, repeats=2)
    np.testing.assert_allclose(found, _gradient(mean), atol=EXACT)


@modes
def test_draws_estimate_within_four_standard_errors(replacement):
    """Sampler, probabilities and estimator together, 20,000 draws of 3 cells."""
    rows = 20_000
    logits = tf.constant(np.tile(LOGITS.astype("float32"), (rows, 1)))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        maps = tf.reshape(tf.nn.softmax(logits), (rows, 3, 4))
        cells = ops.sample_cells(maps, 3, replacement, random.keys(12, 0, np.arange(rows)))
        drawn = tf.gather(tf.reshape(maps, (rows, 12)), cells, batch_dims=1)
        features = tf.gather(tf.constant(FEATURES.astype("float32")), cells)
        values = tf.linalg.matvec(ops.expectation(features, drawn, replacement), READ_OUT.astype("float32"))
    gradients = tape.gradient(values, logits).numpy().astype("float64")
    expected = _gradient(lambda logits: _softmax(logits) @ FEATURES @ READ_OUT)
    for found, exact in [(values.numpy(), ATTENTION @ FEATURES @ READ_OUT), (gradients, expected)]:
        error = found.std(axis=0) / np.sqrt(rows)
        assert (np.abs(found.mean(axis=0) - exact) < 4 * error).all()


def test_self_weighted_tends_to_its_limit():
    rows, patches = 20, 5000
    maps = np.tile(ATTENTION.reshape(1, 3, 4), (rows, 1, 1)).astype("float32")
    cells = ops.sample_cells(maps, patches, True, random.keys(2, 0, np.arange(rows))).numpy()
    answers = ops.aggregate(FEATURES[cells], ATTENTION[cells]).numpy()
    limit = ATTENTION**2 @ FEATURES / (ATTENTION**2).sum()
    error = answers.std(axis=0, ddof=1) / np.sqrt(rows)
    assert (np.abs(answers.mean(axis=0) - limit) < 4 * error).all()
    assert np.abs(limit - ATTENTION @ FEATURES).max() > 10 * error.max()  # and not to the expectation


@modes
def test_cells_are_drawn_with_their_probabilities(replacement):
    """All ordered draws of two cells: chi-square. A cell of probability 0 is among them."""
    attention = ATTENTION.copy()
    attention[5] = 0
    attention /= attention.sum()
    rows = 40_000
    maps = np.tile(attention.reshape(1, 3, 4), (rows, 1, 1)).astype("float32")
    cells = ops.sample_cells(maps, 2, replacement, random.keys(3, 0, np.arange(rows))).numpy()
    assert cells.dtype == "int32"
    outcomes = _outcomes(2, replacement)
    outcomes = outcomes[(outcomes != 5).all(axis=1)]
    found = np.bincount(cells @ [12, 1], minlength=144)
    expected = _chances(attention, outcomes, replacement) * rows
    assert found[outcomes @ [12, 1]].sum() == rows
    assert scipy.stats.chisquare(found[outcomes @ [12, 1]], expected).pvalue > 0.01


@modes
def test_millions_of_cells_are_drawn_precisely(replacement):
    """Even, but for a tenth that has half of the mass, and one that has none."""
    shape, rows, patches = (1000, 1000), 8, 500
    weights = np.ones(10)
    weights[3], weights[7] = 9, 0
    attention = np.tile(weights, 10**5).reshape(shape)
    attention = np.tile((attention / attention.sum()).astype("float32"), (rows, 1, 1))
    cells = ops.sample_cells(attention, patches, replacement, random.keys(4, 0, np.arange(rows))).numpy()
    expected = np.delete(weights, 7) / weights.sum() * cells.size
    found = np.bincount(cells.ravel() % 10, minlength=10)
    assert found[7] == 0
    assert scipy.stats.chisquare(np.delete(found, 7), expected).pvalue > 0.01
    stripes = np.bincount(cells.ravel() // 50_000, minlength=20)
    assert scipy.stats.chisquare(stripes).pvalue > 0.01


def test_the_ends_of_the_levels_fall_on_cells_that_have_attention():
    maps = np.random.default_rng(9).random((2000, 5, 7)).astype("float32")
    maps[:, [0, 4]] = maps[:, :, [0, 6]] = 0
    levels = np.tile(np.array([2.0**-33, 1 - 2.0**-24], "float32"), (2000, 2, 1))
    np.testing.assert_array_equal(cells_at(maps, levels), np.tile([8, 26], (2000, 1)))


def test_without_replacement_empty_cells_come_last():
    attention = np.zeros((50, 3, 4), "float32")
    attention[:, 1, 1:3] = [1e-28, 1]
    keys = random.keys(5, 0, np.arange(50))
    cells = ops.sample_cells(attention, 12, False, keys).numpy()
    np.testing.assert_array_equal(np.sort(cells, axis=1), np.tile(np.arange(12), (50, 1)))
    np.testing.assert_array_equal(cells[:, :2], np.tile([6, 5], (50, 1)))
    with tf.GradientTape() as tape:
        maps = tf.constant(attention)
        tape.watch(maps)
        logs = ops.log_probabilities(maps, cells, False)
    np.testing.assert_allclose(logs, 0, atol=1e-6)  # nothing else could have been drawn
    assert np.isfinite(tape.gradient(logs, maps)).all()


def test_empty_maps_stay_finite():
    maps = tf.zeros((2, 3, 4))
    keys = random.keys(5, 0, np.arange(2))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        for replacement in (True, False):
            cells = ops.sample_cells(maps, 3, replacement, keys)
            logs = ops.log_probabilities(maps, cells, replacement)
            assert np.isfinite(logs).all()
        total = tf.reduce_sum(logs) + tf.reduce_sum(ops.negative_entropy(maps))
    assert np.isfinite(tape.gradient(total, maps)).all()
    np.testing.assert_array_equal(ops.aggregate(np.ones((2, 3, 4)), np.zeros((2, 3)), drawn=False), 0)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_graphs_draw_the_same_at_sizes_known_only_at_run_time(jit_compile):
    def draw(maps, keys):
        drawn = [ops.sample_cells(maps, 5, replacement, keys) for replacement in (True, False)]
        logs = [ops.log_probabilities(maps, cells, bool(i)) for i, cells in enumerate(drawn[::-1])]
        return [*drawn, ops.greedy_cells(maps, 5, 3)], logs

    signature = [tf.TensorSpec((None, None, None)), tf.TensorSpec((None, 2), tf.int32)]
    graph = tf.function(draw, input_signature=signature, jit_compile=jit_compile)
    for shape in [(3, 6, 4)] if jit_compile else [(3, 6, 4), (2, 5, 9)]:
        maps = tf.nn.softmax(np.random.default_rng(1).normal(size=shape).astype("float32"), axis=2) / shape[1]
        keys = random.keys(0, 0, np.arange(len(maps)))
        (cells, logs), (expected_cells, expected_logs) = graph(maps, keys), draw(maps, keys)
        np.testing.assert_array_equal(tf.stack(cells), expected_cells)
        np.testing.assert_allclose(tf.stack(logs), expected_logs, rtol=1e-5)


def test_log_probabilities_are_those_of_tensorflow_probability():
    """`PlackettLuce` ranks all cells: two first ones have the sum over the orders of the rest."""
    from tensorflow_probability import distributions  # seconds to import

    attention = _softmax(np.random.default_rng(2).normal(size=(2, 5))).astype("float32")
    attention /= attention.sum(axis=1, keepdims=True)
    for first, second in itertools.permutations(range(5), 2):
        rest = [cell for cell in range(5) if cell not in (first, second)]
        ranks = np.array([(first, second, *order) for order in itertools.permutations(rest)])
        ranked = distributions.PlackettLuce(attention[:, None]).log_prob(np.tile(ranks, (2, 1, 1)))
        cells = np.tile([first, second], (2, 1))
        ordered = ops.log_probabilities(attention[:, None], cells, replacement=False)
        np.testing.assert_allclose(tf.reduce_sum(ordered, 1), tf.reduce_logsumexp(ranked, 1), atol=1e-5)
        plain = ops.log_probabilities(attention[:, None], cells, replacement=True)
        expected = distributions.Categorical(probs=attention[:, None]).log_prob(cells)
        np.testing.assert_allclose(plain, expected, atol=1e-5)


def test_log_probabilities_keep_what_is_left_of_a_peaked_map():
    weights = np.array([1, 1e-9, 2e-9, 4e-9, 1e-12])
    attention = (weights / weights.sum()).astype("float32").reshape(1, 1, 5)
    found = ops.log_probabilities(attention, np.array([[0, 2, 1, 3]]), replacement=False).numpy()
    left = np.array([1, 7.001e-9, 5.001e-9, 4.001e-9])
    np.testing.assert_allclose(found[0], np.log(weights[[0, 2, 1, 3]] / left), atol=1e-6)


def test_gradients_of_ordered_log_probabilities_are_those_of_the_equation():
    cells, cotangent = np.array([7, 2, 9, 0]), np.array([0.3, -1.0, 2.0, 0.5])
    maps = tf.constant(ATTENTION.reshape(1, 3, 4))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        logs = ops.log_probabilities(maps, cells[None], replacement=False)
        total = tf.reduce_sum(logs * cotangent)
    np.testing.assert_allclose(logs[0], reference.sampling.ordered_log_probabilities(ATTENTION, cells))
    steps = [ATTENTION + 1e-30j * row for row in np.eye(12)]
    exact = [reference.sampling.ordered_log_probabilities(a, cells).imag @ cotangent / 1e-30 for a in steps]
    np.testing.assert_allclose(tape.gradient(total, maps).numpy().ravel(), exact, rtol=1e-9)


@pytest.mark.parametrize("shape", [(9, 13), (3, 20), (20, 2), (1, 9)])
@pytest.mark.parametrize("distance", [0, 1, 2, 3, 6])
def test_greedy_cells_are_those_of_a_plain_search(shape, distance):
    maps = np.random.default_rng(6).random((4, *shape)).astype("float32")
    maps[0] *= maps[0] > 0.8
    maps[1] **= 20  # down to 1e-30 and below
    for patches in (1, 4, 9):
        chosen = ops.greedy_cells(maps, patches, distance)
        assert chosen.dtype == "int32"
        expected = [reference.sampling.greedy(each, patches, distance) for each in maps]
        np.testing.assert_array_equal(chosen, expected)


def test_greedy_cells_repeat_the_first_where_the_map_runs_out():
    graph = tf.function(
        lambda maps: ops.greedy_cells(maps, 6, 2), input_signature=[tf.TensorSpec((None, None, None))]
    )
    np.testing.assert_array_equal(
        graph(np.array([[[0.1, 0.6], [0.0, 0.3]]], "float32")), [[1, 3, 0, 2, 0, 0]]
    )


def test_advantages():
    rewards = np.random.default_rng(7).random((6, 4)).astype("float32")
    images = rewards.mean(axis=1)
    for values in (rewards, images):
        found = advantages(values, "leave_one_out", repeats=3).numpy()
        for row in range(6):
            others = [other for other in range(row // 3 * 3, row // 3 * 3 + 3) if other != row]
            np.testing.assert_allclose(found[row], values[row] - values[others].mean(), atol=1e-6)
        centred = values - values.mean()
        np.testing.assert_allclose(advantages(values, "leave_one_out"), centred, atol=1e-6)
        np.testing.assert_allclose(advantages(values, "batch_mean", repeats=3), centred, atol=1e-6)
        np.testing.assert_allclose(advantages(values, "z_score"), centred / values.std(), rtol=1e-4)
        # of two rewards, the mean takes half of the gradient away: 1 - 1/n of it stays
        halves = advantages(values[:2], "leave_one_out", repeats=2) / 2
        if values.ndim == 1:
            np.testing.assert_allclose(advantages(values[:2], "batch_mean"), halves, atol=1e-6)
    np.testing.assert_array_equal(advantages(np.ones((4, 2), "float32"), "z_score"), 0)


def test_rewards_get_no_gradient():
    rewards = tf.constant([[0.5, 1.0]])
    logs = tf.constant([[-1.0, -2.0]])
    for replacement in (True, False):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([rewards, logs])
            loss = ops.reinforce_surrogate(logs, rewards, "batch_mean", replacement=replacement)
        assert tape.gradient(loss, rewards) is None
        assert np.abs(tape.gradient(loss, logs)).max() > 0


def test_negative_entropy():
    attention = np.stack([ATTENTION, np.eye(12)[3], np.full(12, 1 / 12)]).reshape(3, 3, 4)
    expected = [(ATTENTION * np.log(ATTENTION)).sum(), 0, -np.log(12)]
    np.testing.assert_allclose(ops.negative_entropy(attention), expected, atol=1e-12)


def test_chosen_cells_weigh_by_their_attention():
    weights = ATTENTION[None, :4]
    features = tf.constant(FEATURES[None, :4])
    expected = weights @ FEATURES[:4] / weights.sum()
    for aggregation, estimator in [
        ("self_weighted", "reinforce"),
        ("mean", "reinforce"),
        ("mean", "expectation"),
    ]:
        answer = ops.aggregate(features, tf.constant(weights), aggregation, estimator, drawn=False)
        np.testing.assert_allclose(answer, expected, rtol=1e-12)


def test_sixteen_bits_are_summed_in_float32():
    maps = tf.cast(np.full((1, 200, 200), 1 / 40_000), "bfloat16")
    assert ops.negative_entropy(maps).dtype == "float32"
    np.testing.assert_allclose(ops.negative_entropy(maps), -np.log(40_000), rtol=0.01)
    cells = ops.sample_cells(maps, 4000, True, random.keys(8, 0, [0])).numpy()
    assert scipy.stats.chisquare(np.bincount(cells[0] // 2000, minlength=20)).pvalue > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.sample_cells(np.ones((2, 3)), 1, True, None), "shape"),
        (lambda: ops.sample_cells(np.ones((1, 2, 3)), 7, False, None), "patches=7"),
        (lambda: ops.greedy_cells(np.ones((1, 2, 3)), 7, 2), "patches=7"),
        (lambda: ops.sample_cells(np.ones((1, 2, 3)), 0, True, None), "patches=0"),
        (lambda: ops.aggregate(None, None, "self_weighted", "expectation"), "do not estimate"),
        (lambda: ops.aggregate(None, None, "median"), "median"),
        (lambda: ops.aggregate(None, None, "mean", "straight"), "straight"),
        (lambda: ops.reinforce_surrogate(np.ones((2, 3)), np.ones(2), "median"), "median"),
        (lambda: ops.reinforce_surrogate(np.ones((2, 3)), np.ones(2), repeats=0), "repeats=0"),
        (lambda: ops.reinforce_surrogate(np.ones(2), np.ones(2)), "log_probs"),
    ],
)
def test_errors_say_what_was_received(call, message):
    with pytest.raises(ValueError, match=f"{message}.*|Received: .*{message}") as error:
        call()
    assert "Received: " in str(error.value)
    assert message in str(error.value)
