"""The ops as modules to build a diffusion transformer from. Parameters have the names of timm and of the released
models: `qkv`, `proj`, `q_norm`, `k_norm`, `fc1`, `fc2`, `linear`, and `pos_embed`. All take `device` and `dtype`.

A block of two streams, whole: docs/examples/own_block.py.
"""

from rfkernels.layers import LoraLinear
from rfkernels.nn.attention import JointAttention, StreamAttention
from rfkernels.nn.embedding import PatchEmbed, PatchUnembed
from rfkernels.nn.mlp import Mlp
from rfkernels.nn.modulation import AdaLN, GatedAdaLN, Modulation

__all__ = [
    "AdaLN", "GatedAdaLN", "JointAttention", "LoraLinear", "Mlp", "Modulation", "PatchEmbed", "PatchUnembed",
    "StreamAttention",
]  # fmt: skip
