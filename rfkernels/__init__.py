"""Fused ops for MM-DiT, the Stable Diffusion 3 architecture. See the README of each op's folder."""

from rfkernels import patch
from rfkernels.adaln.chunks import chunk_modulation
from rfkernels.adaln.op import adaln, gated_adaln, gated_residual
from rfkernels.dispatch import backend, explain
from rfkernels.flow.op import rectified_flow, weighted_mse
from rfkernels.joint_attention.diagnostics import AttentionStatistics, attention_statistics, observe_attention
from rfkernels.joint_attention.op import joint_attention
from rfkernels.joint_attention.stream import Rope, Stream
from rfkernels.mlp.op import gelu_mlp
from rfkernels.position.op import patch_embed, patch_unembed, position_grid
from rfkernels.qk_norm.op import qk_norm

__version__ = "0.1.0"

__all__ = [
    "AttentionStatistics",
    "Rope",
    "Stream",
    "adaln",
    "attention_statistics",
    "backend",
    "chunk_modulation",
    "explain",
    "gated_adaln",
    "gated_residual",
    "gelu_mlp",
    "joint_attention",
    "observe_attention",
    "patch",
    "patch_embed",
    "patch_unembed",
    "position_grid",
    "qk_norm",
    "rectified_flow",
    "weighted_mse",
]
