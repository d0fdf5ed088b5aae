"""Cells drawn one after another, each in view of the patches seen before."""

import random
from collections.abc import Callable
from typing import Any

import keras

from keras_medattn.ops.random import keys, uniform
from keras_medattn.ops.sampling import cells_at

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class RecurrentSampler(keras.layers.Layer):
    """Draws the cells of an attention map one after another, each in view of what the earlier ones showed.

    `logits_t = log a + v . tanh(W [features, place, visited_t, h_t] + b)`, `cell_t ~ softmax(logits_t)`,
    `h_(t+1) = GRU([seen_t, place of cell_t], h_t)`, `h_1 = 0`: the conditional sampling that Sinigaglia
    (Scaling mega-pixel images classification via attention sampling, XI.B) proposes and leaves open. So a
    second patch can be drawn near the first one, where both show the same object, and not in another mode
    of the attention.

    W is a 1x1 convolution. The tanh is needed: the softmax would take a linear `W h` off again, as it is the
    same in all cells. v starts at 0: at first the cells are drawn from `a` alone. A place is row and column,
    from -1 to 1 over the cells of positive attention. Cells without attention are not drawn while any other
    is left, and what their features hold is never read.

    In training the layer draws, as a function of its seed, the number of training calls before and the
    example. Otherwise it takes the most probable cell that was not taken before, or draws where it is given
    `draw`.

    Args:
        patches: P, the number of cells.
        units: Size of the hidden state and of the hidden map.
        replacement: Whether a cell may be drawn again. If not, the cells drawn before get no probability.
        seed: Seed of the draws. By default one is drawn, and kept in the configuration.
        patch_features: Size E of what `read` answers; by default D.

    Call arguments:
        attention: Float tensor `(B, h, w)`, not negative: `a`. It need not sum to 1.
        features: Float tensor `(B, h, w, D)` that the later draws are decided by.
        examples: Integer tensor `(B,)` that tells the examples of a step apart; by default their number in
            the batch. Replicas that get different examples must tell them apart here.
        read: Function of the cells `(B,)` int32 just drawn, that answers what their patches show, `(B, E)`: a
            model reads the patches and runs its feature network in it. By default the cells' own `features`.
        draw: An int: draws with this number in place of that of the training call, in training or not.
        training: Whether to draw, and to count the call.
        return_attention_scores: Whether to answer the distribution of each draw, too.

    Input shape:
        `(B, h, w)` and `(B, h, w, D)`. Height and width may be unknown.

    Output shape:
        What the patches show `(B, P, E)`, `cells (B, P)` int32, flat indices `row * w + column`, and
        `log_probs (B, P)`, each given the earlier draws: their sum is the log-probability of all. With
        `return_attention_scores=True` also the distributions `(B, P, h, w)`.

    Raises:
        ValueError: If an argument is not valid or the shapes do not fit.

    Example:

    >>> attention = keras.ops.convert_to_tensor([[[0.1, 0.6], [0.3, 0.0]]])
    >>> features = keras.ops.ones((1, 2, 2, 8))
    >>> seen, cells, log_probs = RecurrentSampler(patches=3)(attention, features)
    >>> tuple(seen.shape), sorted(int(cell) for cell in cells[0])
    ((1, 3, 8), [0, 1, 2])
    """

    def __init__(
        self,
        patches: int,
        units: int = 16,
        replacement: bool = True,
        seed: int | None = None,
        patch_features: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # 16 bits would round small attention to none
        if min(patches, units, patch_features or 1) < 1:
            raise ValueError(
                "`patches`, `units` and `patch_features` must be at least 1. "
                f"Received: patches={patches}, units={units}, patch_features={patch_features}"
            )
        self.patches = patches
        self.units = units
        self.replacement = replacement
        self.seed = random.randrange(2**31) if seed is None else seed
        self.patch_features = patch_features
        self.cell = keras.layers.GRUCell(units, dtype=self.dtype_policy, name="gru")

    def build(self, attention_shape: tuple, features_shape: tuple) -> None:
        """Makes the convolution, the weights of its answers, the GRU and the number of training calls."""
        _check(attention_shape, features_shape)
        channels = features_shape[-1]
        inputs = channels + 3 + self.units  # features, place, visited, state
        self.kernel = self.add_weight((inputs, self.units), initializer="glorot_uniform", name="kernel")
        self.bias = self.add_weight((self.units,), initializer="zeros", name="bias")
        self.score = self.add_weight((self.units, 1), initializer="zeros", name="score")
        self.cell.build((None, (self.patch_features or channels) + 2))
        self.step = self.add_weight(
            (), "zeros", "int32", trainable=False, name="step", aggregation="only_first_replica"
        )

    def call(
        self,
        attention: Any,
        features: Any,
        examples: Any = None,
        read: Callable[[Any], Any] | None = None,
        draw: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
    ) -> tuple:
        """Answers what the patches show, the cells, their log-probabilities, on request the distributions."""
        _check(attention.shape, features.shape)
        compute, exact = self.compute_dtype, keras.backend.result_type(self.compute_dtype, "float32")
        batch, height, width, channels = ops.shape(features)
        count = height * width
        attention = ops.reshape(ops.cast(attention, exact), (batch, count))
        real = attention > 0
        features = ops.reshape(ops.cast(features, compute), (batch, count, channels))
        features = ops.where(ops.expand_dims(real, 2), features, 0)
        places = _places(ops.reshape(real, (batch, height, width)), exact)
        places = ops.cast(places, compute)  # (B, h w, 2)
        kernel, score = ops.cast(self.kernel, compute), ops.cast(self.score, compute)
        maps = ops.matmul(ops.concatenate([features, places], axis=2), kernel[: channels + 2])
        maps = maps + ops.cast(self.bias, compute)  # (B, h w, U)
        base = ops.log(ops.maximum(attention, 1e-30))

        numbers = ops.arange(count, dtype="int32")
        starts = ops.arange(batch, dtype="int32") * count
        if training and draw is None:
            draw = self.step + 0  # its value before the count
            self.step.assign(self.step + 1)
        if draw is not None:
            examples = ops.arange(batch, dtype="int32") if examples is None else examples
            levels = uniform(keys(self.seed, draw, examples), 2 * self.patches)
            levels = ops.reshape(levels, (batch, 2, self.patches))
        state, visited = ops.zeros((batch, self.units), compute), ops.zeros((batch, count), "bool")
        shown, cells, log_probs, distributions = [], [], [], []
        for turn in range(self.patches):
            hidden = maps + ops.expand_dims(ops.cast(visited, compute), 2) * kernel[channels + 2]
            hidden = ops.tanh(hidden + ops.expand_dims(ops.matmul(state, kernel[channels + 3 :]), 1))
            logits = base + ops.cast(ops.squeeze(ops.matmul(hidden, score), 2), exact)  # (B, h w)
            logits = ops.where(real, logits, -2e30)
            unvisited = ops.where(ops.logical_and(visited, real), -1e30, logits)
            logs = ops.log_softmax(logits if self.replacement else unvisited, axis=1)
            if draw is not None:
                probabilities = ops.reshape(ops.exp(logs), (batch, height, width))
                cell = cells_at(probabilities, levels[:, :, turn : turn + 1])  # (B, 1)
            else:
                cell = ops.top_k(ops.stop_gradient(unvisited), 1)[1]  # (B, 1)
            here = numbers == cell  # (B, h w)
            cell = ops.squeeze(cell, 1)
            seen = read(cell) if read else _rows(features, starts + cell)  # (B, E)
            shown.append(ops.cast(seen, compute))
            cells.append(cell)
            log_probs.append(ops.sum(ops.where(here, logs, 0), axis=1))
            distributions.append(ops.reshape(ops.exp(logs), (batch, height, width)))
            if turn + 1 < self.patches:
                place = _rows(places, starts + cell)
                state, _ = self.cell(ops.concatenate([shown[-1], place], axis=1), [state])
                visited = ops.logical_or(visited, here)
        answer = ops.stack(shown, 1), ops.stack(cells, 1), ops.cast(ops.stack(log_probs, 1), compute)
        if not return_attention_scores:
            return answer
        return *answer, ops.cast(ops.stack(distributions, 1), compute)

    def compute_output_spec(
        self,
        attention: Any,
        features: Any,
        examples: Any = None,
        read: Callable[[Any], Any] | None = None,
        draw: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
    ) -> tuple:
        """The shapes and dtypes of the answers."""
        shapes = self.compute_output_shape(attention.shape, features.shape)
        answer = tuple(
            keras.KerasTensor(shape, dtype=dtype)
            for shape, dtype in zip(shapes, (self.compute_dtype, "int32", self.compute_dtype), strict=True)
        )
        if not return_attention_scores:
            return answer
        shape = (attention.shape[0], self.patches, *attention.shape[1:])
        return *answer, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def compute_output_shape(self, attention_shape: tuple, features_shape: tuple) -> tuple:
        """The shapes of what the patches show, the cells and their log-probabilities."""
        _check(attention_shape, features_shape)
        draws = (attention_shape[0], self.patches)
        return (*draws, self.patch_features or features_shape[-1]), draws, draws

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            **super().get_config(),
            "patches": self.patches,
            "units": self.units,
            "replacement": self.replacement,
            "seed": self.seed,
            "patch_features": self.patch_features,
        }


def _check(attention_shape: tuple, features_shape: tuple) -> None:
    sizes = zip(attention_shape, features_shape[:3], strict=False)
    ranks = len(attention_shape) == 3 and len(features_shape) == 4
    if not ranks or any(None not in pair and pair[0] != pair[1] for pair in sizes):
        raise ValueError(
            "`attention` (B, h, w) goes with `features` (B, h, w, D). Received: "
            f"attention.shape={tuple(attention_shape)}, features.shape={tuple(features_shape)}"
        )


def _rows(maps: Any, places: Any) -> Any:
    """`maps (B, N, D)`, flattened, at the indices `places (B,)`: `(B, D)`."""
    return ops.take(ops.reshape(maps, (-1, maps.shape[2])), places, axis=0)


def _places(real: Any, dtype: str) -> Any:
    """Row and column of each cell `(B, h w, 2)`, from -1 to 1 over the extent of `real (B, h, w)`."""
    batch, height, width = ops.shape(real)

    def along(size: Any, axis: int) -> Any:
        numbers = ops.arange(size, dtype="int32")
        extent = ops.max(ops.where(ops.any(real, 3 - axis), numbers + 1, 1), axis=1, keepdims=True)
        place = ops.cast(2 * numbers + 1, dtype) / ops.cast(extent, dtype) - 1  # (B, size)
        return ops.broadcast_to(ops.expand_dims(place, 3 - axis), (batch, height, width))

    return ops.reshape(ops.stack([along(height, 1), along(width, 2)], axis=3), (batch, height * width, 2))
