import math

import conformance
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_conformance_export import each_format

from keras_medattn.layers import SpatialAttn
from keras_medattn.ops import attention, channel_scores, spatial_attention, spatial_scores


def _arrays(batch, length, keys, dtype="float64", depth=3, width=5):
    rng = np.random.default_rng(length)
    sizes = [(length, depth), (keys, depth), (keys, width)]
    return [rng.normal(size=(batch, *size)).astype(dtype) for size in sizes]


def _whole(query, key, value):
    scores = tf.nn.softmax(tf.matmul(query, key, transpose_b=True))
    return tf.matmul(scores, value)


def _with_gradients(attend):
    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            answer = attend(*tensors)
            loss = tf.reduce_sum(tf.sin(answer))
        return answer, *tape.gradient(loss, tensors)

    return step


@pytest.mark.parametrize(
    ("length", "keys", "block"),
    [(12, 12, 4), (13, 13, 4), (11, 7, 3), (5, 9, 1), (9, 5, 9), (3, 8, 100), (1, 4, 2)],
)
def test_blocks_equal_the_whole_in_value_and_gradient(length, keys, block):
    tensors = [tf.constant(array) for array in _arrays(2, length, keys)]
    in_blocks = _with_gradients(lambda *tensors: spatial_attention(*tensors, block))
    for array, expected in zip(in_blocks(*tensors), _with_gradients(_whole)(*tensors), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-13)


def test_queries_wider_than_values():
    tensors = [tf.constant(array) for array in _arrays(2, 7, 6, depth=5, width=2)]
    in_blocks = _with_gradients(lambda *tensors: spatial_attention(*tensors, 3))
    for array, expected in zip(in_blocks(*tensors), _with_gradients(_whole)(*tensors), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_sizes_known_only_at_run_time(jit_compile, monkeypatch):
    monkeypatch.setattr(attention, "_HELD", 50)  # scores at once: from one query to all of them
    signature = [tf.TensorSpec((None, None, size), tf.float64) for size in (3, 3, 5)]
    graph = tf.function(
        _with_gradients(spatial_attention), input_signature=signature, jit_compile=jit_compile
    )
    for sizes in [(2, 13, 7), (1, 4, 9), (3, 20, 30)]:
        arrays = _arrays(*sizes)
        expected = _with_gradients(_whole)(*map(tf.constant, arrays))
        for array, reference in zip(graph(*arrays), expected, strict=True):
            np.testing.assert_allclose(array, reference, rtol=1e-12, atol=1e-13)


@each_format
def test_exported_in_blocks(export, monkeypatch, tmp_path):
    """The rows of the conformance table are too small for more than one block."""
    monkeypatch.setattr(attention, "_HELD", 100)
    inputs = keras.Input((None, None, 4))
    model = keras.Model([inputs], [SpatialAttn(ratio=2)(inputs)])
    rng = np.random.default_rng(0)
    examples = [rng.normal(size=(*sizes, 4)).astype("float32") for sizes in [(1, 4, 5), (5, 3, 7)]]
    answers = [conformance.arrays(model([maps]))[0] for maps in examples]
    run = export(model, tmp_path)
    for maps, answer in zip(examples, answers, strict=True):
        np.testing.assert_allclose(run([maps])[0], answer, rtol=1e-4, atol=1e-4)


def _largest(block):
    """Numbers in the largest tensor of the graph of a step, of 300 queries and 200 keys."""
    specs = [tf.TensorSpec(array.shape, array.dtype) for array in _arrays(2, 300, 200)]
    step = tf.function(_with_gradients(lambda *tensors: spatial_attention(*tensors, block)))
    graph = step.get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    return max(math.prod(side.size for side in shape.dim) for shape in shapes if not shape.unknown_rank)


def test_no_tensor_holds_all_scores():
    assert _largest(None) == 2 * 300 * 200
    assert _largest(30) == 2 * 30 * 200


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 12544), [206, 398]),  # 10 million scores at once; the first block takes the rest
        ((8, 3136), [3136]),
        ((None, 784), [784]),
        ((None, 3136), [None]),  # the batch decides at run time
        ((2, None), [None]),
    ],
)
def test_the_number_of_scores_decides(shape, rows, monkeypatch):
    seen = []

    def recorded(query, key):
        seen.append(query.shape[1])
        return spatial_scores(query, key)

    monkeypatch.setattr(attention, "spatial_scores", recorded)
    specs = [tf.TensorSpec((*shape, size)) for size in (2, 2, 4)]
    tf.function(spatial_attention).get_concrete_function(*specs)
    assert list(dict.fromkeys(seen)) == rows


@pytest.mark.parametrize("block", [None, 4])
def test_half_precision_sums_in_float32(block):
    """The scores are beyond float16's range, and so is the sum of the values."""
    query = tf.ones((1, 9, 8), "float16") * 100
    key = tf.ones((1, 9, 8), "float16") * 100
    value = tf.ones((1, 9, 2), "float16") * 60000
    answer = spatial_attention(query, key, value, block)
    assert answer.dtype == "float16"
    np.testing.assert_allclose(answer, value, rtol=1e-3)
    assert spatial_scores(query, key).dtype == "float32"


@pytest.mark.parametrize("block", [None, 4])
def test_large_scores_stay_finite(block):
    query, key, value = (tf.constant(array * 1e3) for array in _arrays(2, 11, 7, "float32"))
    for array in _with_gradients(lambda *tensors: spatial_attention(*tensors, block))(query, key, value):
        assert np.isfinite(array).all()


def test_channel_scores_are_normalised_over_the_channels_of_the_query():
    query, key, _ = _arrays(2, 6, 6, depth=4)
    scores = channel_scores(query, key[..., :2])
    logits = np.einsum("bnc,bnd->bcd", query, key[..., :2])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_errors():
    query, key, value = _arrays(1, 4, 4)
    with pytest.raises(ValueError, match="Received: block=0"):
        spatial_attention(query, key, value, block=0)
    with pytest.raises(ValueError, match=r"Received: shapes \(1, 4, 3\), \(1, 4, 5\)"):
        spatial_attention(query, value, value)
