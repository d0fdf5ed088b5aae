"""Times a CNN's training step with attention against one without, beside the ratio of their arithmetic.

Run from the project's folder: `python benchmarks/overhead.py [--runs 5] [--batch 2]`. At 224 x 224: VGG19
with C-Attn after blocks 1 and 2 and S-Attn after blocks 3 to 5, together and alone; ResNet-50 with gated
attention on its last maps. A CNN and its variants take turns, and each step answers its loss and all
gradients. Memory is the peak of building the CNN and its first step: TensorFlow keeps the room that initial
values took, and a step alone would seem to need less than it does.
"""

import argparse
import math
from collections.abc import Callable

import keras
import measure
import tensorflow as tf

from keras_medattn.layers import ChannelAttn, GatedAttention, SpatialAttn

CHANNEL = {"block1_conv2": ChannelAttn, "block2_conv2": ChannelAttn}
SPATIAL = dict.fromkeys(("block3_conv4", "block4_conv4", "block5_conv4"), SpatialAttn)
VGG19 = {
    "VGG19": {},
    "+ C": CHANNEL,
    "+ C at 224 only": {"block1_conv2": ChannelAttn},
    "+ S": SPATIAL,
    "+ C + S": {**CHANNEL, **SPATIAL},
}
RESNET50 = {
    "ResNet-50": None,
    "+ GatedAttention": GatedAttention,
    "+ GatedAttention(512)": lambda: GatedAttention(512),
}


def vgg19(name: str) -> keras.Model:
    """The network with its fully connected layers, and attention behind the named convolutions."""
    base = keras.applications.VGG19(weights=None, classes=2, classifier_activation=None)
    x = base.input
    for layer in base.layers[1:]:
        x = layer(x)
        if layer.name in VGG19[name]:
            x = VGG19[name][layer.name]()(x)
    return keras.Model(base.input, x)


def resnet50(name: str) -> keras.Model:
    base = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(224, 224, 3))
    x = base.output if RESNET50[name] is None else RESNET50[name]()(base.output)
    return keras.Model(base.input, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


NETWORKS = {"VGG19": (vgg19, VGG19), "ResNet-50": (resnet50, RESNET50)}


def make(build: Callable[[str], keras.Model], name: str, batch: int) -> measure.Step:
    keras.utils.set_random_seed(0)
    model, images = build(name), tf.random.stateless_normal((batch, 224, 224, 3), (0, 1))
    weights = [weight.value for weight in model.trainable_weights]

    @tf.function(jit_compile=False)
    def run() -> tuple:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            labels = tf.range(batch) % 2
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, weights)

    return lambda: run()[0].numpy()


def make_whole(build: Callable[[str], keras.Model], name: str, batch: int) -> measure.Step:
    """A step that makes the network, too."""
    return lambda: make(build, name, batch)()


def multiply_adds(model: keras.Model, batch: int) -> int:
    """Of the convolutions and products in the graph of a forward pass."""
    inputs = tf.TensorSpec((batch, 224, 224, 3))
    graph = tf.function(lambda images: model(images, training=True)).get_concrete_function(inputs).graph
    total = 0
    for node in graph.get_operations():
        if node.type == "Conv2D":
            inner = math.prod(node.inputs[1].shape[:3])
        elif node.type in ("MatMul", "BatchMatMulV2"):
            transposed = node.get_attr("transpose_a" if node.type == "MatMul" else "adj_x")
            inner = node.inputs[0].shape[-2 if transposed else -1]
        elif node.type in ("Einsum", "While", "StatelessWhile", "DepthwiseConv2dNative"):
            raise NotImplementedError(
                f"{node.name}: its multiply-adds are not counted. Received: {node.type}"
            )
        else:
            continue
        total += math.prod(node.outputs[0].shape) * inner
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    for title, (build, variants) in NETWORKS.items():
        memory = {name: measure.memory(make_whole, build, name, arguments.batch) for name in variants}
        times = measure.times(
            {name: make(build, name, arguments.batch) for name in variants}, arguments.runs, warm_up=1
        )
        work = {name: multiply_adds(build(name), arguments.batch) for name in variants}
        rows = [
            [
                name,
                times[name].min(),
                measure.ratio(times[name], times[title]),
                work[name] / 1e9,
                work[name] / work[title],
                memory[name],
                memory[name] / memory[title],
            ]
            for name in variants
        ]
        measure.table(
            f"{title} at 224, batch {arguments.batch}, forward and backward, {arguments.runs} runs in turn",
            ["", "fastest ms", "x", "G multiply-adds forward", "x", "MiB", "x"],
            rows,
        )


if __name__ == "__main__":
    main()
