"""The ops as modules to build a diffusion transformer from. Parameters have the names of timm and of the released
models: `qkv`, `proj`, `q_norm`, `k_norm`, `fc1`, `fc2`, `linear`, and `pos_embed`. All take `device` and `dtype`.

A block of two streams, whole: docs/examples/own_block.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfkernels
from rfkernels import checks
from rfkernels.adaln.op import NORMS, Norm
from rfkernels.autocast import autocast_dtype
from rfkernels.bias import linear
from rfkernels.joint_attention.stream import Rope, Stream
from rfkernels.layers import plain

Device = torch.device | str | int | None


class AdaLN(nn.Module):
    """``norm(x) * (1 + scale) + shift``; see `rfkernels.adaln`.

    Args:
        channels: None for a norm without parameters, as in diffusion transformers; else it has a `weight` and, if
            "layer", a `bias`, as nn.LayerNorm and nn.RMSNorm do.
        norm: "layer" or "rms". eps: 1e-6, unlike theirs.

    >>> AdaLN()(torch.randn(2, 16, 64), shift=torch.randn(2, 64), scale=torch.randn(2, 64)).shape
    torch.Size([2, 16, 64])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int | None = None,
        *,
        norm: Norm = "layer",
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.choice(name, "norm", norm, NORMS)
        checks.positive(name, eps=eps)
        if channels is not None:
            checks.positive_int(name, channels=channels)
        self.channels, self.norm, self.eps = channels, norm, eps
        for parameter, wanted in (("weight", channels), ("bias", channels if norm == "layer" else None)):
            made = None if wanted is None else nn.Parameter(torch.empty(wanted, device=device, dtype=dtype))
            self.register_parameter(parameter, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "norm": self.norm, "eps": self.eps}

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return rfkernels.adaln(x, shift, scale, **self.settings())

    def extra_repr(self) -> str:
        channels = "" if self.channels is None else f"{self.channels}, "
        return f"{channels}norm={self.norm!r}, eps={self.eps}"


class GatedAdaLN(AdaLN):
    """``h = residual + gate * branch; y = norm(h) * (1 + scale) + shift`` -> (h, y); see `rfkernels.gated_adaln`.

    Args: as for AdaLN.

    >>> residual, branch, vector = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.randn(2, 64)
    >>> h, y = GatedAdaLN()(residual, branch, gate=vector, shift=vector, scale=vector)
    """

    def forward(  # type: ignore[override]
        self,
        residual: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return rfkernels.gated_adaln(residual, branch, gate, shift, scale, **self.settings())


class Modulation(nn.Module):
    """SiLU and one projection: the modulation vectors of one consumer, or of all blocks of a model at once.

    adaLN's projections are a third of an MM-DiT's parameters and used once per sample, so one stacked product for all
    blocks reads them at full width, and a sampler can ask for all its timesteps at once: `project` on [steps * B, ...],
    then `split` step by step. Their gradients are written into one tensor, see `rfkernels.chunk_modulation`.

    Args:
        in_features: channels of the conditioning vector.
        width: of a modulation vector.
        counts: how many vectors each consumer takes: (6, 6, ..., 2).

    >>> (shift, scale, gate), final = Modulation(32, 64, counts=(3, 2))(torch.randn(2, 32))
    >>> gate.shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        counts: Sequence[int],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not counts:
            raise ValueError(f"{name}: counts is empty; expected the number of vectors of each consumer")
        numbers = {f"counts[{i}]": count for i, count in enumerate(counts)}
        checks.positive_int(name, in_features=in_features, width=width, **numbers)
        self.width, self.counts = width, tuple(counts)
        self.linear = nn.Linear(in_features, sum(counts) * width, device=device, dtype=dtype)

    def project(self, c: Tensor) -> Tensor:
        """c [B, in_features] -> [B, sum(counts) * width]."""
        out: Tensor = self.linear(F.silu(c))
        return out

    def split(self, modulation: Tensor) -> list[tuple[Tensor, ...]]:
        """What `project` gave, or rows of it, as one tuple of [B, width] for each consumer."""
        chunks = rfkernels.chunk_modulation(modulation, sum(self.counts))
        return [chunks[end - count : end] for end, count in zip(accumulate(self.counts), self.counts, strict=True)]

    def forward(self, c: Tensor) -> list[tuple[Tensor, ...]]:
        return self.split(self.project(c))

    def extra_repr(self) -> str:
        return f"width={self.width}, vectors={sum(self.counts)} for {len(self.counts)} consumers"


class StreamAttention(nn.Module):
    """The projections of one stream around a joint attention: `qkv` and `proj`, and the weights of `q_norm` and
    `k_norm`, which are applied inside it, with its eps.

    Args:
        dim: channels of the stream.
        heads, head_dim: of the attention, equal in all streams that meet; head_dim is dim / heads unless given.
        qk_norm: RMSNorm with weight on queries and keys.
        project_out: False for a stream whose output nobody reads (the text of a last block).

    >>> text, image = StreamAttention(64, heads=2), StreamAttention(64, heads=2)
    >>> streams = [text.stream(torch.randn(2, 7, 64)), image.stream(torch.randn(2, 16, 64))]
    >>> image.project(rfkernels.joint_attention(streams)[1]).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        qk_norm: bool = True,
        bias: bool = True,
        project_out: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.positive_int(name, dim=dim, heads=heads, **({} if head_dim is None else {"head_dim": head_dim}))
        if head_dim is None and dim % heads:
            raise ValueError(f"{name}: dim is {dim}; expected a multiple of heads = {heads}, or head_dim to be given")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner, where = heads * self.head_dim, {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias, **where)
        self.proj = nn.Linear(inner, dim, bias=bias, **where) if project_out else None
        self.q_norm = nn.RMSNorm(self.head_dim, **where) if qk_norm else None                       # type: ignore[arg-type]
        self.k_norm = nn.RMSNorm(self.head_dim, **where) if qk_norm else None                       # type: ignore[arg-type]

    def stream(
        self, x: Tensor, lengths: Tensor | None = None, rope: Rope | None = None, *, queries: bool = True
    ) -> Stream:
        """x [B, S, dim] as a stream for `rfkernels.joint_attention`; see Stream for the other arguments."""
        heads = (-1, self.heads, self.head_dim)
        q, k = (norm if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        if queries and plain(self.qkv):
            whole = (3, *heads[1:])
            qkv = linear(x, self.qkv.weight, self.qkv.bias, whole, before="joint_attention")
            return Stream.packed(qkv, q, k, lengths, rope)
        if queries:
            return Stream.packed(self.qkv(x).unflatten(-1, heads), q, k, lengths, rope)
        if not plain(self.qkv):
            return Stream.packed(self.qkv(x).unflatten(-1, heads)[:, :, 1:], None, k, lengths, rope, queries=False)
        inner = self.heads * self.head_dim          # keys and values only: a third of the projection is not needed
        bias = None if self.qkv.bias is None else self.qkv.bias[inner:]
        kv = F.linear(x, self.qkv.weight[inner:], bias).unflatten(-1, heads)
        return Stream.packed(kv, None, k, lengths, rope, queries=False)

    def project(self, attended: Tensor) -> Tensor:
        """[B, S, heads, head_dim] -> [B, S, dim]."""
        out = attended.flatten(2)
        if self.proj is None:
            return out
        if plain(self.proj):
            return linear(out, self.proj.weight, self.proj.bias, before="gated_adaln")
        projected: Tensor = self.proj(out)
        return projected

    def extra_repr(self) -> str:
        norm, out = "" if self.q_norm else ", qk_norm=False", "" if self.proj else ", project_out=False"
        return f"heads={self.heads}, head_dim={self.head_dim}{norm}{out}"


class JointAttention(nn.Module):
    """Streams of tokens, each with weights of its own, that meet in one attention; nothing is concatenated.

    Args:
        dims: channels of each stream: (1536, 1536) for the text and image of SD3.
        heads: of the attention. The others as for StreamAttention.
        silent: indices of streams that give keys and values only and have no `proj` (the text of a last block). Their
            query projection and its norm are there, as in the released weights, but never read.
        eps: of the norms of queries and keys.

    >>> text, image = JointAttention((64, 64), heads=2)([torch.randn(2, 7, 64), torch.randn(2, 16, 64)])
    >>> image.shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self, dims: Sequence[int], heads: int, *, silent: Sequence[int] = (), eps: float = 1e-6, **settings: Any
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not dims:
            raise ValueError(f"{name}: dims is empty; expected the channels of each stream")
        checks.positive_int(name, heads=heads, **{f"dims[{i}]": dim for i, dim in enumerate(dims)})
        checks.positive(name, eps=eps)
        outside = [i for i in silent if not 0 <= i < len(dims)]
        if outside:
            raise ValueError(f"{name}: silent names streams {outside}; expected 0 to {len(dims) - 1}")
        self.silent, self.eps = frozenset(silent), eps
        settings.setdefault("head_dim", max(dims) // heads if max(dims) % heads == 0 else None)
        self.streams = nn.ModuleList(
            StreamAttention(dim, heads, project_out=i not in self.silent, **settings)
            for i, dim in enumerate(dims)
        )

    def forward(
        self,
        xs: Sequence[Tensor],
        lengths: Sequence[Tensor | None] | None = None,
        ropes: Sequence[Rope | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """
        Args:
            xs: one [B, S_i, dims[i]] per stream.
            lengths: of each stream None or [B], where its padding begins. ropes: of each stream None or its tables.
        Returns: one [B, S_i, dims[i]] per stream, None for a silent one.
        Raises: ValueError if the counts differ, and what `rfkernels.joint_attention` raises.
        """
        nothing = [None] * len(self.streams)
        for name, given in (("xs", xs), ("lengths", lengths or nothing), ("ropes", ropes or nothing)):
            if len(given) != len(self.streams):
                raise ValueError(
                    f"{type(self).__name__}: {name} has {len(given)} entries; expected {len(self.streams)}"
                )
        made = [
            half.stream(x, length, rope, queries=i not in self.silent)                            # type: ignore[operator]
            for i, (half, x, length, rope) in enumerate(
                zip(self.streams, xs, lengths or nothing, ropes or nothing, strict=True)
            )
        ]
        outs = rfkernels.joint_attention(made, eps=self.eps)
        return tuple(
            out if out is None else half.project(out)                                             # type: ignore[operator]
            for half, out in zip(self.streams, outs, strict=True)
        )

    def extra_repr(self) -> str:
        return f"silent={sorted(self.silent)}, eps={self.eps}" if self.silent else f"eps={self.eps}"


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the tanh form; keeps its pre-activation only, see `rfkernels.gelu_mlp`.

    Args:
        dim, hidden, out: channels; hidden is 4 dim and out is dim unless given.

    >>> Mlp(64)(torch.randn(2, 16, 64)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        out: int | None = None,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, out = hidden or 4 * dim, out or dim
        checks.positive_int(type(self).__name__, dim=dim, hidden=hidden, out=out)
        self.fc1 = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rfkernels.gelu_mlp(x, self.fc1, self.fc2)


class PatchEmbed(nn.Module):
    """Patchify, project, add the centre crop of a position table; see `rfkernels.patch_embed` and `position_grid`.

    The table is data, not a formula: a persistent buffer `pos_embed` [1, rows * columns, dim], filled by the paper's
    formula, or loaded with the weights. It stays fp32 whatever the module is cast to. `proj` holds the weights in a
    convolution's layout.

    Args:
        in_channels, dim: of the latent and of the tokens.
        resolution, max_height, max_width, base: in pixels, as for `position_grid`.
        unit: pixels per token: the autoencoder's factor times patch_size.
        dtype: of `proj`.

    >>> embed = PatchEmbed(4, 64, resolution=256, max_height=512, max_width=512)
    >>> embed(torch.randn(2, 4, 32, 48)).shape
    torch.Size([2, 384, 64])
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        patch_size: int = 2,
        resolution: int,
        max_height: int,
        max_width: int,
        base: int = 256,
        unit: int = 16,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = {"resolution": resolution, "max_height": max_height, "max_width": max_width}
        self.grid |= {"base": base, "unit": unit}
        self.size = max_height // unit, max_width // unit
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, bias=bias, device=device, dtype=dtype)
        table = torch.empty(1, self.size[0] * self.size[1], dim, dtype=torch.float32, device=device)
        self.register_buffer("pos_embed", table)
        if not self.pos_embed.is_meta:
            self.fill_positions()

    @torch.no_grad()
    def fill_positions(self) -> None:
        """Writes the paper's formula into the table."""
        grid = self.grid
        table = rfkernels.position_grid(grid["max_height"], grid["max_width"], self.pos_embed.shape[-1], **grid)
        self.pos_embed.copy_(table.unsqueeze(0))

    def _apply(self, fn: Any, recurse: bool = True) -> PatchEmbed:
        table = self.pos_embed
        super()._apply(fn, recurse)
        if self.pos_embed.dtype != torch.float32:               # bf16 would move every token: 16 bits hold 3 digits
            moved = self.pos_embed
            self.pos_embed = moved.float() if table.is_meta or moved.is_meta else table.to(moved.device)
        return self

    def crop(self, h: int, w: int) -> Tensor:
        """The centre of the table, [h*w, dim]. Raises: ValueError if it is smaller."""
        rows, columns = self.size
        if h > rows or w > columns:
            raise ValueError(
                f"{type(self).__name__}: latent has {h} x {w} patches; the position table holds {rows} x {columns}"
            )
        top, left = (rows - h) // 2, (columns - w) // 2
        table = self.pos_embed.view(rows, columns, -1)
        return table[top : top + h, left : left + w].reshape(h * w, -1)

    def forward(self, latent: Tensor) -> Tensor:
        """latent [B, in_channels, H, W] -> [B, H/p * W/p, dim]."""
        p = self.patch_size
        positions = self.crop(latent.shape[-2] // p, latent.shape[-1] // p)
        if not plain(self.proj, nn.Conv2d):
            tokens = self.proj(latent).flatten(2).transpose(1, 2)
            wide = tokens.to(torch.promote_types(tokens.dtype, positions.dtype)) + positions
            return wide if autocast_dtype(tokens.device.type) else wide.to(tokens.dtype)      # as patch_embed does
        return rfkernels.patch_embed(latent, self.proj.weight, self.proj.bias, positions, patch_size=p)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, table={self.size[0]}x{self.size[1]}"


class PatchUnembed(nn.Module):
    """Project tokens to patches and put them together; see `rfkernels.patch_unembed`. `linear` holds the weights.

    Args:
        dim, out_channels: of the tokens and of the latent.

    >>> PatchUnembed(64, 4)(torch.randn(2, 384, 64), height=32, width=48).shape
    torch.Size([2, 4, 32, 48])
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        patch_size: int = 2,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int(type(self).__name__, dim=dim, out_channels=out_channels, patch_size=patch_size)
        self.patch_size = patch_size
        self.linear = nn.Linear(dim, patch_size**2 * out_channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, h*w, dim] -> [B, out_channels, height, width], of the latent."""
        linear, p = self.linear, self.patch_size
        if not plain(linear):
            cells = linear(x).unflatten(2, (p, p, -1)).unflatten(1, (height // p, width // p))     # [B, h, w, p, p, C]
            return cells.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)
        return rfkernels.patch_unembed(x, linear.weight, linear.bias, height=height, width=width, patch_size=p)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"
