"""Attention, normalisation and linear kernels for AVX2 CPUs and NVIDIA Pascal GPUs, with plain PyTorch wherever nothing
native runs.

Each public name is one operation: `qvl_kernels/<op>.py` holds its contract. `explain()` says what runs on this machine.
"""

from ._backends import available_backends, explain, use_backend
from .append_kv import append_kv
from .attention import attention, quantize_kv
from .attention_varlen import attention_varlen
from .favor_features import EluFeatures, FavorFeatures
from .gelu_tanh import gelu_tanh
from .layer_norm import layer_norm
from .linear import PackedLinear, PackedWeight, pack_linear, packed_linear
from .linear_attention import LinearAttentionState, linear_attention
from .linear_attention_varlen import linear_attention_varlen
from .norm_rotary import norm_rotary
from .optimize import optimize
from .recording import Recording
from .rms_norm import rms_norm
from .rotary import rotary
from .scaled_dot_product_attention import scaled_dot_product_attention
from .sparse_attention import sparse_attention
from .sparse_pattern import SparsePattern
from .swiglu import swiglu

__all__ = [
    "EluFeatures",
    "FavorFeatures",
    "LinearAttentionState",
    "PackedLinear",
    "PackedWeight",
    "Recording",
    "SparsePattern",
    "append_kv",
    "attention",
    "attention_varlen",
    "available_backends",
    "explain",
    "gelu_tanh",
    "layer_norm",
    "linear_attention",
    "linear_attention_varlen",
    "norm_rotary",
    "optimize",
    "pack_linear",
    "packed_linear",
    "quantize_kv",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "sparse_attention",
    "swiglu",
    "use_backend",
]
