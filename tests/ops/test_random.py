import numpy as np
import pytest
import reference.sampling
import scipy.stats
import tensorflow as tf

from keras_medattn.ops import random

ONES = 2**32 - 1


def _words(*words):
    return tuple(np.array([word], "uint32").view("int32") for word in words)


@pytest.mark.parametrize(
    ("key", "counter", "answer"),  # the known answers of the paper's own distribution
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_threefry_gives_the_known_answers(key, counter, answer):
    words = random.threefry(*[tuple(map(tf.convert_to_tensor, _words(*each))) for each in (key, counter)])
    assert tuple(int(word[0]) % 2**32 for word in words) == answer
    assert reference.sampling.threefry(key, counter) == answer


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-5, 3), (2**40 + 7, 2**31 - 1)])
def test_numbers_are_those_of_the_reference(seed, step, count):
    examples = np.array([0, 4, 2**31 - 1], "int32")
    values = random.uniform(random.keys(seed, step, examples), count)
    assert values.dtype == "float32"
    for row, example in zip(values.numpy(), examples, strict=True):
        key = reference.sampling.threefry((seed % 2**32, step), (int(example), 0))
        expected = reference.sampling.uniform(key, count)
        np.testing.assert_array_equal(row, expected.astype("float32"))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_graphs_give_the_same_bits(jit_compile):
    eager = random.uniform(random.keys(3, 5, np.arange(4)), 1001)

    @tf.function(jit_compile=jit_compile)
    def graph(step, examples):
        return random.uniform(random.keys(3, step, examples), 1001)

    np.testing.assert_array_equal(graph(tf.constant(5), tf.range(4)), eager)


def test_a_count_may_be_known_only_at_run_time():
    keys = random.keys(3, 5, np.arange(4))
    graph = tf.function(
        lambda count: random.uniform(keys, count), input_signature=[tf.TensorSpec((), tf.int32)]
    )
    for count in (0, 1, 6, 9):
        np.testing.assert_array_equal(graph(count), random.uniform(keys, count))


def test_an_example_draws_the_same_in_any_batch_and_others_in_any_other_step():
    base = random.uniform(random.keys(1, 2, [7, 8, 9]), 64).numpy()
    np.testing.assert_array_equal(random.uniform(random.keys(1, 2, [9, 7]), 64), base[[2, 0]])
    others = [random.keys(2, 2, [7]), random.keys(1, 3, [7]), random.keys(2, 1, [7]), random.keys(1, 2, [8])]
    for keys in others:
        assert not np.isin(random.uniform(keys, 64), base[0]).any()


def test_numbers_are_uniform_and_independent():
    values = random.uniform(random.keys(0, 0, np.arange(64)), 2048).numpy().astype("float64")
    assert values.min() > 0
    assert values.max() < 1
    assert scipy.stats.kstest(values.ravel(), "uniform").pvalue > 0.01
    for left, right in [
        (values[:-1], values[1:]),
        (values[:, :-1], values[:, 1:]),
        (values[:, ::2], values[:, 1::2]),
    ]:
        pairs = np.histogram2d(left.ravel(), right.ravel(), bins=16, range=[(0, 1)] * 2)[0]
        assert scipy.stats.chisquare(pairs.ravel()).pvalue > 0.01
