"""MM-DiT, the multimodal diffusion transformer of Stable Diffusion 3, and what is needed to sample from it."""

from mmdit import checkpoint, presets
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.pipeline import Pipeline
from mmdit.sample import Sampler

__all__ = ["MMDiT", "MMDiTConfig", "Pipeline", "Sampler", "checkpoint", "presets"]
