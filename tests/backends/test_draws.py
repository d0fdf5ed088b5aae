"""The same draws on every backend: bit for bit those of the whole-number reference."""

import keras
import numpy as np
import reference.sampling

from keras_medattn.ops import greedy_cells, random, sample_cells

SEED, STEP, EXAMPLES = 11, 4, np.array([3, 0, 2**31 - 1], "int32")


def _keys():
    return random.keys(SEED, STEP, EXAMPLES)


def _reference_keys():
    return [reference.sampling.threefry((SEED, STEP), (int(example), 0)) for example in EXAMPLES]


def _maps():
    maps = np.random.default_rng(0).random((3, 6, 5)) ** 3
    maps[:, 2] = 0
    return maps.astype("float32")


def test_numbers_are_the_same_bits():
    values = keras.ops.convert_to_numpy(random.uniform(_keys(), 501))
    expected = [reference.sampling.uniform(key, 501) for key in _reference_keys()]
    np.testing.assert_array_equal(values, np.array(expected).astype("float32"))


def test_cells_are_the_same():
    maps = _maps()
    drawn = keras.ops.convert_to_numpy(sample_cells(maps, 40, True, _keys()))
    again = keras.ops.convert_to_numpy(sample_cells(maps, 7, False, _keys()))
    for b, key in enumerate(_reference_keys()):
        np.testing.assert_array_equal(drawn[b], reference.sampling.draw(maps[b], key, 40))
        np.testing.assert_array_equal(again[b], reference.sampling.draw_distinct(maps[b], key, 7))


def test_chosen_cells_are_the_same():
    maps = _maps()
    chosen = keras.ops.convert_to_numpy(greedy_cells(maps, 6, 3))
    np.testing.assert_array_equal(chosen, [reference.sampling.greedy(each, 6, 3) for each in maps])
