"""Model FLOPs of an MM-DiT: what the architecture needs, not what an implementation spends."""

from __future__ import annotations

from dataclasses import dataclass

from mmdit.config import MMDiTConfig
from mmdit.embeddings import FREQUENCIES

TEXT_TOKENS = 154        # 77 of CLIP and 77 of T5


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample, forward and backward (3x forward); a multiply-add is 2."""

    linear: float
    """Matrix products applied per token."""
    conditioning: float
    """Modulations and embedders, once per sample."""
    attention: float
    """Scores and weighted sums: 12 L^2 D per block, bidirectional."""

    @property
    def total(self) -> float:
        return self.linear + self.conditioning + self.attention


def training_flops(config: MMDiTConfig, image_tokens: int, text_tokens: int = TEXT_TOKENS) -> Flops:
    """FLOPs of one sample's forward and backward.

    The last block's text half counts its qkv projection only; its queries count in the attention, as is usual, although
    an implementation may skip both. Dual attention adds its projections and an attention over the image alone.
    """
    c, d = config, config.depth
    square = c.width * c.width
    block = (4 + 2 * c.mlp_ratio) * square                                     # qkv, proj, fc1, fc2
    last_text = block if c.weight_sets == 1 else 3 * square
    patch = c.patch_size**2 * c.in_channels * c.width
    dual = len(c.dual_attention)
    per_token = (
        (d * block + 2 * patch + dual * 4 * square) * image_tokens
        + ((d - 1) * block + last_text + c.context_dim * c.width) * text_tokens
    )
    modulation = sum(6 if c.weight_sets == 1 else 6 * c.weight_sets for _ in range(d - 1))
    modulation += 6 if c.weight_sets == 1 else 6 + 2 * (c.weight_sets - 1)
    modulation += 3 * dual + 2                                                 # MMDiT-X; final layer
    conditioning = modulation * square + (FREQUENCIES + c.pooled_dim) * c.width + 2 * square
    length = image_tokens + text_tokens
    attention = 12 * c.width * (d * length**2 + dual * image_tokens**2)
    return Flops(linear=6.0 * per_token, conditioning=6.0 * conditioning, attention=float(attention))
