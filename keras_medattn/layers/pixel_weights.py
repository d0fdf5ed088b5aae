"""One learnable weight a pixel, the same for all images."""

from typing import Any

import keras

from keras_medattn.ops.comparison import channel_mean


@keras.saving.register_keras_serializable("keras_medattn")
class PixelWeights(keras.layers.Layer):
    """Multiplies each pixel of every image by a weight of its own, under an L1 penalty.

    `X' = X w`, with `l1 * mean |w|` added to the model's loss; w starts at 1 (Xu et al., the L1 baseline of
    their global pixel mask). The weights take any sign.

    Args:
        l1: Factor of the penalty. The paper tries 1 to 100,000.

    Call arguments:
        inputs: Images, or maps, all of one size.
        return_attention_scores: Whether to answer the maps, too.

    Input shape:
        `(B, H, W, C)`. Height and width must be known when the layer is built.

    Output shape:
        `(B, H, W, C)`. With `return_attention_scores=True` also a dict of `attention (B, H, W)`, the mean of
        the weighted images over the channels, and `weights (1, H, W, 1)`.

    Raises:
        ValueError: If the size is unknown, or the input is no image.

    Example:

    >>> layer = PixelWeights(l1=10.0)
    >>> tuple(layer(keras.random.normal((2, 8, 9, 3))).shape), [float(loss) for loss in layer.losses]
    ((2, 8, 9, 3), [10.0])
    """

    def __init__(self, l1: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if l1 < 0:
            raise ValueError(f"`l1` must not be negative. Received: l1={l1}")
        self.l1 = l1
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple) -> None:
        """Makes the weights."""
        _, height, width, _ = input_shape
        if None in (height, width):
            raise ValueError(
                f"{self.name} has a weight for each pixel: the images' size must be known. "
                f"Received: shape={tuple(input_shape)}"
            )
        penalty = keras.regularizers.L1(self.l1 / (height * width))  # Keras's L1 is a sum
        self.pixels = self.add_weight(
            (1, height, width, 1), initializer="ones", regularizer=penalty, name="pixels"
        )
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={1: height, 2: width})

    def call(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """Answers the weighted images, and on request the maps."""
        features = inputs * self.pixels
        if not return_attention_scores:
            return features
        return features, {
            "attention": channel_mean(features),
            "weights": keras.ops.convert_to_tensor(self.pixels),
        }

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any, return_attention_scores: bool = False) -> Any:
        """The shapes and dtypes of the answer."""
        features = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return features
        return features, {
            "attention": keras.KerasTensor(inputs.shape[:3], dtype=self.compute_dtype),
            "weights": keras.KerasTensor(self.pixels.shape, dtype=self.compute_dtype),
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "l1": self.l1}
