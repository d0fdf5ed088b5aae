"""How little a backbone's features of a scaled image have to do with those of the image itself.

Li et al., "Multi-Instance Multi-Scale CNN for Medical Image Classification", appendix B: of ResNet-101, the
mean Pearson correlation over 100 tiles of CRC-MSI is .261 at scale 2, .451 at .75 and .257 at .5. The paper
does not say how maps of two sizes are compared; here the globally averaged features are, and the maps
themselves, those of the scaled image resized bilinearly.

    python benchmarks/scale_correlation.py FOLDER --backbone resnet101 --weights PATH

Scaled images are resized as training resizes them (bilinear, antialiased).
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_medattn.data import readers
from keras_medattn.data.decode import resize
from keras_medattn.data.manifest import SUFFIXES
from keras_medattn.models import backbones


def main() -> None:
    """Print the mean correlation, with its standard error, at each scale."""
    options = _options()
    weights = None if options.weights == "none" else options.weights
    network = backbones.backbone(options.backbone, options.stride, weights)
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{options.folder}: no images")
    count = min(options.images, len(paths))
    chosen = np.random.default_rng(options.seed).choice(len(paths), count, replace=False)
    print(f"{options.backbone}, stride {options.stride}, {count} images of {options.folder}")
    found = np.array([correlations(network, readers.read(paths[i]), options.scales) for i in sorted(chosen)])
    for place, scale in enumerate(options.scales):
        pooled, maps = (_mean(found[:, place, kind]) for kind in (0, 1))
        print(f"scale {scale:<5}  pooled features {pooled}   maps {maps}")


def correlations(network: keras.Model, image: np.ndarray, scales: list[float]) -> list[tuple[float, float]]:
    """Pearson correlations at each scale: of globally averaged features, and of the maps."""
    own = network(image[None], training=False)
    answers = []
    for scale in scales:
        size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
        maps = network(resize(tf.constant(image), size)[None], training=False)
        laid = tf.image.resize(maps, own.shape[1:3])
        averages = (tf.reduce_mean(one, axis=(1, 2)) for one in (maps, own))
        answers.append((_pearson(*averages), _pearson(laid, own)))
    return answers


def _pearson(a, b) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f} +- {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="images, in folders or not")
    parser.add_argument("--backbone", default="efficientnet_lite0", help="as models name it")
    parser.add_argument("--stride", type=int, default=32, help="of the maps")
    parser.add_argument("--weights", default="imagenet", help="imagenet, none, or a path")
    parser.add_argument("--images", type=int, default=100, help="drawn at random")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 0.75, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
