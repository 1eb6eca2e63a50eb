"""MM-DiT: the multimodal diffusion transformer of Stable Diffusion 3 (arXiv 2403.03206, figure 2)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import backbones
from mmdit.config import MMDiTConfig
from mmdit.embeddings import FREQUENCIES, FinalLayer, VectorEmbedder, patch_embed, timestep_features
from rfkernels.layers import fill_a
from rfkernels.nn import Modulation

ENDS = ("modulation.", "final_layer.", "stages.out.", "reference_embed")
MOST_REFERENCES = 3          # beside the image: four streams meet in one attention


def fill(name: str, tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """Writes the initial value of the parameter `name`: Xavier for every projection, N(0, 0.02) for the time and pooled
    embedders, zero for biases, modulations and what ends a residual of convolutions, an attention to references or the
    model (each block starts as the identity, the model as zero), one for norm weights; adapters begin at nothing. From
    torch's global generator unless one is given."""
    if name.endswith("lora_a"):
        fill_a(tensor, generator)
    elif name.endswith("norm.weight"):
        tensor.fill_(1.0)
    elif name.endswith(("bias", "conv2.weight", "reference.proj.weight", "lora_b")) or name.startswith(ENDS):
        tensor.zero_()
    elif name.startswith(("time_embed.", "pooled_embed.")):
        tensor.normal_(std=0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(tensor.view(tensor.shape[0], -1), generator=generator)


class MMDiT(nn.Module):
    """Predicts the velocity of a latent, given time and text.

    Args: config: the architecture. Weights are initialised from torch's global generator; on the meta device they are
        left alone: materialise, then call `init_weights()` or load a checkpoint.

    >>> model = MMDiT(mmdit.presets.tiny())
    >>> latent, context, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32), torch.randn(2, 16)
    >>> model(latent, torch.tensor([0.1, 0.9]), context, pooled).shape
    torch.Size([2, 4, 16, 16])
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = patch_embed(config)
        if config.reference_tokens:
            self.reference_embed = nn.Parameter(torch.empty(MOST_REFERENCES, config.width))
        self.time_embed = VectorEmbedder(FREQUENCIES, config.width)
        self.pooled_embed = VectorEmbedder(config.pooled_dim, config.width)
        texts = max(1, config.weight_sets - 1)
        self.context_embed = nn.ModuleList(nn.Linear(config.context_dim, config.width) for _ in range(texts))
        self.blocks = nn.ModuleList(backbones.block(config, i) for i in range(config.depth))
        for block in self.blocks:
            block.leaves_pending = True                                                             # type: ignore[assignment]
        self.stages = backbones.ConvStages(config) if config.backbone == "uvit" else None
        self.final_layer = FinalLayer(config)
        counts = [count for block in self.blocks for count in block.vectors]                        # type: ignore[union-attr]
        around = self.stages.vectors if self.stages is not None else []
        self.modulation = Modulation(config.width, config.width, [*around, *counts, 2, *around])
        if not self.patch_embed.proj.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """See `fill`; the position table by the paper's formula."""
        for name, parameter in self.named_parameters():
            fill(name, parameter)
        self.patch_embed.fill_positions()

    def condition(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """The modulations of all blocks, which depend on time and pooled text alone: [N, vectors * width] for timestep
        [N] and pooled [N, pooled_dim]. A sampler asks for all its steps at once; `forward` takes the rows of one."""
        c = self.time_embed(timestep_features(timestep)) + self.pooled_embed(pooled)
        return self.modulation.project(c)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor | None,
        context: Tensor,
        pooled: Tensor | None,
        context_lengths: Tensor | None = None,
        *,
        modulation: Tensor | None = None,
        references: Sequence[Tensor] = (),
        skip_blocks: Collection[int] = (),
    ) -> Tensor:
        """
        Args:
            latent: [B, in_channels, h, w], h and w multiples of the patch size, within the position table.
            timestep: [B] in [0, 1], fp32; 0 is data, 1 is noise.
            context: [B, L, context_dim] text sequence.
            pooled: [B, pooled_dim] pooled text.
            context_lengths: [B] int; text tokens from context_lengths[b] on are padding and masked; with 3 weight sets
                also [B, 2], of each text stream. None: the model attends to all L, as the released models do.
            modulation: [B, ...] rows of what `condition` gave, instead of timestep and pooled, which may then be None.
            references: pictures to edit, latents as `latent`. With `reference_channels` one of its size, or several
                that have as many channels together; with `reference_tokens` up to 3 of any size that the position
                table holds. None is a picture of zeros, as training has it where it leaves the picture out.
            skip_blocks: blocks that are passed over, for skip-layer guidance.
        Returns: velocity [B, in_channels, h, w].
        Raises: ValueError or TypeError that names the argument.
        """
        self._check(latent, context, context_lengths)
        self._check_references(latent, references)
        if modulation is None:
            self._check_conditions(latent.shape[0], timestep, pooled)
            modulation = self.condition(timestep, pooled)                                           # type: ignore[arg-type]
        vectors = iter(self.modulation.split(modulation))
        texts, lengths = self._split(context, context_lengths)
        xs = [embed(text) for embed, text in zip(self.context_embed, texts, strict=True)]
        read = self._beside(latent, references)
        features, kept = (read, []) if self.stages is None else self.stages.down(read, vectors)
        xs.append(self.patch_embed(features))
        seen = [self._tokens(references or [torch.zeros_like(latent)])] if self.config.reference_tokens else []
        for i, block in enumerate(self.blocks):
            own = [next(vectors) for _ in block.vectors]                                            # type: ignore[union-attr]
            xs = xs if i in skip_blocks else block(xs, own, lengths, *seen)
        out: Tensor = self.final_layer(xs[-1], next(vectors), *latent.shape[2:])
        return out if self.stages is None else self.stages.up(out, kept, vectors)

    def _beside(self, latent: Tensor, references: Sequence[Tensor]) -> Tensor:
        """What is cut into patches: the latent, with a picture to edit beside it in channels."""
        channels = self.config.reference_channels
        if not channels:
            return latent
        return torch.cat([latent, *(references or [torch.zeros_like(latent[:, :1]).expand(-1, channels, -1, -1)])], 1)

    def _tokens(self, references: Sequence[Tensor]) -> list[Tensor]:
        """Pictures to edit as tokens: those of an image, which say besides which picture they are of."""
        return [
            F.layer_norm(self.patch_embed(reference) + of, (self.config.width,), eps=1e-6)
            for reference, of in zip(references, self.reference_embed, strict=False)
        ]

    def _split(self, context: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], list[Tensor | None]]:
        """The text streams and, for each stream with the image last, its lengths."""
        first = self.config.text_split
        if not first:
            return [context], [lengths, None]
        texts = [context[:, :first], context[:, first:]]
        if lengths is None:
            return texts, [None, None, None]
        if lengths.ndim == 2:
            return texts, [*lengths.unbind(1), None]
        return texts, [lengths.clamp(max=first), (lengths - first).clamp(min=0), None]

    def _check(self, latent: Tensor, context: Tensor, lengths: Tensor | None) -> None:
        c = self.config
        batch = latent.shape[0]
        if latent.ndim != 4 or latent.shape[1] != c.in_channels:
            raise ValueError(f"MMDiT: latent has shape {list(latent.shape)}; expected [B, {c.in_channels}, h, w]")
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != c.context_dim:
            raise ValueError(f"MMDiT: context has shape {list(context.shape)}; expected [{batch}, L, {c.context_dim}]")
        if c.weight_sets == 3 and context.shape[1] <= c.context_split:
            raise ValueError(
                f"MMDiT: context has {context.shape[1]} tokens; with 3 weight sets more than context_split = "
                f"{c.context_split} are expected"
            )

        if lengths is not None:
            allowed = [[batch], [batch, 2]] if c.text_split else [[batch]]
            if list(lengths.shape) not in allowed or lengths.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"MMDiT: context_lengths has shape {list(lengths.shape)} and dtype {lengths.dtype}; expected "
                    f"{' or '.join(map(str, allowed))} integers"
                )

    def _check_references(self, latent: Tensor, references: Sequence[Tensor]) -> None:
        c = self.config
        if references and not c.takes_references:
            raise ValueError("MMDiT: references are given; the model has neither reference_channels nor _tokens")
        shapes = [list(reference.shape) for reference in references]
        if c.reference_tokens:
            if len(references) > MOST_REFERENCES:
                raise ValueError(f"MMDiT: {len(references)} references are given; expected at most {MOST_REFERENCES}")
            wanted = [latent.shape[0], c.in_channels]
            if any(len(shape) != 4 or shape[:2] != wanted for shape in shapes):
                raise ValueError(f"MMDiT: references have shapes {shapes}; expected {[*wanted, 'h', 'w']} each")
        elif references:
            wanted = [latent.shape[0], c.reference_channels, *latent.shape[2:]]
            fit = all(len(shape) == 4 and [shape[0], *shape[2:]] == [wanted[0], *wanted[2:]] for shape in shapes)
            if not fit or sum(shape[1] for shape in shapes) != c.reference_channels:
                raise ValueError(f"MMDiT: references have shapes {shapes}; expected {wanted} together")

    def _check_conditions(self, batch: int, timestep: Tensor | None, pooled: Tensor | None) -> None:
        if timestep is None or pooled is None:
            raise TypeError("MMDiT: timestep or pooled is None; expected tensors, or modulation to be given")
        if timestep.shape != (batch,):
            raise ValueError(f"MMDiT: timestep has shape {list(timestep.shape)}; expected [{batch}], one per latent")
        if timestep.dtype.itemsize < 4 or not timestep.dtype.is_floating_point:
            raise TypeError(f"MMDiT: timestep has dtype {timestep.dtype}; expected float32 (bf16 rounds 1000 t by 2)")
        if pooled.shape != (batch, self.config.pooled_dim):
            wanted = [batch, self.config.pooled_dim]
            raise ValueError(f"MMDiT: pooled has shape {list(pooled.shape)}; expected {wanted}")
