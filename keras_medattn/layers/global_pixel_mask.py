"""One mask for all images, learnt from all training images at once."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_medattn.ops import masking

ops: Any = keras.ops  # a type checker would infer its types from one backend


@keras.saving.register_keras_serializable("keras_medattn")
class GlobalPixelMask(keras.layers.Layer):
    """Multiplies every image by one mask, which a small CNN computes from all training images.

    `X' = X M, M = sigmoid(W_1 * ReLU(W_0 * P + b_0) + b_1)` with P `(1, H, W, N C)` the N training images,
    one behind the other: what a pixel is in all of them decides what it is worth. `l1 |M|` joins the model's
    loss (Xu et al., A Novel Global Spatial Attention Mechanism in Convolutional Neural Network for Medical
    Image Classification).

    Give `adapt` the training images before the layer is used, as they come to the layer: after
    standardisation, unaugmented, in a fixed order. They stay in host memory, and one block at a time is
    convolved. Once the mask is good, `freeze` makes it a constant: from then on the layer needs no images and
    its file holds the mask alone. A layer saved before that asks for the same images again.

    Args:
        channels: K, the channels of the hidden layer, or of each one of several.
        kernel_size: Size of the hidden layers' kernels: 3, 5 or 7.
        last_kernel_size: Size of the last kernel, odd.
        dense: Whether each convolution after the first reads the maps of all before it.
        l1: Factor of the mask's L1 norm in the loss.
        reduction: "sum" for the norm itself, or "mean", which does not depend on the images' size.
        kernel_initializer: Of the kernels. `VarianceScaling(1 / 3, "fan_in", "uniform")` draws from
            `+-1 / sqrt(9 N C)`, what the paper's framework starts from.
        reduce: An approximation for large sets, `(method, count)`: `("subsample", 64)` sees 64 of the images,
            `("pca", 64)` and `("projection", 64)` see the images on 64 principal or random directions.
            `variance_kept` tells the share of the variance over the pixels that is left.

    Call arguments:
        inputs: Images of the size of the training images.
        return_attention_scores: Whether to answer the mask, too.

    Input shape:
        `(B, H, W, C)`. Height and width may be unknown.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mask,
        from 0 to 1.

    Raises:
        ValueError: If the layer is used before `adapt`, if `adapt` gets other images than before, if the
            inputs differ from them in size, or an argument is not valid.

    Example:

    >>> images = np.random.default_rng(0).normal(size=(20, 8, 9, 3))
    >>> layer = GlobalPixelMask(channels=4)
    >>> layer.adapt(images)
    >>> masked = layer(images[:2])
    >>> layer.count_params() - 8 * 9 == 4 * (9 * 20 * 3 + 1) + (4 + 1)  # but for the place of the mask
    True
    >>> layer.freeze()
    >>> [weight.name for weight in layer.weights]
    ['mask']
    """

    def __init__(
        self,
        channels: int | Sequence[int] = 32,
        kernel_size: int = 3,
        last_kernel_size: int = 1,
        dense: bool = False,
        l1: float = 0.0,
        reduction: str = "sum",
        kernel_initializer: Any = "glorot_uniform",
        reduce: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.channels = (channels,) if isinstance(channels, int) else tuple(channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"`channels` must be at least 1. Received: channels={channels}")
        if kernel_size not in (3, 5, 7) or last_kernel_size < 1 or last_kernel_size % 2 == 0:
            raise ValueError(
                "`kernel_size` must be 3, 5 or 7 and `last_kernel_size` odd. "
                f"Received: kernel_size={kernel_size}, last_kernel_size={last_kernel_size}"
            )
        if l1 < 0 or reduction not in ("sum", "mean"):
            raise ValueError(
                "`l1` must not be negative, and `reduction` be 'sum' or 'mean'. "
                f"Received: l1={l1}, reduction={reduction!r}"
            )
        if reduce is not None and (reduce[0] not in ("subsample", "projection", "pca") or reduce[1] < 1):
            raise ValueError(
                f"`reduce` must be ('subsample' | 'projection' | 'pca', count). Received: reduce={reduce}"
            )
        self.kernel_size = kernel_size
        self.last_kernel_size = last_kernel_size
        self.dense = dense
        self.l1 = l1
        self.reduction = reduction
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.reduce: Any = None if reduce is None else tuple(reduce)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self._adapted: dict[str, Any] | None = None  # what a saved file must know of the images
        self._tiles: Any = None
        self._matrix: Any = None
        # XLA would take all tiles to the device at once
        self.supports_jit = keras.backend.backend() != "tensorflow"

    @property
    def frozen(self) -> bool:
        """Whether the mask is a constant."""
        return self._adapted is not None and self._adapted["frozen"]

    @property
    def variance_kept(self) -> float:
        """The share of the images' variance over the pixels that `reduce` leaves to the mask."""
        return self._known()["variance_kept"]

    def adapt(self, images: Any) -> None:
        """Takes the training images, and with them the number of the first kernel's channels.

        Args:
            images: Array `(N, H, W, C)`, or an iterable of batches `(B, H, W, C)` or images `(H, W, C)` in a
                fixed order: a `tf.data.Dataset`, a generator that reads a folder. Its batches may have any
                sizes.

        Raises:
            ValueError: If there are no images, they differ in size or are not finite, or they are not those
                that the layer was adapted to before.
        """
        if self.frozen:
            raise ValueError(f"{self.name} is frozen: its mask is fixed. Received: images to adapt to")
        batches, digest = [], hashlib.sha256()
        for batch in _batches(images):
            if batches and batch.shape[1:] != batches[0].shape[1:]:
                raise ValueError(
                    f"The images must be of one size. Received: {batches[0].shape[1:]} and {batch.shape[1:]}"
                )
            if not np.isfinite(batch).all():
                raise ValueError("The images must be finite. Received: NaN or infinity")
            digest.update(np.ascontiguousarray(batch, "float32").data)
            batches.append(batch)
        if not batches:
            raise ValueError("`adapt` needs images. Received: none")
        _, height, width, channels = batches[0].shape
        found = {
            "images": sum(map(len, batches)),
            "size": [height, width, channels],
            "order": digest.hexdigest(),
        }
        known = {key: value for key, value in (self._adapted or found).items() if key in found}
        if known != found:
            raise ValueError(
                f"{self.name} was adapted to other images, or to these in another order, and its kernel "
                f"belongs to those: {known}. Received: {found}"
            )
        self._lay_out(batches, found)

    def _lay_out(self, batches: list[np.ndarray], found: dict[str, Any]) -> None:
        """Puts the images, or what `reduce` leaves of them, where the convolution reads them."""
        height, width, channels = found["size"]
        features, kept = found["images"] * channels, 1.0
        if self.reduce is not None:
            pixels = np.concatenate([_planes(batch) for batch in batches], axis=-1).reshape(-1, features)
            if self.built:  # the kernel belongs to the columns that were saved with it
                matrix = ops.convert_to_numpy(self.projection)
            else:
                matrix = masking.reducing_matrix(pixels, *self.reduce, channels=channels)
            kept = masking.share_of_variance(pixels, matrix)
            batches, self._matrix = [(pixels @ matrix).reshape(1, height, width, -1)], matrix
            features = matrix.shape[1]
        dtype = np.dtype(self.compute_dtype)
        tiles = np.empty(masking.tiles_shape(height, width, features, self.kernel_size), dtype)
        first = 0
        while batches:
            planes = _planes(batches.pop(0))
            last = first + planes.shape[-1]
            masking.pixel_tiles(planes, self.kernel_size, tiles[..., first:last])
            first = last
        with keras.device(masking.HOST):
            self._tiles = ops.convert_to_tensor(tiles)
        self._adapted = {**found, "features": features, "variance_kept": kept, "frozen": False}

    def build(self, input_shape: tuple) -> None:
        """Makes the mask's place and, unless frozen, the kernels and biases of the pixel CNN."""
        adapted = self._known()
        self._check_size(input_shape)
        height, width, channels = adapted["size"]
        self.mask = self.add_weight(
            (1, height, width, 1), initializer="ones", trainable=False, autocast=False, name="mask"
        )
        if self.frozen:
            return
        if self.reduce is not None:
            self.projection = self.add_weight(
                (adapted["images"] * channels, adapted["features"]),
                initializer="zeros" if self._matrix is None else keras.initializers.Constant(self._matrix),
                trainable=False,
                autocast=False,
                name="projection",
            )
        given = adapted["features"]
        sizes = [self.kernel_size] * len(self.channels) + [self.last_kernel_size]
        for index, (size, width) in enumerate(zip(sizes, (*self.channels, 1), strict=True)):
            kernel = self.add_weight(
                (size, size, given, width),
                initializer=keras.initializers.get(self.kernel_initializer),
                autocast=False,
                name=f"kernel_{index}",
            )
            bias = self.add_weight((width,), initializer="zeros", autocast=False, name=f"bias_{index}")
            setattr(self, f"kernel_{index}", kernel)
            setattr(self, f"bias_{index}", bias)
            given = sum(self.channels[: index + 1]) if self.dense else width

    def pixel_mask(self) -> Any:
        """The mask `(1, H, W, 1)`, in float32 or the weights' dtype if that is wider."""
        if self.frozen:
            return ops.convert_to_tensor(self.mask)
        if self._tiles is None:
            raise ValueError(
                f"{self.name} computes its mask from the training images: call `adapt` with them first, or "
                "`freeze` before saving. Received: no images"
            )
        kernels = [getattr(self, f"kernel_{index}") for index in range(len(self.channels) + 1)]
        biases = [getattr(self, f"bias_{index}") for index in range(len(self.channels) + 1)]
        with keras.device(masking.HOST):  # in a graph, or a TensorFlow cond around this has no gradient
            tiles = ops.stop_gradient(self._tiles)
        maps = masking.convolve_tiles(tiles, kernels[0], self._known()["size"][0])
        return masking.pixel_mask(maps, biases, kernels[1:], self.dense)

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the masked images, and on request the mask."""
        self._check_size(inputs.shape)
        mask = self.pixel_mask()
        if self.l1 and not self.frozen:  # of a constant mask it would be a constant
            norm = ops.sum(mask) if self.reduction == "sum" else ops.mean(mask)
            self.add_loss(self.l1 * norm)
        mask = ops.cast(mask, self.compute_dtype)
        masked = inputs * mask
        if not return_attention_scores:
            return masked
        return masked, {"attention": ops.broadcast_to(ops.squeeze(mask, -1), ops.shape(inputs)[:3])}

    def freeze(self) -> None:
        """Computes the mask a last time and keeps it in place of the pixel CNN and the images.

        Compile the model again before it is trained on.
        """
        if not self.built:
            raise ValueError(f"{self.name} must be built before it is frozen. Received: a layer never called")
        if self.frozen:
            return
        self.mask.assign(self.pixel_mask())
        names = [f"{kind}_{index}" for kind in ("kernel", "bias") for index in range(len(self.channels) + 1)]
        for name in [*names, "projection"] if self.reduce is not None else names:
            delattr(self, name)
        self._adapted = {**self._known(), "frozen": True}
        self._tiles, self.supports_jit = None, True

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        self._check_size(input_shape)
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        shape = self.compute_output_shape(inputs.shape)
        masked = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return masked
        return masked, {"attention": keras.KerasTensor(shape[:3], dtype=self.compute_dtype)}

    def get_config(self) -> dict[str, Any]:
        """The arguments, and what is known of the images."""
        return {
            **super().get_config(),
            "channels": self.channels,
            "kernel_size": self.kernel_size,
            "last_kernel_size": self.last_kernel_size,
            "dense": self.dense,
            "l1": self.l1,
            "reduction": self.reduction,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "reduce": self.reduce,
            "adapted": None if self._adapted is None else {**self._adapted, "size": [*self._adapted["size"]]},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GlobalPixelMask":
        """The layer of a configuration; unless frozen, it asks for its images again."""
        config = dict(config)
        adapted = config.pop("adapted", None)
        layer = super().from_config(config)
        layer._adapted = adapted
        layer.supports_jit = layer.supports_jit or layer.frozen
        return layer

    def _known(self) -> dict[str, Any]:
        if self._adapted is None:
            raise ValueError(
                f"{self.name} needs the training images: call `adapt` with them first. Received: no images"
            )
        return self._adapted

    def _check_size(self, shape: tuple) -> None:
        for found, known in zip(shape[1:3], self._known()["size"][:2], strict=True):
            if found is not None and found != known:
                raise ValueError(
                    f"{self.name} was adapted to images of {self._known()['size'][:2]} pixels. "
                    f"Received: shape={tuple(shape)}"
                )


def _batches(images: Any) -> Iterator[np.ndarray]:
    """Batches `(B, H, W, C)` of floats, at most 64 images each of an array."""
    if hasattr(images, "shape") and hasattr(images, "__getitem__"):
        images = [images[first : first + 64] for first in range(0, len(images), 64)]
    for batch in images:
        if isinstance(batch, list | tuple | dict):
            raise ValueError(f"`adapt` takes images alone. Received: a {type(batch).__name__} for a batch")
        batch = np.asarray(ops.convert_to_numpy(batch))
        batch = batch[None] if batch.ndim == 3 else batch
        if batch.ndim != 4:
            raise ValueError(f"Images must be (H, W, C). Received: a batch of shape {batch.shape}")
        yield batch if batch.dtype in ("float32", "float64") else batch.astype("float32")


def _planes(batch: np.ndarray) -> np.ndarray:
    """`(B, H, W, C)` to `(H, W, B C)`."""
    return batch.transpose(1, 2, 0, 3).reshape(*batch.shape[1:3], -1)
