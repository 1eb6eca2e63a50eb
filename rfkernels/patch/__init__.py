"""One-line patching of diffusers' MM-DiT models: `rfkernels.patch.apply(model)`. See the README of this folder."""

from rfkernels.patch.apply import apply, report, revert

__all__ = ["apply", "report", "revert"]
