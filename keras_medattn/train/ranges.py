"""`[tune]` of a recipe: which settings are searched, among which values; and recipes written as TOML."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from keras_medattn.train import recipe as recipes
from keras_medattn.train.recipe import Recipe, RecipeError

_SECTIONS = ("model", "train")
_FIXED = ("train.seed", "train.monitor", "train.watch_test")  # what trials are compared by


def ranges(recipe: Recipe) -> dict[str, Any]:
    """The searched settings of a recipe: `"train.learning_rate"` -> a list of values, or low, high and log.

    Raises:
        RecipeError: names the setting that is none, or has a value that the recipe refuses.

    Example:
        >>> from keras_medattn.train.recipe import from_dict
        >>> ranges(from_dict({"tune": {"model": {"k": [1, 3]}}}))
        {'model.k': [1, 3]}
    """
    found = {}
    for section, keys in recipe.tune.items():
        if section not in _SECTIONS or not isinstance(keys, dict):
            raise RecipeError(f"tune.{section}: settings of [model] and [train] can be searched, no others")
        for key, values in keys.items():
            name = f"{section}.{key}"
            if name in _FIXED:
                raise RecipeError(f"tune.{name}: trials are compared by it, so it must be one for all")
            for one in _ends(name, values):
                try:
                    changed(recipe, {name: one})
                except RecipeError as error:
                    raise RecipeError(f"tune.{name}: {error}") from error
            found[name] = values
    if not found:
        raise RecipeError(
            "the recipe names nothing to search. Give it, say, [tune] with train.learning_rate = "
            "{ low = 1e-4, high = 1e-2, log = true } and model.k = [1, 3, 5]"
        )
    return found


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other settings, and without its `[tune]`.

    Raises:
        RecipeError: they do not go together.
    """
    values = recipe.to_dict() | {"tune": {}}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return recipes.from_dict(values)


def declare(searched: dict[str, Any], space: Any) -> None:
    """Name the searched settings to a KerasTuner `HyperParameters`."""
    for name, values in searched.items():
        if isinstance(values, dict):
            kind = space.Int if isinstance(values["low"], int) else space.Float
            kind(name, values["low"], values["high"], sampling="log" if values.get("log") else "linear")
        else:
            space.Choice(name, values if _numbers(values) else [json.dumps(one) for one in values])


def drawn(searched: dict[str, Any], space: Any) -> dict[str, Any]:
    """The values of one trial."""
    found = {name: space.get(name) for name in searched}
    texts = [name for name, values in searched.items() if isinstance(values, list) and not _numbers(values)]
    return found | {name: json.loads(found[name]) for name in texts}


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, without what is as by default.

    Example:
        >>> from keras_medattn.train.recipe import from_dict
        >>> print(to_toml(from_dict({"train": {"epochs": 3}, "augment": [{"layer": "RandomFlip"}]})))
        [model]
        system = "MIMS"
        <BLANKLINE>
        [train]
        epochs = 3
        <BLANKLINE>
        [[augment]]
        layer = "RandomFlip"
        <BLANKLINE>
    """
    values, plain = recipe.to_dict(), Recipe(model={}).to_dict()
    blocks = []
    for section in (one.name for one in fields(Recipe)):
        tables = values[section] if section == "augment" else [values[section]]
        for table in tables:
            title = f"[[{section}]]" if section == "augment" else f"[{section}]"
            known = plain[section] if section != "augment" else {}
            changes = {key: one for key, one in table.items() if key not in known or known[key] != one}
            lines = [f"{key} = {_text(one)}" for key, one in changes.items()]
            if lines:
                blocks.append("\n".join([title, *lines]) + "\n")
    return "\n".join(blocks)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_text(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps("null" if value is None else value, ensure_ascii=False)  # as `recipe.load` reads it


def _ends(name: str, values: Any) -> list[Any]:
    """What must be possible for the range to be: all values of a list, both ends of a range."""
    if isinstance(values, list) and len(values) > 1:
        return values
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        low, high, log = values["low"], values["high"], values.get("log", False)
        same = type(low) is type(high) and type(low) in (int, float)
        if same and low < high and type(log) is bool and (low > 0 or not log):
            return [low, high]
    raise RecipeError(
        f"tune.{name} must be a list of two values or more, or {{ low = ..., high = ..., log = true }}, both "
        f"whole or both with a point, low < high, above 0 with log. Received: {values!r}"
    )


def _numbers(values: list[Any]) -> bool:
    return len({type(one) for one in values}) == 1 and type(values[0]) in (int, float)
