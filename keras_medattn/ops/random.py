"""Random numbers as a pure function of seed, step and example: the same bits on every backend and replica."""

from typing import Any

import keras

ops: Any = keras.ops  # a type checker would infer its types from one backend

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Threefry-2x32 of 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3).

    A block cipher: under each key its answers to 0, 1, 2, ... are random. No generator has a state to keep.
    Its unsigned words are carried in int32, whose sums wrap around to the same bits.

    Args:
        key: The two words of the key: int32 tensors.
        counter: The two words of the counter: int32 tensors of a shape that broadcasts with `key`'s.

    Returns:
        Two random words: int32 tensors.

    Example:

    >>> word = ops.zeros((1,), "int32")
    >>> [hex(int(each[0]) % 2**32) for each in threefry((word, word), (word, word))]
    ['0x6b200159', '0x99ba4efe']
    """
    last = ops.bitwise_xor(ops.bitwise_xor(key[0], key[1]), _PARITY)
    words = (key[0], key[1], last)
    left, right = counter[0] + words[0], counter[1] + words[1]
    for turn in range(20):
        left = left + right
        right = ops.bitwise_xor(_rotate(right, _ROTATIONS[turn % 8]), left)
        if turn % 4 == 3:
            injected = turn // 4 + 1
            left = left + words[injected % 3]
            right = right + words[(injected + 1) % 3] + injected
    return left, right


def keys(seed: Any, step: Any, examples: Any) -> Any:
    """A key of its own for each example of each step.

    `keys[b] = threefry(key=(seed, step), counter=(examples[b], 0))`. An example draws the same numbers in
    whatever batch, order or replica it stands.

    Args:
        seed: An int, of which the low 32 bits count, or an int32 tensor `()`.
        step: An int or an integer tensor `()`.
        examples: Integer tensor `(B,)`: what tells the examples of a step apart.

    Returns:
        Int32 tensor `(B, 2)`.

    Example:

    >>> keys(seed=7, step=0, examples=[0, 1]).shape == (2, 2)
    True
    """
    counter = _word(examples)
    zeros = ops.zeros_like(counter)
    return ops.stack(threefry((zeros + _word(seed), zeros + _word(step)), (counter, zeros)), axis=-1)


def uniform(keys: Any, count: Any) -> Any:
    """Uniform numbers in the open interval (0, 1), a row for each key.

    `threefry(key=keys[b], counter=(i, 0))` gives two words of 32 bits, of which each becomes a number. Below
    2^-8 the numbers lie 2^-32 apart, so that their logarithms are good in the tail that decides which of
    millions of cells comes first.

    Args:
        keys: Int32 tensor `(B, 2)`, as `keys` answers.
        count: How many numbers for each key, an int or an integer tensor.

    Returns:
        Float32 tensor `(B, count)`: 2^-33 at least, 1 - 2^-24 at most.

    Example:

    >>> values = uniform(keys(seed=7, step=0, examples=[3]), 2)
    >>> [round(float(value), 3) for value in values[0]]
    [0.614, 0.26]
    """
    counter = ops.expand_dims(ops.arange((count + 1) // 2, dtype="int32"), 0)  # (1, count / 2)
    zeros = ops.zeros_like(counter + keys[:, :1])  # (B, count / 2)
    words = threefry((keys[:, :1] + zeros, keys[:, 1:] + zeros), (counter + zeros, zeros))
    bits = ops.concatenate(words, axis=1)[:, :count]
    high = ops.cast(_shift_right(bits, 16), "float32") * 2.0**-16  # each step but the sum is exact
    low = (ops.cast(ops.bitwise_and(bits, 0xFFFF), "float32") + 0.5) * 2.0**-32
    return ops.minimum(high + low, 1 - 2.0**-24)  # the sum may round to 1


def _word(number: Any) -> Any:
    """An integer as int32, a Python int by its low 32 bits."""
    if isinstance(number, int):
        number = (number + 2**31) % 2**32 - 2**31
    return ops.cast(ops.convert_to_tensor(number), "int32")


def _shift_right(word: Any, by: int) -> Any:
    """A shift that fills up with zeros: int32's own repeats the sign."""
    return ops.bitwise_and(ops.bitwise_right_shift(word, by), 2 ** (32 - by) - 1)


def _rotate(word: Any, by: int) -> Any:
    return ops.bitwise_or(ops.bitwise_left_shift(word, by), _shift_right(word, 32 - by))
