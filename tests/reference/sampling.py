"""Threefry (Salmon et al.), draws from an attention map and the recurrent sampler (Sinigaglia, XI.B)."""

import itertools

import numpy as np

from reference import Array, Weights

WORD = 2**32


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 of 20 rounds, in whole numbers of any length."""
    schedule = (*key, 0x1BD11BDA ^ key[0] ^ key[1])
    x, y = (counter[0] + key[0]) % WORD, (counter[1] + key[1]) % WORD
    rotations = itertools.cycle((13, 15, 26, 6, 17, 29, 16, 24))
    for number in range(1, 21):
        rotation = next(rotations)
        x = (x + y) % WORD
        y = ((y << rotation) % WORD | y >> 32 - rotation) ^ x
        if number % 4 == 0:
            x = (x + schedule[number // 4 % 3]) % WORD
            y = (y + schedule[(number // 4 + 1) % 3] + number // 4) % WORD
    return x, y


def uniform(key: tuple[int, int], count: int) -> Array:
    """`count` numbers in (0, 1): first the first words of all blocks, then the second ones."""
    blocks = [threefry(key, (i, 0)) for i in range((count + 1) // 2)]
    words = [block[0] for block in blocks] + [block[1] for block in blocks]
    return np.minimum(np.array(words[:count], "uint64").astype("float64") / WORD + 0.5 / WORD, 1 - 2.0**-24)


def draw(attention: Array, key: tuple[int, int], patches: int = 1) -> Array:
    """Cells of `attention (h, w)`: by the distribution of the rows, then of the cells of the row."""
    levels = uniform(key, 2 * patches).reshape(2, patches)
    return np.array([_cell_at(attention, *pair) for pair in levels.T])


def _cell_at(attention: Array, of_row: float, of_column: float) -> int:
    sums = np.cumsum(attention.sum(axis=1, dtype="float64"))
    row = np.searchsorted(sums, of_row * sums[-1], side="right")
    columns = np.cumsum(attention[row], dtype="float64")
    return int(row * attention.shape[1] + np.searchsorted(columns, of_column * columns[-1], side="right"))


def draw_distinct(attention: Array, key: tuple[int, int], patches: int) -> Array:
    """Distinct cells of `attention (h, w)`: the first ones to ring, at rate a each (exponential clocks)."""
    flat = attention.ravel().astype("float64")
    with np.errstate(divide="ignore"):
        times = -np.log1p(-uniform(key, flat.size)) / flat
    return np.argsort(times, kind="stable")[:patches]


def greedy(attention: Array, patches: int, distance: int) -> list[int]:
    """The most probable cell that is far enough from all chosen ones, or else any, or else an empty one."""
    rows, columns = np.indices(attention.shape)
    nearest, chosen = np.full(attention.shape, attention.size), []
    for _ in range(patches):
        level = np.where(attention > 0, np.where(nearest >= distance, 3, 2), 1)
        level = np.where(nearest == 0, 0, level)
        cell = int(np.argmax(np.where(level == level.max(), attention, -1)))
        chosen.append(0 if level.max() == 0 else cell)
        row, column = divmod(cell, attention.shape[1])
        nearest = np.minimum(nearest, np.maximum(abs(rows - row), abs(columns - column)))
    return chosen


def ordered_log_probabilities(attention: Array, cells: Array) -> Array:
    """`log(a_t / (1 - cum(a)_t))` of the draws `cells (P,)` without replacement."""
    drawn = attention.ravel()[cells]
    return np.log(drawn / (1 - (np.cumsum(drawn) - drawn)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gru(weights: Weights, x: Array, h: Array) -> Array:
    """Gated recurrent unit (Cho et al.) with a bias of its own for the state (Keras: `reset_after`)."""
    of_input = x @ weights["gru/kernel"] + weights["gru/bias"][0]
    of_state = h @ weights["gru/recurrent_kernel"] + weights["gru/bias"][1]
    (update, reset, new), (update_h, reset_h, new_h) = np.split(of_input, 3), np.split(of_state, 3)
    update, reset = _sigmoid(update + update_h), _sigmoid(reset + reset_h)
    return update * h + (1 - update) * np.tanh(new + reset * new_h)


def recurrent_sampler(
    weights: Weights,
    attention: Array,
    features: Array,
    examples: Array | None = None,
    *,
    patches: int,
    units: int,
    replacement: bool,
    seed: int,
    training: bool,
) -> list[Array]:
    """What the drawn cells show, the cells, their log-probabilities, image by image and step by step."""
    answers = []
    for b, (a, maps) in enumerate(zip(attention, features, strict=True)):
        example = b if examples is None else int(examples[b])
        key = threefry((seed % WORD, int(weights["step"])), (example, 0))
        answers.append(_draws(weights, a, maps, key if training else None, patches, units, replacement))
    return [np.stack(each) for each in zip(*answers, strict=True)]


def _draws(weights, a, maps, key, patches, units, replacement):
    height, width = a.shape
    channels = maps.shape[-1]
    last_row, last_column = (np.flatnonzero((a > 0).any(axis=axis)).max() for axis in (1, 0))
    place = np.stack(
        np.meshgrid(
            (np.arange(height) + 0.5) / (last_row + 1) * 2 - 1,
            (np.arange(width) + 0.5) / (last_column + 1) * 2 - 1,
            indexing="ij",
        ),
        axis=-1,
    )
    real = a > 0
    maps = np.where(real[..., None], maps, 0)
    of_features, of_place, of_visited, of_state = np.split(
        weights["kernel"], [channels, channels + 2, channels + 3]
    )
    h, visited = np.zeros(units), np.zeros((height, width))
    levels = None if key is None else uniform(key, 2 * patches).reshape(2, patches)
    seen, cells, log_probs = [], [], []
    for turn in range(patches):
        hidden = maps @ of_features + place @ of_place + visited[..., None] * of_visited + h @ of_state
        logits = np.tanh(hidden + weights["bias"]) @ weights["score"][:, 0] + np.log(np.where(real, a, 1))
        fresh = real & (visited == 0)
        drawable = real if replacement else fresh
        probabilities = np.where(drawable, np.exp(logits - logits[drawable].max()), 0)
        probabilities /= probabilities.sum()
        if levels is None:
            cell = int(np.argmax(np.where(fresh, logits, -np.inf)))
        else:
            cell = _cell_at(probabilities, *levels[:, turn])
        row, column = divmod(cell, width)
        cells.append(cell)
        log_probs.append(np.log(probabilities[row, column]))
        seen.append(maps[row, column])
        h = gru(weights, np.concatenate([seen[-1], place[row, column]]), h)
        visited[row, column] = 1
    return np.stack(seen), np.array(cells, "int32"), np.array(log_probs)
