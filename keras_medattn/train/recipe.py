"""A training recipe: TOML in, validated and typed settings out."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from keras_medattn.data.headers import MAX_PIXELS
from keras_medattn.data.sets import SETS

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "constant", "step")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class Data:
    """`[data]`: how files become the model's input.

    Attributes:
        set: name of a public data set (`keras_medattn.data.sets.SETS`), whose distributed folder the data
            then are. Empty: a folder a class, or a CSV.
        image_size: `[height, width]` in pixels that every image is resized to.
        classes: their order; of two, the second is the positive one. Empty: sorted.
        window: `[low, high]` intensities of 16-bit images that become 0 and 255. Empty: none.
        max_pixels: larger images are refused before they are decoded.
        scaled_decoding: decode JPEGs at 1/2, 1/4 or 1/8 where they stay twice as large as `image_size`:
            faster, with pixels a few levels off. The exported model does so, too; who sends it pixels must.
        val_fraction: share of the training images held out for validation where the data has no `val` split.
        test_fraction: share of all images held out for the test where the data has no splits.
        memory_gb: images at the model's size are kept in memory up to this; above it they are read again.
        disk_gb: above `memory_gb` and up to this they are kept decoded in one file of the cache folder.
        slices: `[fewest, most]` slices of a volume that are drawn in a training step. Empty: plain images.
        central: of a volume, how many slices around the middle one are used; 0: all of them.
    """

    set: str = ""
    image_size: tuple[int, int] = (512, 512)
    classes: tuple[str, ...] = ()
    window: tuple[float, ...] = ()
    max_pixels: int = MAX_PIXELS
    scaled_decoding: bool = False
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    memory_gb: float = 4.0
    disk_gb: float = 0.0
    slices: tuple[int, ...] = ()
    central: int = 0


@dataclass(frozen=True)
class Train:
    """`[train]`: how the model is fitted.

    Attributes:
        epochs: at most this many.
        batch_size: examples a step.
        accumulate: steps whose mean gradient moves the weights once: for batches larger than memory. Learning
            rates count these; batch norm and a baseline over the batch see one step's batch.
        precision: `float32`; or `mixed_bfloat16` or `mixed_float16`, which compute in 16 bits, and keep
            weights, scores and losses in 32.
        optimizer: `adamw`, `adam` or `sgd`.
        momentum: of `sgd`.
        learning_rate: of the layers on top of the backbone, at the start.
        schedule: of the learning rate: `cosine`, to 0 at the last epoch; `constant`; or `step`.
        step_epochs: of `step`: epochs between two steps.
        step_factor: of `step`: what the learning rate is multiplied with.
        backbone_rate: the backbones' learning rate as a share of it; that of GlobalMask's mask, too.
        weight_decay: of `adamw` alone, decoupled; biases and normalisation have none.
        l2: adds `l2 * w^2` for every weight that trains, biases too, to the training loss. A coupled weight
            decay d, as PyTorch's SGD and Adam have it, is `l2 = d / 2`.
        label_smoothing: of the cross entropy.
        class_weights: weigh classes by the inverse of their frequency.
        balance: draw classes equally often instead: an epoch repeats images of rare classes, each time
            augmented anew, and leaves out some of the frequent ones, others each time.
        patience: epochs without a better `monitor` after which training stops.
        monitor: `val_auroc` or `val_loss`; or `epoch`, which keeps the last one: for sets whose validation
            side is too small to choose by.
        watch_test: give the test side's accuracy and AUROC after each epoch, in the history. Nothing is
            chosen by them.
        show_images: after each epoch, show this many validation images in TensorBoard, the same ones, beside
            where the model looks; the pictures then lie in the run folder.
        frozen_stride: layers of the backbones up to this stride keep their weights; 0: all of them train.
        cached_views: run the frozen layers once on this many augmented views of each training image (the
            first is the image itself) and train on their cached features, one view an epoch; 0: no cache.
        seed: of everything random.
    """

    epochs: int = 50
    batch_size: int = 16
    accumulate: int = 1
    precision: str = "float32"
    optimizer: str = "adamw"
    momentum: float = 0.9
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    step_epochs: int = 30
    step_factor: float = 0.5
    backbone_rate: float = 0.5
    weight_decay: float = 1e-4
    l2: float = 0.0
    label_smoothing: float = 0.0
    class_weights: bool = True
    balance: bool = False
    patience: int = 15
    monitor: str = "val_auroc"
    watch_test: bool = False
    show_images: int = 0
    frozen_stride: int = 0
    cached_views: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. `model` holds `system` and the arguments of that model's class; `tune` the
    values among which `medattn tune` searches, which training leaves alone.
    """

    data: Data = field(default_factory=Data)
    model: dict[str, Any] = field(default_factory=lambda: {"system": "MIMS"})
    train: Train = field(default_factory=Train)
    augment: tuple[dict[str, Any], ...] = ()
    tune: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return json.loads(json.dumps(asdict(self)))


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `train.epochs=5`, or `model.weights=null` for Python's None.

    In the file the latter is `weights = "null"`.

    Raises:
        RecipeError: names the file, the key, what was received, and the nearest known key.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    return from_dict(_override(values, overrides), str(path))


def from_dict(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate plain values.

    Example:
        >>> from_dict({"train": {"epochs": 3}}).train.epochs
        3
        >>> from_dict({"train": {"epoch": 3}})
        Traceback (most recent call last):
        ...
        keras_medattn.train.recipe.RecipeError: recipe: train.epoch is no setting. Did you mean train.epochs?
    """
    from keras_medattn import models
    from keras_medattn.data import augment

    _known(values, [f.name for f in fields(Recipe)], "", source)
    recipe = Recipe(
        _section(Data, values.get("data", {}), "data", source),
        {"system": "MIMS"} | {k: None if v == "null" else v for k, v in values.get("model", {}).items()},
        _section(Train, values.get("train", {}), "train", source),
        tuple(values.get("augment", ())),
        dict(values.get("tune", {})),
    )
    try:
        _known(recipe.model, ["system", *models.arguments(recipe.model["system"])], "model.", source)
        for one in recipe.augment:
            augment.layer(one)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from error
    _sensible(recipe, source)
    return recipe


def _override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            raise RecipeError(f"an override is written section.key=value. Received: {text!r}")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:  # a bare word is a string, but for what TOML cannot say
            parsed = None if value.strip() == "null" else value.strip()
        values.setdefault(section, {})[name] = parsed
    return values


def _known(values: dict[str, Any], names: Sequence[str], prefix: str, source: str) -> None:
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1, 0.5)
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known: {', '.join(names)}"
            raise RecipeError(f"{source}: {prefix}{key} is no setting. {hint}")


def _section(kind: type, values: Any, name: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: [{name}] must be a table. Received: {values!r}")
    _known(values, [f.name for f in fields(kind)], f"{name}.", source)
    hints = typing.get_type_hints(kind)
    return kind(**{key: _typed(hints[key], value, f"{name}.{key}", source) for key, value in values.items()})


def _typed(hint: Any, value: Any, key: str, source: str) -> Any:
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if isinstance(value, (list, tuple)) and (parts[-1] is Ellipsis or len(parts) == len(value)):
            return tuple(_typed(parts[0], item, key, source) for item in value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    wanted = hint if isinstance(hint, types.GenericAlias) else hint.__name__
    raise RecipeError(f"{source}: {key} must be {wanted}. Received: {value!r}")


def _sensible(recipe: Recipe, source: str) -> None:
    data, train = recipe.data, recipe.train
    mixing = [one["layer"] for one in recipe.augment if one["layer"] in ("MixUp", "CutMix")]
    rules = [
        (not data.set or data.set in SETS, "data.set", data.set, f"one of {', '.join(SETS)}"),
        (
            not data.set or not data.classes,
            "data.classes",
            data.classes,
            "empty where data.set names a public set, which has its own order",
        ),
        (min(data.image_size) >= 32, "data.image_size", data.image_size, "32 pixels or more each way"),
        (len(data.window) in (0, 2), "data.window", data.window, "[low, high]"),
        (len(data.window) != 2 or data.window[0] < data.window[1], "data.window", data.window, "low < high"),
        (
            not data.scaled_decoding or not data.slices,
            "data.scaled_decoding",
            data.scaled_decoding,
            "false where data.slices is set: slices are decoded whole",
        ),
        (0 < data.val_fraction <= 0.5, "data.val_fraction", data.val_fraction, "in (0, .5]"),
        (0 <= data.test_fraction <= 0.5, "data.test_fraction", data.test_fraction, "in [0, .5]"),
        (
            len(data.slices) == 0 or (len(data.slices) == 2 and 0 < data.slices[0] <= data.slices[1]),
            "data.slices",
            data.slices,
            "[fewest, most], 1 or more",
        ),
        (data.central >= 0, "data.central", data.central, "0 or more"),
        (
            not data.central or len(data.slices) > 0,
            "data.central",
            data.central,
            "0 where data.slices is empty: plain images have no slices",
        ),
        (train.epochs > 0, "train.epochs", train.epochs, "1 or more"),
        (train.batch_size > 0, "train.batch_size", train.batch_size, "1 or more"),
        (train.accumulate > 0, "train.accumulate", train.accumulate, "1 or more"),
        (
            train.precision in PRECISIONS,
            "train.precision",
            train.precision,
            f"one of {', '.join(PRECISIONS)}",
        ),
        (train.optimizer in OPTIMIZERS, "train.optimizer", train.optimizer, "adamw, adam or sgd"),
        (0 <= train.momentum < 1, "train.momentum", train.momentum, "in [0, 1)"),
        (train.learning_rate > 0, "train.learning_rate", train.learning_rate, "above 0"),
        (train.schedule in SCHEDULES, "train.schedule", train.schedule, "cosine, constant or step"),
        (train.step_epochs > 0, "train.step_epochs", train.step_epochs, "1 or more"),
        (0 < train.step_factor <= 1, "train.step_factor", train.step_factor, "in (0, 1]"),
        (train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "0 or more"),
        (train.l2 >= 0, "train.l2", train.l2, "0 or more"),
        (train.patience > 0, "train.patience", train.patience, "1 or more"),
        (train.backbone_rate >= 0, "train.backbone_rate", train.backbone_rate, "0 or more"),
        (0 <= train.label_smoothing < 1, "train.label_smoothing", train.label_smoothing, "in [0, 1)"),
        (
            not (train.balance and train.class_weights),
            "train.class_weights",
            train.class_weights,
            "false where train.balance is true: together they would weigh rare classes twice",
        ),
        (
            train.monitor in ("val_auroc", "val_loss", "epoch"),
            "train.monitor",
            train.monitor,
            "val_auroc, val_loss or epoch",
        ),
        (
            train.frozen_stride in (0, 2, 4, 8, 16, 32),
            "train.frozen_stride",
            train.frozen_stride,
            "0, 2, ... 32",
        ),
        (train.show_images >= 0, "train.show_images", train.show_images, "0 or more"),
        (
            not train.show_images or not data.slices,
            "train.show_images",
            train.show_images,
            "0 where data.slices is set: volumes are not shown",
        ),
        (train.cached_views >= 0, "train.cached_views", train.cached_views, "0 or more"),
        (
            not train.cached_views or not data.slices,
            "train.cached_views",
            train.cached_views,
            "0 where data.slices is set: features of volumes are not cached",
        ),
        (
            not train.cached_views or train.frozen_stride > 0,
            "train.cached_views",
            train.cached_views,
            "0 where train.frozen_stride is 0: features of layers that train cannot be cached",
        ),
        (
            train.cached_views < 2 or len(recipe.augment) > 0,
            "train.cached_views",
            train.cached_views,
            "1 where the recipe has no [[augment]]: further views would be equal",
        ),
        (
            not mixing or not (train.cached_views or data.slices),
            "augment",
            mixing,
            "without MixUp and CutMix where train.cached_views or data.slices is set: they mix whole images, "
            "not features, nor volumes of different depth",
        ),
    ]
    for holds, key, value, wanted in rules:
        if not holds:
            raise RecipeError(f"{source}: {key} must be {wanted}. Received: {value!r}")
