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
    """FLOPs of one sample's forward and backward, with any backbone.

    The last block's text half counts its qkv projection only; its queries count in the attention, as is usual, although
    an implementation may skip both. Dual attention adds its projections and an attention over the image alone, and
    references as tokens the same with keys and values of one picture as large as the image.
    """
    c, square = config, config.width**2
    blocks = _joint if c.backbone == "joint" else _crossed
    per_token, vectors, scores = blocks(c, image_tokens, text_tokens)
    patch = c.patch_size**2 * (c.patch_channels + c.unpatched_channels) * c.width
    per_token += patch * image_tokens + c.context_dim * c.width * text_tokens
    if c.backbone == "uvit":
        channels, pixels = c.unpatched_channels, image_tokens * c.patch_size**2
        before, after = 9 * 2 * channels**2, 9 * 3 * channels**2 + 2 * channels**2
        per_token += pixels * (c.conv_blocks * (before + after) + 9 * (c.input_channels + c.in_channels) * channels)
        vectors += 2 * c.conv_blocks
    conditioning = (vectors + 2) * square + (FREQUENCIES + c.pooled_dim) * c.width + 2 * square    # 2: final layer
    return Flops(linear=6.0 * per_token, conditioning=6.0 * conditioning, attention=12.0 * c.width * scores)


def _joint(c: MMDiTConfig, image_tokens: int, text_tokens: int) -> tuple[int, int, int]:
    """Of all blocks: (multiply-adds per token, modulation vectors, scores)."""
    square, d, dual = c.width**2, c.depth, len(c.dual_attention)
    block = (4 + 2 * c.mlp_ratio) * square                                     # qkv, proj, fc1, fc2
    last_text = block if c.weight_sets == 1 else 3 * square
    per_token = (d * block + dual * 4 * square) * image_tokens + ((d - 1) * block + last_text) * text_tokens
    vectors = 6 * c.weight_sets * (d - 1) + 6 + 2 * (c.weight_sets - 1) + 3 * dual                # 3: MMDiT-X
    scores = d * (image_tokens + text_tokens) ** 2 + dual * image_tokens**2
    if c.reference_tokens:
        per_token += (d * (4 + 2) * square + c.patch_size**2 * c.in_channels * c.width) * image_tokens
        scores += d * 2 * image_tokens**2
    return per_token, vectors, scores


def _crossed(c: MMDiTConfig, image_tokens: int, text_tokens: int) -> tuple[int, int, int]:
    """The same of blocks that attend to the image, then to the text."""
    image, text = (4 + 2 + 2 * c.mlp_ratio) * c.width**2, 2 * c.width**2
    scores = image_tokens**2 + image_tokens * text_tokens
    return c.depth * (image * image_tokens + text * text_tokens), 7 * c.depth, c.depth * scores
