"""Made-up images beside an exported model, with Keras's answers: by them any server can be checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from keras_medattn.files import write_json

FOLDER = Path("assets.extra", "verify")
ANSWERS = "answers.json"
_SIZE = (60, 84)  # no model's own, so that the resize is checked with the rest


def write(version: Path, answer: Callable[[Path], np.ndarray], volumes: bool, tolerance: float) -> None:
    """Write `assets.extra/verify`: drawn images, so that no patient's is in it, and their probabilities.

    Args:
        version: the exported model's folder.
        answer: the Keras model's probabilities `(C,)` of a file.
        volumes: whether the model takes volumes; then one is drawn.
        tolerance: how far a server's probabilities may be from these.
    """
    folder = version / FOLDER
    folder.mkdir(parents=True)
    if volumes:
        first, *others = (Image.fromarray(pixels).convert("L") for pixels in _pictures().values())
        first.save(folder / "stack.tif", save_all=True, append_images=others)
    else:
        for name, pixels in _pictures().items():
            Image.fromarray(pixels).save(folder / name)
    known = {path.name: np.asarray(answer(path), float).tolist() for path in files(version)}
    write_json({"tolerance": tolerance, "probabilities": known}, folder / ANSWERS)


def files(version: Path) -> list[Path]:
    """The images that `write` drew; none of an export that has no known answers."""
    return sorted(path for path in (version / FOLDER).glob("*") if path.suffix != ".json")


def _pictures() -> dict[str, np.ndarray]:
    """Smooth ones, on which a model's choice of places does not hang on the last digit."""
    y, x = np.meshgrid(*(np.linspace(0, 1, size) for size in _SIZE), indexing="ij")
    disc = np.exp(-((x - 0.3) ** 2 + (y - 0.6) ** 2) / 0.01)
    drawn = {
        "ramp.png": (x, y, 1 - x),
        "disc.jpg": (0.9 - 0.5 * disc, 0.7 - 0.6 * disc, 0.8 - 0.2 * disc),
        "waves.bmp": (0.5 + 0.5 * np.sin(40 * x), 0.5 + 0.5 * np.sin(25 * y), 0.5 + 0.5 * np.sin(60 * x * y)),
    }
    return {name: np.stack([255 * c for c in c3], axis=-1).astype(np.uint8) for name, c3 in drawn.items()}
