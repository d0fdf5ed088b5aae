"""The layers. Importing this module registers them, so that `keras.models.load_model` finds them."""

from keras_medattn.layers.ms_conv import MSConv
from keras_medattn.layers.top_k_pool import TopKPool

__all__ = ["MSConv", "TopKPool"]
