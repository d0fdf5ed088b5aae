"""The layers. Importing this module registers them, so that `keras.models.load_model` finds them."""

from keras_medattn.layers.attention_gate import AttentionGate
from keras_medattn.layers.attention_sampler import AttentionSampler
from keras_medattn.layers.channel_attn import ChannelAttn
from keras_medattn.layers.channel_self_attention import ChannelSelfAttention
from keras_medattn.layers.dual_attention import DualAttention
from keras_medattn.layers.gated_attention import GatedAttention
from keras_medattn.layers.global_context import GlobalContext
from keras_medattn.layers.global_pixel_mask import GlobalPixelMask
from keras_medattn.layers.instance_crops import InstanceCrops
from keras_medattn.layers.ms_conv import MSConv
from keras_medattn.layers.non_local import NonLocal
from keras_medattn.layers.pixel_weights import PixelWeights
from keras_medattn.layers.recurrent_sampler import RecurrentSampler
from keras_medattn.layers.residual_attention import ResidualAttention
from keras_medattn.layers.spatial_attn import SpatialAttn
from keras_medattn.layers.squeeze_excite import SqueezeExcite
from keras_medattn.layers.top_k_pool import TopKPool

__all__ = [
    "AttentionGate",
    "AttentionSampler",
    "ChannelAttn",
    "ChannelSelfAttention",
    "DualAttention",
    "GatedAttention",
    "GlobalContext",
    "GlobalPixelMask",
    "InstanceCrops",
    "MSConv",
    "NonLocal",
    "PixelWeights",
    "RecurrentSampler",
    "ResidualAttention",
    "SpatialAttn",
    "SqueezeExcite",
    "TopKPool",
]
