"""The papers' systems as Keras models, and the backbones that they stand on."""

from __future__ import annotations

import difflib
import inspect

import keras

from keras_medattn.models.attention_sampling import AttentionSampling
from keras_medattn.models.attn_vgg import AttnVGG
from keras_medattn.models.gated_fusion import GatedFusion, LossBalance
from keras_medattn.models.global_mask import GlobalMask, MaskPhases
from keras_medattn.models.mims import MIMS
from keras_medattn.models.patch_classifier import PatchClassifier, with_classifier
from keras_medattn.models.sampling_networks import (
    AttentionNetwork,
    UniformAttention,
    attention_network,
    feature_network,
)

__all__ = [
    "MIMS",
    "SYSTEMS",
    "AttentionNetwork",
    "AttentionSampling",
    "AttnVGG",
    "GatedFusion",
    "GlobalMask",
    "LossBalance",
    "MaskPhases",
    "PatchClassifier",
    "UniformAttention",
    "arguments",
    "attention_network",
    "feature_network",
    "system",
    "with_classifier",
]

SYSTEMS: dict[str, type[keras.Model]] = {
    "AttentionSampling": AttentionSampling,
    "AttnVGG": AttnVGG,
    "GatedFusion": GatedFusion,
    "GlobalMask": GlobalMask,
    "MIMS": MIMS,
    "PatchClassifier": PatchClassifier,
}


def system(name: str) -> type[keras.Model]:
    """Find a system's class by its name in recipes.

    Raises:
        ValueError: with the nearest known name.

    Example:
        >>> system("MIMS").__name__
        'MIMS'
    """
    if name not in SYSTEMS:
        lower = {known.lower(): known for known in SYSTEMS}
        near = difflib.get_close_matches(str(name).lower(), lower, 1)
        hint = f"Did you mean {lower[near[0]]!r}?" if near else f"Known: {', '.join(SYSTEMS)}."
        raise ValueError(f"model.system is no known system. {hint} Received: {name!r}")
    return SYSTEMS[name]


def arguments(name: str) -> list[str]:
    """List the arguments of a system that a recipe may set.

    Example:
        >>> "k" in arguments("MIMS")
        True
    """
    skipped = ("self", "num_classes", "kwargs")  # the data tells how many classes there are
    return [key for key in inspect.signature(system(name).__init__).parameters if key not in skipped]
