"""MM-DiT as a careful user writes it in PyTorch: what the fused ops are held against, and what compilers are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import MMDiT
from mmdit.blocks import JointBlock, StreamBlock
from mmdit.embeddings import FinalLayer

Norm = Callable[..., Tensor]
"""F.rms_norm, or what stands for it: (x, shape, weight, eps)."""


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.unsqueeze(1) * branch


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def joint(
    core: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkvs: list[Tensor],
    weights: list[tuple[Tensor | None, Tensor | None]],
    norm: Norm = F.rms_norm,
) -> list[Tensor]:
    """A library's attention with what it needs around it: norms, concatenation, split. qkvs: [B, S, 3, H, D] each; core
    takes [B, S, H, D]."""
    parts = []
    for qkv, pair in zip(qkvs, weights, strict=True):
        q, k, v = qkv.unbind(2)
        q, k = (x if w is None else norm(x, x.shape[-1:], w, 1e-6) for x, w in zip((q, k), pair, strict=True))
        parts.append((q, k, v))
    out = core(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
    return list(out.split([qkv.shape[1] for qkv in qkvs], 1))


class Block(nn.Module):
    """A joint block of two streams on the weights of one of ours; the last block's text queries are left unused."""

    def __init__(self, block: JointBlock, norm: Norm = F.rms_norm) -> None:
        super().__init__()
        self.halves = nn.ModuleList(block.get_submodule(name) for name in block.names)
        self.last, self.norm = block.last, norm

    def forward(self, xs: list[Tensor], c: Tensor, lengths: Any = None) -> list[Tensor]:
        halves: list[Any] = list(self.halves)
        modulations = [half.modulation(c).chunk(half.chunks, dim=-1) for half in halves]
        qkvs = []
        for half, x, m in zip(halves, xs, modulations, strict=True):
            qkvs.append(half.attn.qkv(adaln(x, m[0], m[1])).view(*x.shape[:2], 3, half.attn.heads, half.attn.head_dim))
        weights = [(half.attn.q_norm, half.attn.k_norm) for half in halves]
        attended = joint(sdpa, qkvs, weights, self.norm)
        goes_on = [i for i in range(len(xs)) if not self.last or i == len(xs) - 1]
        return [self.update(halves[i], xs[i], attended[i], modulations[i]) for i in goes_on]

    @staticmethod
    def update(half: StreamBlock, x: Tensor, attended: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        assert half.attn.proj is not None and half.mlp is not None
        x = gated_residual(x, half.attn.proj(attended.flatten(2)), m[2])
        hidden = F.gelu(half.mlp.fc1(adaln(x, m[3], m[4])), approximate="tanh")
        return gated_residual(x, half.mlp.fc2(hidden), m[5])


class Final(nn.Module):
    def __init__(self, layer: FinalLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        shift, scale = self.layer.modulation(c).chunk(2, dim=-1)
        p = self.layer.patch_size
        patches = self.layer.linear(adaln(x, shift, scale)).reshape(-1, h, w, p, p, self.layer.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.layer.channels, h * p, w * p)


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have parameters of this dtype; fake ones cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def twin(module: nn.Module) -> Any:
    """Another module on the same parameters, to be changed or compiled apart from the first."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def model(ours: MMDiT, norm: Norm = F.rms_norm) -> nn.Module:
    """The same function on the same parameters, every fused op written out. Two weight sets, no dual attention."""
    if ours.config.weight_sets != 2 or ours.config.dual_attention:
        raise ValueError(f"eager.model: config is {ours.config}; expected 2 weight sets and no dual attention")
    made = twin(ours)
    made.blocks = nn.ModuleList(Block(block, norm) for block in ours.blocks)
    made.final_layer = Final(ours.final_layer)
    return made  # type: ignore[no-any-return]
