"""The joint block: every stream has its own weights, all streams meet in one attention.

A block leaves its last gated residual to whatever comes next, which adds it in the launch of its first norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from rfkernels import adaln, bias, gated_adaln, gated_residual, joint_attention
from rfkernels.nn import Mlp, StreamAttention

Vectors = tuple[Tensor, ...]
"""(shift, scale) of the norm before attention, then (gate; shift, scale, gate of the MLP), then (shift, scale, gate of
the second attention), each [B, width]."""


class Pending(NamedTuple):
    """A stream [B, S, width] as a block leaves it: ``residual + gate * branch``, still to be added."""

    residual: Tensor
    branch: Tensor
    gate: Tensor
    """[B, width]."""
    summed: bool = False
    """Whether the branch's layer takes the sum of its gradient (rfkernels.bias). FSDP hands a block other tensors than
    the one before it left, so this is said here too."""


def norm_of(x: Tensor | Pending, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(the stream, its modulated norm)."""
    if isinstance(x, Tensor):
        return x, adaln(x, shift, scale)
    return gated_adaln(x.residual, bias.marked(x.branch) if x.summed else x.branch, x.gate, shift, scale)


def settled(x: Tensor | Pending) -> Tensor:
    """The stream as one tensor."""
    return x if isinstance(x, Tensor) else gated_residual(x.residual, x.branch, x.gate)


def pending(residual: Tensor, branch: Tensor, gate: Tensor) -> Pending:
    return Pending(residual, branch, gate, not torch.compiler.is_compiling() and bias.wanted(branch))


class StreamBlock(nn.Module):
    """One stream's half of a joint block."""

    def __init__(self, config: MMDiTConfig, *, pre_only: bool, dual: bool, references: bool = False) -> None:
        super().__init__()

        def attention(project_out: bool = True) -> StreamAttention:
            heads, head_dim = config.heads, config.head_dim
            return StreamAttention(
                config.width, heads, head_dim=head_dim, qk_norm=config.qk_norm, project_out=project_out
            )

        self.vectors = 2 if pre_only else 9 if dual else 6
        self.attn = attention(project_out=not pre_only)
        self.attn2 = attention() if dual else None
        self.reference = attention() if references else None
        self.mlp = None if pre_only else Mlp(config.width, config.mlp_ratio * config.width)

    def update(self, x: Tensor, attended: Tensor, own: Tensor | None, m: Vectors) -> Pending:
        """x after the residuals of the attentions; that of the MLP is pending."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = m[:6]
        assert self.mlp is not None
        branch = self.attn.project(attended)
        if self.attn2 is not None and own is not None:
            x = gated_residual(x, branch, gate)
            branch, gate = self.attn2.project(own), m[8]
        h, y = gated_adaln(x, branch, gate, shift_mlp, scale_mlp)
        return pending(h, self.mlp(y), gate_mlp)

    def attend_alone(self, x: Tensor, m: Vectors) -> Tensor | None:
        """The second attention of MMDiT-X: the same norm with its own modulation, this stream only."""
        if self.attn2 is None:
            return None
        return joint_attention([self.attn2.stream(adaln(x, m[6], m[7]))])[0]

    def refer(self, x: Tensor, y: Tensor, references: Sequence[Tensor]) -> Tensor:
        """x with what this stream, of which y is the modulated norm, takes from pictures to edit: by an attention of
        its own. In the joint attention their keys would take weight from the others', and the first step would
        differ from the base."""
        if self.reference is None or not references:
            return x
        others = [self.reference.stream(tokens, queries=False) for tokens in references]
        attended = joint_attention([self.reference.stream(y), *others])[0]
        return x + self.reference.project(attended)                                                 # type: ignore[arg-type]


# Which weight set each stream uses; the image comes last, the text streams before it.
WEIGHT_SETS = {1: ("shared", "shared"), 2: ("context", "image"), 3: ("context", "context2", "image")}


class JointBlock(nn.Module):
    """An MM-DiT block for 1, 2 or 3 weight sets. In the last block the text streams only give keys and values."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.names = WEIGHT_SETS[config.weight_sets]
        self.leaves_pending = False
        """True in a model: its last residual is left to whatever comes next. Not under full activation checkpointing,
        where a block's output is all that is kept of it: one tensor is less than two."""
        self.last = index == config.depth - 1
        for name in dict.fromkeys(self.names):
            pre_only = self.last and name.startswith("context")
            dual = index in config.dual_attention and not name.startswith("context")
            references = config.reference_tokens and name == "image"
            self.add_module(name, StreamBlock(config, pre_only=pre_only, dual=dual, references=references))

    @property
    def vectors(self) -> list[int]:
        """How many modulation vectors each weight set takes."""
        return [half.vectors for half in self.children()]                                          # type: ignore[misc]

    def forward(
        self, xs: Sequence[Tensor | Pending], modulations: Sequence[Vectors], lengths: Sequence[Tensor | None],
        references: Sequence[Tensor] = (),
    ) -> list[Pending] | list[Tensor]:  # fmt: skip
        """xs: one [B, S_i, width] per stream, image last; modulations: one per weight set, image last; references: of
        pictures to edit, [B, S_j, width] each. The last block returns the image only."""
        halves: list[StreamBlock] = [self.get_submodule(name) for name in self.names]               # type: ignore[misc]
        vectors = list(modulations) * len(xs) if len(modulations) == 1 else list(modulations)
        goes_on = [not self.last] * (len(xs) - 1) + [True]
        begun = [norm_of(x, m[0], m[1]) for x, m in zip(xs, vectors, strict=True)]
        attended = joint_attention([
            half.attn.stream(y, length, queries=on)
            for half, (_, y), length, on in zip(halves, begun, lengths, goes_on, strict=True)
        ])
        image = len(xs) - 1
        left = []
        for i, ((x, y), out) in enumerate(zip(begun, attended, strict=True)):
            if out is not None:
                own = halves[i].attend_alone(x, vectors[i]) if i == image else None
                left.append(halves[i].update(halves[i].refer(x, y, references), out, own, vectors[i]))
        return left if self.leaves_pending else [settled(x) for x in left]
