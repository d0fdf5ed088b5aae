"""Times training steps on one device, two replicas of a process, and two workers, of the same batches.

Run from the project's folder: `python benchmarks/scaling.py [--turns 7] [--steps 5] [--batch 16]`. Each row
is a process of its own (of workers two, on the loopback), kept on its cores, that trains the same MIMS from
scratch by `train.loop.fit`, on one device by Keras's `fit`. They take turns, some steps each, so that all
meet the same machine.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROWS = {  # name: (processes, replicas of each, cores of each)
    "one device, one core": (1, 1, 1),
    "one device, two cores": (1, 1, 2),
    "two replicas": (1, 2, 2),
    "two workers": (2, 1, 1),
}
SIZE = 128


def child(cores: list[int], replicas: int, turns: int, steps: int, batch: int) -> None:
    """Trains a turn for each line on standard input, and prints its seconds."""
    os.sched_setaffinity(0, cores)  # before TensorFlow counts them
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_medattn import models
    from keras_medattn.data import pipeline
    from keras_medattn.train import loop, strategy

    if replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    together = strategy.get("mirrored" if replicas > 1 else None)
    keras.utils.set_random_seed(0)
    with strategy.scope(together):
        model = models.MIMS(2, "small_cnn", stride=8, weights=None, kernels=[[1, 8], [3, 16]], k=5)
        model.build((None, SIZE, SIZE, 3))
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-3), loss, jit_compile=False)  # type: ignore[arg-type]
        model.optimizer.build(model.trainable_variables)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)

    def batches(shards=(0, 1, 1)):
        data = pipeline.training_batches(
            pipeline.held(pixels), np.arange(batch) % 2, batch, 0, range((turns + 1) * steps), shards=shards
        )
        return data.map(lambda x, y: (x, tf.one_hot(y, 2)))

    class Turns(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            print("ready", flush=True)
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            print(time.perf_counter() - self.began, flush=True)

    epochs = range(turns + 1)
    if together:
        loop.fit(model, batches, epochs, steps, [Turns()])
    else:
        quiet: dict = {"verbose": 0, "shuffle": False, "callbacks": [Turns()]}
        model.fit(batches(), epochs=len(epochs), steps_per_epoch=steps, **quiet)


def start(row: str, options: argparse.Namespace) -> list[subprocess.Popen]:
    """The processes of a row."""
    count, replicas, cores = ROWS[row]
    here = sorted(os.sched_getaffinity(0))
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{one.getsockname()[1]}" for one in sockets]}
    for one in sockets:
        one.close()
    numbers = (replicas, options.turns, options.steps, options.batch)
    started = []
    for index in range(count):
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
        if count > 1:
            environ["TF_CONFIG"] = json.dumps(
                {"cluster": cluster, "task": {"type": "worker", "index": index}}
            )
        own = ",".join(map(str, here[index * cores : (index + 1) * cores]))
        command, pipe = [sys.executable, __file__, "--child", own, *map(str, numbers)], subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ))
    return started


def turn(processes: list[subprocess.Popen]) -> float:
    """Seconds of one turn."""
    for one in processes:
        answer = one.stdout.readline().strip()  # type: ignore[union-attr]
        if answer != "ready":
            raise SystemExit(f"a process has ended. Received: {answer!r}")
    for one in processes:
        one.stdin.write("go\n")  # type: ignore[union-attr]
        one.stdin.flush()  # type: ignore[union-attr]
    return max(float(one.stdout.readline()) for one in processes)  # type: ignore[union-attr]


def main() -> None:
    """Print the table."""
    import measure
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("it needs two cores")
    running = {row: start(row, options) for row in ROWS}
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(options.turns + 1):
        for row, processes in running.items():
            seconds = turn(processes)
            if number:  # the first one traces
                found[row].append(options.steps / seconds)
    for process in (one for processes in running.values() for one in processes):
        process.wait()
    base = np.array(found["one device, one core"])
    rows = [
        [row, float(np.median(speeds)), float(np.median(np.array(speeds) / base))]
        for row, speeds in found.items()
    ]
    title = (
        f"MIMS, {SIZE} x {SIZE}, batches of {options.batch}, {options.turns} turns of {options.steps} steps"
    )
    measure.table(title, ["", "steps a second", "x one core"], rows)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child([int(core) for core in sys.argv[2].split(",")], *map(int, sys.argv[3:]))
    else:
        main()
