"""The joint block: every stream has its own weights, all streams meet in one attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
from rfkernels import Stream, adaln, chunk_modulation, gated_adaln, gated_residual, gelu_mlp, joint_attention


class Attention(nn.Module):
    """The projections of one stream around an attention."""

    def __init__(self, config: MMDiTConfig, *, project_out: bool = True) -> None:
        super().__init__()
        width, self.heads, self.head_dim = config.width, config.heads, config.head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width) if project_out else None
        self.q_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(config.head_dim)) if config.qk_norm else None

    def stream(self, x: Tensor, lengths: Tensor | None, *, queries: bool = True) -> Stream:
        heads = (*x.shape[:2], -1, self.heads, self.head_dim)
        if queries:
            return Stream.packed(self.qkv(x).view(heads), self.q_norm, self.k_norm, lengths)
        width = x.shape[-1]                     # keys and values only: a third of the projection is not needed
        kv = nn.functional.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).view(heads)
        return Stream.packed(kv, None, self.k_norm, lengths, queries=False)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class StreamBlock(nn.Module):
    """One stream's half of a joint block."""

    def __init__(self, config: MMDiTConfig, *, pre_only: bool, dual: bool) -> None:
        super().__init__()
        width = config.width
        self.chunks = 2 if pre_only else 9 if dual else 6
        self.modulation = nn.Linear(width, self.chunks * width)
        self.attn = Attention(config, project_out=not pre_only)
        self.attn2 = Attention(config) if dual else None
        self.mlp = None if pre_only else Mlp(width, config.mlp_ratio * width)

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        """(shift, scale) of the norm before attention, then (gate; shift, scale, gate of the MLP), then (shift, scale,
        gate of the second attention)."""
        return chunk_modulation(self.modulation(c), self.chunks)

    def update(self, x: Tensor, attended: Tensor, own: Tensor | None, m: tuple[Tensor, ...]) -> Tensor:
        """x after the residuals of the attentions and of the MLP."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = m[:6]
        assert self.attn.proj is not None and self.mlp is not None
        branch = self.attn.proj(attended.flatten(2))
        if self.attn2 is not None and own is not None:
            assert self.attn2.proj is not None
            x = gated_residual(x, branch, gate)
            branch, gate = self.attn2.proj(own.flatten(2)), m[8]
        h, y = gated_adaln(x, branch, gate, shift_mlp, scale_mlp)
        return gated_residual(h, self.mlp(y), gate_mlp)

    def attend_alone(self, x: Tensor, m: tuple[Tensor, ...]) -> Tensor | None:
        """The second attention of MMDiT-X: the same norm with its own modulation, this stream only."""
        if self.attn2 is None:
            return None
        return joint_attention([self.attn2.stream(adaln(x, m[6], m[7]), None)])[0]


# Which weight set each stream uses; the image comes last, the text streams before it.
WEIGHT_SETS = {1: ("shared", "shared"), 2: ("context", "image"), 3: ("context", "context2", "image")}


class JointBlock(nn.Module):
    """An MM-DiT block for 1, 2 or 3 weight sets. In the last block the text streams only give keys and values."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.names = WEIGHT_SETS[config.weight_sets]
        self.last = index == config.depth - 1
        for name in dict.fromkeys(self.names):
            pre_only = self.last and name.startswith("context")
            dual = index in config.dual_attention and not name.startswith("context")
            self.add_module(name, StreamBlock(config, pre_only=pre_only, dual=dual))

    def forward(self, xs: list[Tensor], c: Tensor, lengths: list[Tensor | None]) -> list[Tensor]:
        """xs: one [B, S_i, width] per stream, image last; c: [B, width]. The last block returns the image only."""
        halves: list[StreamBlock] = [self.get_submodule(name) for name in self.names]     # type: ignore[misc]
        once = {half: half.modulate(c) for half in dict.fromkeys(halves)}      # a shared half is asked once
        modulations = [once[half] for half in halves]
        goes_on = [not self.last] * (len(xs) - 1) + [True]
        streams = [
            half.attn.stream(adaln(x, m[0], m[1]), length, queries=on)
            for half, x, m, length, on in zip(halves, xs, modulations, lengths, goes_on, strict=True)
        ]
        attended = joint_attention(streams)
        image = len(xs) - 1
        return [
            halves[i].update(x, out, halves[i].attend_alone(x, modulations[i]) if i == image else None, modulations[i])
            for i, (x, out) in enumerate(zip(xs, attended, strict=True))
            if out is not None
        ]
