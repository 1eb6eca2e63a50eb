"""The configuration of an MM-DiT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mmdit import numbers

Backbone = Literal["joint", "cross", "uvit"]


@dataclass(frozen=True)
class MMDiTConfig:
    """Architecture of an MM-DiT. Two models with equal configurations have the same parameters and positions.

    Examples:
        >>> MMDiTConfig(depth=24, heads=24, qk_norm=True).width
        1536
    """

    depth: int
    """Number of joint blocks."""
    heads: int
    """Attention heads; the released models have as many as blocks."""
    head_dim: int = 64
    """Channels per head; the width of the model is heads * head_dim."""
    in_channels: int = 16
    """Channels of the latent, in and out."""
    patch_size: int = 2
    """Side of a square patch of the latent, in latent pixels."""
    context_dim: int = 4096
    """Channels of the text sequence."""
    pooled_dim: int = 2048
    """Channels of the pooled text vector."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP per channel."""
    qk_norm: bool = False
    """RMSNorm with learnable scale on queries and keys, in every stream."""
    dual_attention: tuple[int, ...] = ()
    """Blocks with a second, image-only attention (MMDiT-X)."""
    weight_sets: int = 2
    """1: text and image share weights (DiT on concatenated tokens); 2: MM-DiT; 3: CLIP, T5 and image."""
    context_split: int = 77
    """With 3 weight sets: how many leading text tokens go to the first of the two text streams."""
    reference_channels: int = 0
    """Channels beside the latent's, of a picture to edit (Brooks et al. 2023, InstructPix2Pix)."""
    reference_tokens: bool = False
    """Pictures to edit are tokens, to which the image attends in each block beside itself."""
    backbone: Backbone = "joint"
    """joint: MM-DiT and, with one weight set, DiT; cross and uvit: what the paper compares it with (backbones.py)."""
    conv_blocks: int = 2
    """With the backbone uvit: residual blocks of convolutions before the tokens, and as many after."""
    resolution: int = 256
    """Side of the square target resolution in pixels (S of the position grid)."""
    max_height: int = 256
    """Height of the tallest bucket in pixels."""
    max_width: int = 256
    """Width of the widest bucket in pixels."""
    position_base: int = 256
    """Resolution in pixels at which neighbouring tokens stand one position apart."""
    token_pixels: int = 16
    """Pixels per token and axis: the autoencoder's factor times patch_size."""

    def __post_init__(self) -> None:
        # From JSON a tuple comes as a list; hashing and comparing want the tuple.
        object.__setattr__(self, "dual_attention", tuple(self.dual_attention))
        for name in (
            "depth", "heads", "head_dim", "in_channels", "patch_size", "context_dim", "pooled_dim", "conv_blocks",
            "mlp_ratio", "context_split", "resolution", "max_height", "max_width", "position_base", "token_pixels",
        ):  # fmt: skip
            numbers.whole(f"MMDiTConfig: {name}", getattr(self, name), 1)
        numbers.whole("MMDiTConfig: reference_channels", self.reference_channels, 0)
        if self.weight_sets not in (1, 2, 3):
            raise ValueError(f"MMDiTConfig: weight_sets is {self.weight_sets}; expected 1, 2 or 3")
        if self.backbone not in get_args(Backbone):
            wanted = ", ".join(get_args(Backbone))
            raise ValueError(f"MMDiTConfig: backbone is {self.backbone!r}; expected one of {wanted}")
        if self.backbone != "joint" and (self.weight_sets != 2 or self.dual_attention):
            raise ValueError(
                f"MMDiTConfig: weight_sets is {self.weight_sets}, dual_attention {self.dual_attention}; the backbone "
                f"{self.backbone} has neither: leave them at 2 and ()"
            )
        if self.reference_tokens and (self.reference_channels or self.backbone != "joint" or self.weight_sets == 1):
            raise ValueError(
                f"MMDiTConfig: reference_tokens with reference_channels {self.reference_channels}, backbone "
                f"{self.backbone} and {self.weight_sets} weight sets; expected 0, joint and 2 or 3"
            )
        multiple = 8 if self.backbone == "uvit" else 4
        if self.width % multiple:
            raise ValueError(f"MMDiTConfig: heads * head_dim is {self.width}; expected a multiple of {multiple}")
        outside = [i for i in self.dual_attention if not 0 <= i < self.depth]
        if outside:
            raise ValueError(f"MMDiTConfig: dual_attention names blocks {outside}; expected 0 to {self.depth - 1}")
        for name in ("max_height", "max_width", "resolution"):
            if getattr(self, name) % self.token_pixels:
                raise ValueError(
                    f"MMDiTConfig: {name} is {getattr(self, name)}; expected a multiple of token_pixels = "
                    f"{self.token_pixels}"
                )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def input_channels(self) -> int:
        """Channels of what the model reads: the latent, and beside it a picture to edit."""
        return self.in_channels + self.reference_channels

    @property
    def patch_channels(self) -> int:
        """Channels of what is cut into patches: the input, or what UViT's convolutions make of it."""
        return self.width // 2 if self.backbone == "uvit" else self.input_channels

    @property
    def unpatched_channels(self) -> int:
        """Channels of what patches are put together to."""
        return self.width // 2 if self.backbone == "uvit" else self.in_channels

    @property
    def takes_references(self) -> bool:
        """Whether it edits pictures."""
        return self.reference_tokens or self.reference_channels > 0

    @property
    def text_split(self) -> int:
        """Where the second text stream's tokens begin, or 0 if there is one text stream."""
        return self.context_split if self.weight_sets == 3 else 0

    @property
    def max_tokens(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.max_height // self.token_pixels, self.max_width // self.token_pixels

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MMDiTConfig:
        """Raises: ValueError that lists unknown keys; TypeError if a required one is missing."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"MMDiTConfig: unknown keys {unknown}")
        return cls(**values)
