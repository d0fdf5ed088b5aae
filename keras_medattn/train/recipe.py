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


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class Data:
    """`[data]`: how files become the model's input.

    Attributes:
        image_size: `[height, width]` in pixels that every image is resized to.
        classes: their order; of two, the second is the positive one. Empty: sorted.
        window: `[low, high]` intensities of 16-bit images that become 0 and 255. Empty: none.
        max_pixels: larger images are refused before they are decoded.
        val_fraction: share of the training images held out for validation where the data has no `val` split.
        test_fraction: share of all images held out for the test where the data has no splits.
        memory_gb: images at the model's size are kept in memory up to this; above it they are read again.
    """

    image_size: tuple[int, int] = (512, 512)
    classes: tuple[str, ...] = ()
    window: tuple[float, ...] = ()
    max_pixels: int = MAX_PIXELS
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    memory_gb: float = 4.0


@dataclass(frozen=True)
class Train:
    """`[train]`: how the model is fitted.

    Attributes:
        epochs: at most this many.
        batch_size: examples a step.
        learning_rate: of the layers on top of the backbone, decayed by a cosine to 0.
        backbone_rate: the backbone's learning rate as a share of it.
        weight_decay: of AdamW; biases and normalisation have none.
        label_smoothing: of the cross entropy.
        class_weights: weigh classes by the inverse of their frequency.
        patience: epochs without a better `monitor` after which training stops.
        monitor: `val_auroc` or `val_loss`; or `epoch`, which keeps the last one: for sets whose validation
            side is too small to choose by.
        frozen_stride: backbone layers up to this stride keep their weights; 0: all of them train.
        cached_views: run the frozen layers once on this many augmented views of each training image (the
            first is the image itself) and train on their cached features, one view an epoch; 0: no cache.
        seed: of everything random.
    """

    epochs: int = 50
    batch_size: int = 16
    learning_rate: float = 1e-3
    backbone_rate: float = 0.5
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    class_weights: bool = True
    patience: int = 15
    monitor: str = "val_auroc"
    frozen_stride: int = 0
    cached_views: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. `model` holds `system` and the arguments of that model's class."""

    data: Data = field(default_factory=Data)
    model: dict[str, Any] = field(default_factory=lambda: {"system": "MIMS"})
    train: Train = field(default_factory=Train)
    augment: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return json.loads(json.dumps(asdict(self)))


def load(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `train.epochs=5`.

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
        {"system": "MIMS"} | dict(values.get("model", {})),
        _section(Train, values.get("train", {}), "train", source),
        tuple(values.get("augment", ())),
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
        except tomllib.TOMLDecodeError:
            parsed = value.strip()  # a bare word is a string
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
    rules = [
        (min(data.image_size) >= 32, "data.image_size", data.image_size, "32 pixels or more each way"),
        (len(data.window) in (0, 2), "data.window", data.window, "[low, high]"),
        (len(data.window) != 2 or data.window[0] < data.window[1], "data.window", data.window, "low < high"),
        (0 < data.val_fraction <= 0.5, "data.val_fraction", data.val_fraction, "in (0, .5]"),
        (0 <= data.test_fraction <= 0.5, "data.test_fraction", data.test_fraction, "in [0, .5]"),
        (train.epochs > 0, "train.epochs", train.epochs, "1 or more"),
        (train.batch_size > 1, "train.batch_size", train.batch_size, "2 or more, for batch statistics"),
        (train.learning_rate > 0, "train.learning_rate", train.learning_rate, "above 0"),
        (train.backbone_rate >= 0, "train.backbone_rate", train.backbone_rate, "0 or more"),
        (0 <= train.label_smoothing < 1, "train.label_smoothing", train.label_smoothing, "in [0, 1)"),
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
        (train.cached_views >= 0, "train.cached_views", train.cached_views, "0 or more"),
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
    ]
    for holds, key, value, wanted in rules:
        if not holds:
            raise RecipeError(f"{source}: {key} must be {wanted}. Received: {value!r}")
