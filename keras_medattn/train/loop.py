"""The training loop over the replicas of a strategy: what `fit` is on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_medattn.data.augment import MIXING
from keras_medattn.data.pipeline import Shards, steps_an_epoch
from keras_medattn.train import strategy as strategies
from keras_medattn.train.recipe import Recipe, RecipeError


def fit(
    model: keras.Model,
    batches: Callable[[Shards], tf.data.Dataset],
    epochs: range,
    steps: int,
    callbacks: Sequence[keras.callbacks.Callback],
) -> None:
    """Train as `model.fit` does, over the replicas of the strategy that the model was compiled under.

    Keras's own `fit` fails over several machines, and takes the mean of the replicas' losses, which is not
    the batch's where their shares of it differ in size. Callbacks are called as by `fit`, on every worker;
    the model's own `callbacks` come first.

    Args:
        model: compiled, its optimiser built.
        batches: a worker's parts of the batches, one after another, for its replicas in turn.
        epochs: those to train.
        steps: of an epoch.
        callbacks: see above.
    """
    strategy = model.distribute_strategy
    calls = keras.callbacks.CallbackList(
        [*getattr(model, "callbacks", []), *callbacks], model=model, epochs=epochs.stop, steps=steps
    )
    data = iter(strategy.distribute_datasets_from_function(lambda context: batches(_shards(context))))
    walk = model._flatten_layers()  # Keras offers no public one through all layers
    norms = [layer for layer in walk if isinstance(layer, keras.layers.BatchNormalization)]

    @tf.function(autograph=False)
    def step(data: Any) -> dict[str, Any]:
        for on in (True, False):  # the statistics of the whole batch; a saved model knows nothing of it
            for layer in norms:
                layer.synchronized = on
            if on:
                strategy.run(train_step, (model, *next(data)))
        return model.get_metrics_result()

    model.stop_training = False
    calls.on_train_begin()
    logs: dict[str, Any] = {}
    for epoch in epochs:
        model.reset_metrics()
        calls.on_epoch_begin(epoch)
        for number in range(steps):
            calls.on_train_batch_begin(number)
            logs = step(data)
            calls.on_train_batch_end(number, logs)
        logs = {key: float(value) for key, value in logs.items()}
        calls.on_epoch_end(epoch, logs)
        if strategies.mean(model.stop_training) > 0:  # a worker's figures may differ in the last bit
            break
    calls.on_train_end(logs)


def check(strategy: tf.distribute.Strategy, recipe: Recipe, count: int) -> None:
    """See that the replicas can share a recipe's batches of `count` training images.

    Raises:
        RecipeError: some have no example, or a part of the system needs the whole batch in one place.
    """
    replicas = strategy.num_replicas_in_sync
    smallest = count // steps_an_epoch(count, recipe.train.batch_size)
    if smallest < replicas:
        raise RecipeError(
            f"train.batch_size must give each of {replicas} replicas an example: the smallest batch of "
            f"{count} training images has {smallest}. Received: {recipe.train.batch_size}"
        )
    if replicas > 1 and (recipe.train.accumulate > 1 or recipe.train.precision == "mixed_float16"):
        raise RecipeError(
            "train.accumulate must be 1, and train.precision float32 or mixed_bfloat16, where replicas share "
            f"a batch. Received: {recipe.train.accumulate} and {recipe.train.precision}"
        )
    mixing = sorted({str(one["layer"]) for one in recipe.augment} & MIXING)
    if mixing and replicas > 1:
        raise RecipeError(
            f"augment: {', '.join(mixing)} must be left out of {replicas} replicas: it mixes the images of a "
            f"whole batch, of which each has a part. Received: {mixing}"
        )
    if recipe.data.slices and replicas > 1:
        raise RecipeError(
            "data.slices: volumes train on one device: Keras takes the statistics of a batch that is padded "
            f"from one replica alone. Received: {replicas} replicas"
        )


def train_step(model: keras.Model, x: Any, y: Any, weight: Any = None) -> None:
    """One replica's part of a step: as Keras's, with the loss of the whole batch.

    ```
    loss = sum_r n_r / n loss_r        n_r of the n examples lie on replica r, and loss_r is their mean
    ```

    Keras's losses come divided by the number of replicas, since the optimiser adds the gradients up. A
    `numbered` model is told each example's number in the whole batch.
    """
    context: Any = tf.distribute.get_replica_context()
    replicas, own = context.num_replicas_in_sync, context.replica_id_in_sync_group
    count = tf.shape(y)[0]
    counts = context.all_reduce(tf.distribute.ReduceOp.SUM, count * tf.one_hot(own, replicas, dtype=tf.int32))
    if getattr(model, "numbered", False):
        x = {"image": x, "examples": tf.reduce_sum(counts[:own]) + tf.range(count)}
    with tf.GradientTape() as tape:
        answers = model(x, training=True)
        loss = model.compute_loss(x, y, answers, weight, training=True)
        share = tf.cast(replicas * count / tf.reduce_sum(counts), loss.dtype)
        scaled = model.optimizer.scale_loss(loss * share)  # here: gradients cross over in batch statistics
    weights = model.trainable_variables
    model.optimizer.apply(tape.gradient(scaled, weights), weights)
    model.metrics[0].update_state(loss * replicas, sample_weight=count)  # Keras's tracker of the loss
    model.compute_metrics(x, y, answers, weight)


def _shards(context: tf.distribute.InputContext) -> Shards:
    replicas = context.num_replicas_in_sync
    own = replicas // context.num_input_pipelines
    return context.input_pipeline_id * own, own, replicas
