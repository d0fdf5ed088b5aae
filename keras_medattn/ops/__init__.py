"""The equations as pure functions of `keras.ops`: each runs on TensorFlow, JAX and PyTorch."""

from keras_medattn.ops.pooling import top_k, top_k_pool
from keras_medattn.ops.regions import position_to_box, position_to_cell
from keras_medattn.ops.resize import resize_bilinear, scaled_size

__all__ = ["position_to_box", "position_to_cell", "resize_bilinear", "scaled_size", "top_k", "top_k_pool"]
