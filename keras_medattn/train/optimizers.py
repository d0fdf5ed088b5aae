"""What moves the weights: the optimiser, its learning rates, and coupled L2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from keras_medattn.train.fitted import backbones_of
from keras_medattn.train.recipe import Train


def optimizer(train: Train, model: keras.Model, steps: int) -> keras.Optimizer:
    """The recipe's optimiser; backbones, and a system's `slow_parts`, move at their own share of its rate.

    Args:
        train: the settings.
        model: the system.
        steps: of an epoch.
    """
    if train.precision == "mixed_float16":  # small gradients are no numbers of 16 bits, unless scaled up
        return keras.optimizers.LossScaleOptimizer(
            optimizer(replace(train, precision="float32"), model, steps)
        )
    top, below = (_one(train, rate, steps) for rate in (1.0, train.backbone_rate))
    slow = [*backbones_of(model), *getattr(model, "slow_parts", [])]
    own = {id(variable) for one in slow for variable in one.trainable_variables}
    if not own:
        return top
    # gradients scaled by a half would not do: Adam divides the factor out again
    return keras.optimizers.MultiOptimizer(lambda variable: below if id(variable) in own else top)


def penalise(model: keras.Model, l2: float) -> None:
    """Add `l2 * w^2` to the training loss for every weight w that trains: its gradient gains `2 l2 w`."""
    for variable in model.trainable_variables if l2 else ():
        variable.regularizer = keras.regularizers.L2(l2)


def _one(train: Train, share: float, steps: int) -> keras.Optimizer:
    rate = _schedule(train, train.learning_rate * share, max(1, steps))
    every = train.accumulate if train.accumulate > 1 else None
    if train.optimizer == "sgd":
        return keras.optimizers.SGD(rate, train.momentum, gradient_accumulation_steps=every)
    if train.optimizer == "adam":
        return keras.optimizers.Adam(rate, gradient_accumulation_steps=every)
    adamw = keras.optimizers.AdamW(rate, weight_decay=train.weight_decay, gradient_accumulation_steps=every)
    adamw.exclude_from_weight_decay(var_names=["bias", "beta", "gamma", "sw", "logits"])
    return adamw


def _schedule(train: Train, rate: float, steps: int) -> Any:
    """A learning rate for each update; of a `step` schedule it changes between epochs alone."""
    schedules, every = keras.optimizers.schedules, train.accumulate
    if train.schedule == "cosine":
        found = schedules.CosineDecay(rate, max(1, train.epochs * steps // every))
    elif train.schedule == "step":
        some = train.step_epochs * steps / every
        found = schedules.ExponentialDecay(rate, some, train.step_factor, staircase=True)
    else:
        return rate
    return found if every == 1 else _Updates(found, every)


class _Updates(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over updates: Keras asks by the steps, of which an update takes several."""

    def __init__(self, schedule: Any, every: int):
        self.schedule, self.every = schedule, every

    def __call__(self, step: Any) -> Any:
        return self.schedule(step // self.every)

    def get_config(self) -> dict[str, Any]:
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "every": self.every}
