"""Models at float32, whatever precision they were trained in."""

from __future__ import annotations

from typing import Any


def float32(model: Any, image_size: tuple[int, int]) -> Any:
    """The model with its weights at dtype policy float32: itself where it has no other."""
    others: list[Any] = []

    def plain(config: Any) -> Any:
        if isinstance(config, dict):
            if config.get("class_name") == "DTypePolicy":
                others.extend(name for name in [config["config"]["name"]] if name != "float32")
                return "float32"
            return {key: plain(value) for key, value in config.items()}
        return type(config)(map(plain, config)) if isinstance(config, (list, tuple)) else config

    config = plain(model.get_config())
    if not others:
        return model
    twin = type(model).from_config(config)
    twin.build((None, *image_size, 3))
    twin.set_weights(model.get_weights())
    return twin
