"""Layers of torch.nn: where they are made, whether an op may read their weights instead of calling them, and the one
kind of adapter whose low-rank part ops take as it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Device = torch.device | str | int | None


def plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a layer's weights are all there is to it: no adapter, no hook, no other class, no parametrisation, no
    quantised or distributed weight. If not, it is called."""
    switched_off = type(layer) is LoraLinear and not layer.enabled and kind is nn.Linear
    return (type(layer) is kind or switched_off) and _bare(layer)


def adapted(layer: nn.Module) -> bool:
    """Whether a layer is its weights and a low-rank part and no more: they may be read and `low_rank` added."""
    return type(layer) is LoraLinear and layer.enabled and _bare(layer)


def _bare(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if hooked or "forward" in layer.__dict__:
        return False
    if type(layer._parameters.get("weight")) is nn.Parameter:
        return True
    return not hasattr(layer.weight, "__tensor_flatten__")                            # it would stand for other tensors


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank part: ``y = W x + b + (alpha / rank) B A x`` (LoRA, arXiv 2106.09685).

    The base is frozen and its parameters keep their names; two are added, `lora_a` and `lora_b`. A layer whose rows
    stand for several projections (q, k and v; the modulation of every block) can have a low-rank part for each: A holds
    them one under another, and every group of rows of B belongs to one of them. Ops of this library compute the base as
    without the adapter, so that off (`enabled = False`) is the base to the last bit.

    Args:
        rank, alpha: the low-rank part is multiplied by alpha / rank.
        parts: of each group of equally many rows, the number of its low-rank part: (0,) for one part of all rows,
            (0, 1, 2) for q, k and v apart, (0, 0, 0, 1, 1) for a modulation of three vectors and one of two; -1: none,
            B is zero there.
        dropout: of the low-rank part's input, in training.

    >>> layer = LoraLinear(8, 24, rank=2, parts=(0, 1, 2))
    >>> layer.lora_a.shape, layer.lora_b.shape
    (torch.Size([6, 8]), torch.Size([24, 2]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None = None,
        parts: Sequence[int] = (0,),
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._add(rank, alpha, parts, dropout, device)
        self.reset_adapter()

    def _add(
        self, rank: int, alpha: float | None, parts: Sequence[int], dropout: float, device: torch.device | str | None
    ) -> None:
        if rank < 1:
            raise ValueError(f"LoraLinear: rank is {rank}; expected at least 1")
        if not parts or self.out_features % len(parts):
            raise ValueError(f"LoraLinear: {self.out_features} rows do not divide into {len(parts)} groups")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.parts, self.dropout, self.enabled = tuple(parts), dropout, True
        device = self.weight.device if device is None else device
        self.lora_a = nn.Parameter(torch.empty((max(parts) + 1) * rank, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, device=device))
        self.base_trained = self.weight.requires_grad
        """Whether the base was, before it was frozen."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def of(
        cls, layer: nn.Linear, rank: int, alpha: float | None = None, parts: Sequence[int] = (0,), dropout: float = 0.0
    ) -> LoraLinear:
        """A layer with the parameters of another, which are frozen, and a low-rank part, not initialised.

        Raises: ValueError if the rows do not divide into the groups, or the rank is not positive."""
        made: LoraLinear = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made._add(rank, alpha, parts, dropout, None)
        return made.train(layer.training)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator | None = None) -> None:
        """A as nn.Linear's weights, B zero: the layer begins as its base."""
        fill_a(self.lora_a, generator)
        self.lora_b.zero_()

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def low_rank(self, x: Tensor, first: int = 0) -> Tensor:
        """The low-rank part of the output alone, of the groups of rows from `first` on, in the layer's dtype."""
        given = x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_a.dtype)
        h = F.linear(F.dropout(given, self.dropout, self.training) if self.dropout else given, self.lora_a)
        if len(self.parts) == 1:
            return (F.linear(h, self.lora_b[first:] if first else self.lora_b) * self.scaling).to(x.dtype)
        size = self.out_features // len(self.parts)
        skipped = first // size
        by_group = _of_groups(h.unflatten(-1, (-1, self.rank)), self.parts[skipped:])  # [..., groups, rank]
        rows = self.lora_b[skipped * size :].unflatten(0, (-1, size))                  # [groups, rows, rank]
        out = torch.einsum("...gr,gor->...go", by_group, rows).flatten(-2)[..., first - skipped * size :]
        return (out * self.scaling).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)
        return base + self.low_rank(x) if self.enabled else base

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the low-rank part to the weight, in fp64 with one rounding, a group of rows at a time."""
        size, rank = self.out_features // len(self.parts), self.rank
        for i, part in enumerate(self.parts):
            rows = self.weight[i * size : (i + 1) * size]
            a, b = self.lora_a.unflatten(0, (-1, rank))[part], self.lora_b[i * size : (i + 1) * size]
            rows.copy_(rows.double() + self.scaling * (b.double() @ a.double()))

    def extra_repr(self) -> str:
        parts = f", parts={max(self.parts) + 1}" if len(self.parts) > 1 else ""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}{parts}"


def _of_groups(by_part: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Of each group what belongs to its part, [..., parts, rank] -> [..., groups, rank]. By slices: a list of indices
    would be copied to a GPU at each call, which waits for it and cannot be captured."""
    first, count = parts[0], by_part.shape[-2]
    if first >= 0 and parts == tuple(range(first, first + len(parts))):
        return by_part[..., first : first + len(parts), :]
    runs = ((number % count, len(list(same))) for number, same in groupby(parts))
    shape = by_part.shape[:-2]
    return torch.cat([by_part[..., n : n + 1, :].expand(*shape, length, -1) for n, length in runs], -2)


def fill_a(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """The initial value of A: uniform, as nn.Linear's weights (LoRA's and PEFT's choice)."""
    bound = tensor.shape[1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)
