import numpy as np
import pytest
import tensorflow as tf

from keras_medattn.ops import top_k, top_k_pool

LOWEST = np.finfo("float32").min
# 640 positions begin the search by groups of 32 at k = 5.
LENGTHS = [5, 33, 639, 640, 672, 1003, 1311]


def _check(x, k, mask, values, indices):
    """Every rank holds the value that sorting gives, at a valid position of its own that holds it."""
    values, indices = np.asarray(values), np.asarray(indices)
    assert indices.dtype == np.int32
    for b in range(x.shape[0]):
        valid = np.ones(x.shape[1], bool) if mask is None else mask[b]
        for n in range(x.shape[2]):
            expected = -np.sort(-x[b, valid, n])[:k]
            filled = indices[b, n, : len(expected)]
            np.testing.assert_array_equal(values[b, n, : len(expected)], expected)
            np.testing.assert_array_equal(x[b, filled, n], expected)
            assert valid[filled].all()
            assert len(set(filled)) == len(filled)
            np.testing.assert_array_equal(values[b, n, len(expected) :], 0)
            np.testing.assert_array_equal(indices[b, n, len(expected) :], 0)


def _bag(length, kind="normal"):
    rng = np.random.default_rng(length)
    if kind == "ties":
        return rng.integers(-1, 2, (3, length, 4)).astype("float32")
    return rng.normal(size=(3, length, 4)).astype("float32")


def _mask(length):
    """Half of the positions, none, and the last three."""
    mask = np.random.default_rng(length).random((3, length)) < 0.5
    mask[1] = False
    mask[2] = np.arange(length) >= length - 3
    return mask


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("length", LENGTHS)
def test_exact(length, kind):
    x, mask = _bag(length, kind), _mask(length)
    _check(x, 5, None, *top_k(x, 5))
    _check(x, 5, mask, *top_k(x, 5, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_exact_where_the_length_is_known_only_at_run_time(jit_compile, masked):
    signature = [tf.TensorSpec((None, None, 4)), *[tf.TensorSpec((None, None), tf.bool)] * masked]
    graph = tf.function(
        lambda x, *mask: top_k(x, 5, *mask), input_signature=signature, jit_compile=jit_compile
    )
    for length in [3, 661] if jit_compile else [0, 1, 3, 31, 32, 33, 64, 161, 661]:
        x, mask = _bag(length, "ties"), _mask(length)
        values, indices = graph(x, mask) if masked else graph(x)
        assert values.shape == (3, 4, 5)
        _check(x, 5, mask if masked else None, values, indices)


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("value", [LOWEST, -np.inf, 0.0])
def test_masked_positions_lose_even_against_the_lowest_numbers(length, value):
    x, mask = np.full((3, length, 4), value, "float32"), _mask(length)
    x[~mask] = np.nan
    _check(x, 5, mask, *top_k(x, 5, mask))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions(dtype):
    x = tf.cast(_bag(700), dtype)
    values, _ = top_k(x, 5, _mask(700))
    assert values.dtype == dtype
    _check(
        tf.cast(x, "float64").numpy(), 5, _mask(700), tf.cast(values, "float64"), top_k(x, 5, _mask(700))[1]
    )


@pytest.mark.parametrize("length", [50, 700])
def test_the_gradient_goes_to_the_chosen_positions_only(length):
    x, mask = tf.constant(_bag(length)), _mask(length)
    upstream = np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        values, indices = top_k(x, 5, mask)
        loss = tf.reduce_sum(values * upstream)
    expected = np.zeros(x.shape, "float32")
    for b, n, r in np.ndindex(3, 4, 5):
        if r < mask[b].sum():
            expected[b, indices[b, n, r], n] += upstream[b, n, r]
    np.testing.assert_array_equal(tape.gradient(loss, x), expected)


def test_weights_are_renormalised_over_the_ranks_that_a_bag_fills():
    x = np.array([[4.0, 2.0, 1.0]] * 3, "float32")[..., None]
    mask = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
    pooled, scores = top_k_pool(x, tf.constant([0.5, 0.3, 0.2]), mask)
    np.testing.assert_allclose(pooled[:, 0], [4 * 0.5 + 2 * 0.3 + 0.2, (2 * 0.5 + 0.3) / 0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(
        scores["weights"][:, 0], [[0.5, 0.3, 0.2], [0.625, 0.375, 0], [0, 0, 0]], rtol=1e-6
    )


def test_no_valid_position_gives_zero_gradients():
    x, weights = tf.constant(_bag(700)), tf.constant([0.6, 0.4])
    with tf.GradientTape() as tape:
        tape.watch([x, weights])
        pooled, _ = top_k_pool(x, weights, np.zeros((3, 700), bool))
        loss = tf.reduce_sum(pooled + 1)
    for gradient in tape.gradient(loss, [x, weights]):
        np.testing.assert_array_equal(gradient, 0)


def test_weights_that_underflow_stay_finite():
    pooled, _ = top_k_pool(_bag(4), tf.constant([0.0, 0.0, 1.0]), np.arange(4) < np.array([[2]] * 3))
    np.testing.assert_array_equal(pooled, 0)


@pytest.mark.parametrize(("shape", "k"), [((2, 4), 1), ((2, 3, 4), 0), ((2, 3, 4), 4)])
def test_errors(shape, k):
    with pytest.raises(ValueError, match="Received:"):
        top_k(np.zeros(shape, "float32"), k)
