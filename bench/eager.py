"""MM-DiT as a careful user writes it in PyTorch: what the fused ops are held against, and what compilers are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import MMDiT
from mmdit.blocks import JointBlock, StreamBlock, Vectors
from mmdit.embeddings import FinalLayer
from rfkernels.nn import Modulation, PatchEmbed

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

    @property
    def vectors(self) -> list[int]:
        return [half.vectors for half in self.halves]                                               # type: ignore[misc]

    def forward(self, xs: list[Tensor], modulations: list[Vectors], lengths: Any = None) -> list[Tensor]:
        halves: list[Any] = list(self.halves)
        qkvs = []
        for half, x, m in zip(halves, xs, modulations, strict=True):
            qkvs.append(half.attn.qkv(adaln(x, m[0], m[1])).view(*x.shape[:2], 3, half.attn.heads, half.attn.head_dim))
        norms = [(half.attn.q_norm, half.attn.k_norm) for half in halves]
        weights = [tuple(norm if norm is None else norm.weight for norm in pair) for pair in norms]
        attended = joint(sdpa, qkvs, weights, self.norm)                                            # type: ignore[arg-type]
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

    def forward(self, x: Tensor, vectors: Vectors, height: int, width: int) -> Tensor:
        p = self.layer.unembed.patch_size
        patches = self.layer.unembed.linear(adaln(x, *vectors)).unflatten(2, (p, p, -1))
        cells = patches.unflatten(1, (height // p, width // p))                               # [B, h, w, p, p, C]
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)


class Embed(nn.Module):
    def __init__(self, layer: PatchEmbed) -> None:
        super().__init__()
        self.layer = layer

    @property
    def proj(self) -> nn.Module:
        return self.layer.proj

    def forward(self, latent: Tensor) -> Tensor:
        tokens = self.layer.proj(latent).flatten(2).transpose(1, 2)
        h, w = (size // self.layer.patch_size for size in latent.shape[2:])
        return tokens + self.layer.crop(h, w).to(tokens.dtype)


class Chunks(nn.Module):
    """The stacked projection, which a careful user may have too, cut by PyTorch's own `split` and `chunk`."""

    def __init__(self, layer: Modulation) -> None:
        super().__init__()
        self.layer = layer

    def project(self, c: Tensor) -> Tensor:
        out: Tensor = self.layer.linear(F.silu(c))
        return out

    def split(self, modulation: Tensor) -> list[Vectors]:
        counts = self.layer.counts
        parts = modulation.split([n * self.layer.width for n in counts], -1)
        return [part.chunk(n, -1) for part, n in zip(parts, counts, strict=True)]


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
    made.final_layer, made.patch_embed = Final(ours.final_layer), Embed(ours.patch_embed)
    made.modulation = Chunks(ours.modulation)
    return made  # type: ignore[no-any-return]


# --- F.rms_norm, which PyTorch takes apart where there is no GPU ------------------------------------------------------


@torch.library.custom_op("rfkernels_bench::rms_norm", mutates_args=())
def _one_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@torch.library.custom_op("rfkernels_bench::rms_norm_backward", mutates_args=())
def _one_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    raise NotImplementedError("counted, never run")


_one_rms_norm.register_fake(lambda x, weight, eps: x.new_empty(x.shape))
_one_rms_norm_backward.register_fake(lambda grad, x, weight: [x.new_empty(x.shape), weight.new_empty(weight.shape)])
_one_rms_norm.register_autograd(
    lambda ctx, grad: (*_one_rms_norm_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


def rms_norm_as_on_a_gpu(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """One operator each way, as F.rms_norm is on a GPU; on a CPU, and in fake tensors, PyTorch takes it apart."""
    return _one_rms_norm(x, weight, eps)
