"""MM-DiT, the multimodal diffusion transformer of Stable Diffusion 3, and what is needed to sample from it."""

from pathlib import Path

if others := [*Path(__file__).parent.parent.glob("mmdit-*.dist-info")]:
    raise ImportError(
        f"{others[0].stem} is installed beside rfkernels-mmdit: both have the import name mmdit, and their files "
        "overwrite each other. Keep one: pip uninstall mmdit rfkernels-mmdit, then pip install rfkernels-mmdit"
    )

from mmdit import checkpoint, presets
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT
from mmdit.sampling.pipeline import Pipeline
from mmdit.sampling.sample import Sampler

__all__ = ["MMDiT", "MMDiTConfig", "Pipeline", "Sampler", "checkpoint", "presets"]
