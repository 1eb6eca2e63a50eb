"""Optimizers for little memory: AdamW with bf16 or 8-bit states and stochastic rounding; README.md says how."""

from rfkernels.optim.adamw import AdamW

__all__ = ["AdamW"]
