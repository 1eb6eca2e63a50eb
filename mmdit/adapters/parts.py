"""Low-rank parts of a model's layers, apart from any model or file: what formats are read into and written from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn

from mmdit.adapters.layers import LoraLinear, layers
from mmdit.adapters.lora import replace as put
from mmdit.model import MMDiT


@dataclass(frozen=True)
class Part:
    """``scale * b @ a`` is added to the rows of a layer from `first` on."""

    layer: str
    """Our name."""
    first: int
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[rows, rank]"""
    scale: float = 1.0

    @property
    def end(self) -> int:
        return self.first + self.b.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaled(self) -> Tensor:
        """b with the scale in it, in fp32 or wider."""
        return self.b.to(torch.promote_types(self.b.dtype, torch.float32)) * self.scale

    def delta(self) -> Tensor:
        """[rows, in] in fp64."""
        return self.scale * (self.b.double() @ self.a.double())


@dataclass
class Adapter:
    """Low-rank parts for a model, and what a file held besides."""

    parts: list[Part]
    format: str = "native"
    others: dict[str, Tensor] = field(default_factory=dict)
    """What is for other networks (text encoders), by its name in the file: kept, not used."""
    notes: list[str] = field(default_factory=list)
    """What a reader should be told."""

    def by_layer(self) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.layer, []).append(part)
        return found

    def times(self, weight: float) -> Adapter:
        return replace(self, parts=[replace(part, scale=part.scale * weight) for part in self.parts])


def block_diagonal(parts: Sequence[Part], first: int, rows: int) -> Part:
    """One part for these rows that does what several do, each on rows of its own or on all of them: their A one under
    another, B zero where a part says nothing. Parts that share A stay one. Exact; the scale is in B."""
    groups: list[list[Part]] = []
    for part in parts:
        for group in groups:
            apart = all(part.end <= p.first or p.end <= part.first for p in group)
            if apart and torch.equal(group[0].a, part.a):
                group.append(part)
                break
        else:
            groups.append([part])
    dtype = torch.promote_types(parts[0].b.dtype, torch.float32)
    b = torch.zeros(rows, sum(group[0].rank for group in groups), dtype=dtype)
    column = 0
    for group in groups:
        for part in group:
            low, high = max(first, part.first), min(first + rows, part.end)
            rows_of_it = part.scaled()[low - part.first : high - part.first]
            b[low - first : high - first, column : column + part.rank] = rows_of_it
        column += group[0].rank
    return Part(parts[0].layer, first, torch.cat([group[0].a.to(dtype) for group in groups]), b)


def overlapping(parts: Iterable[Part], first: int, end: int) -> list[Part]:
    return [part for part in parts if part.first < end and first < part.end]


def disjoint(parts: Sequence[Part]) -> list[Part]:
    """Parts of one layer, those of several files too, as parts that share no row."""
    bounds = sorted({row for part in parts for row in (part.first, part.end)})
    found: list[tuple[list[Part], int, int]] = []
    for first, end in pairwise(bounds):
        inside = overlapping(parts, first, end)
        if inside and found and found[-1][0] == inside and found[-1][2] == first:
            found[-1] = (inside, found[-1][1], end)
        elif inside:
            found.append((inside, first, end))
    return [block_diagonal(inside, first, end - first) for inside, first, end in found]


# --- a model's --------------------------------------------------------------------------------------------------------


def of_model(model: nn.Module) -> Adapter:
    """The low-rank parts of a model's layers, whatever device they are on; copies."""
    found: list[Part] = []
    for name, layer in layers(model):
        a, b = (tensor.detach().cpu().clone() for tensor in (layer.lora_a, layer.lora_b))
        found += of_layer(name, layer.parts, layer.scaling, a, b)
    return Adapter(found)


def of_layer(name: str, numbers: Sequence[int], scale: float, a: Tensor, b: Tensor) -> list[Part]:
    """What an adapted layer's tensors stand for. Args: numbers: of its groups of rows, see LoraLinear."""
    rank, rows, found = b.shape[1], b.shape[0] // len(numbers), []
    first = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number:
            begin, end = first * rows, (i + 1) * rows
            if number >= 0:
                found.append(Part(name, begin, a[number * rank : (number + 1) * rank], b[begin:end], scale))
            first = i + 1
    return found


def load(model: MMDiT, *adapters: Adapter) -> None:
    """Puts adapters on a model, one on top of the other: each as if it were alone, their effects added. Adapters that
    are there stay. The layers' weights are frozen and not touched.

    Raises: ValueError for a layer that the model has not, or of another size.

    >>> load(model, read("style.safetensors"), read("subject.safetensors"))                         # doctest: +SKIP
    """
    every = Adapter([part for adapter in (of_model(model), *adapters) for part in adapter.parts])
    there, made = dict(model.named_modules()), {}
    for name, parts in every.by_layer().items():
        layer = there.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"adapter: the model has no linear layer {name}")
        made[name] = _layer(layer, name, parts)
    for name, layer in made.items():                                      # all of them, or none
        put(model, name, layer)


def _layer(base: nn.Linear, name: str, parts: list[Part]) -> LoraLinear:
    for part in parts:
        if part.end > base.out_features or part.a.shape[1] != base.in_features:
            raise ValueError(
                f"adapter: {name} has {part.end} rows of {part.a.shape[1]}; the model's has {base.out_features} of "
                f"{base.in_features}"
            )
    parts = disjoint(parts)
    unit = gcd(base.out_features, *(row for part in parts for row in (part.first, part.end)))
    if len(parts) == 1 and parts[0].b.shape[0] == base.out_features:
        unit = base.out_features
    rank = max(part.rank for part in parts)
    numbers = [-1] * (base.out_features // unit)
    a = torch.zeros(len(parts) * rank, base.in_features)
    b = torch.zeros(base.out_features, rank)
    for i, part in enumerate(parts):
        numbers[part.first // unit : part.end // unit] = [i] * ((part.end - part.first) // unit)
        a[i * rank : i * rank + part.rank] = part.a
        b[part.first : part.end, : part.rank] = part.scaled()
    made = LoraLinear.of(base, rank, parts=numbers)
    with torch.no_grad():
        made.lora_a.copy_(a)
        made.lora_b.copy_(b)
    return made


def remove(model: MMDiT) -> None:
    """Takes the adapters off: the base is left, as it was."""
    for name, layer in list(layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        put(model, name, plain.train(layer.training).requires_grad_(layer.base_trained))


@torch.no_grad()
def merge(model: MMDiT) -> None:
    """Adds the low-rank parts to the weights, in fp64 with one rounding, and takes the adapters off. Weights in 16 bits
    lose what is below their last digit: the adapter's file remains the better thing to keep."""
    for _, layer in layers(model):
        layer.merge()
    remove(model)


# --- smaller ones -----------------------------------------------------------------------------------------------------


def truncated(part: Part, rank: int) -> Part:
    """The best part of at most this rank, in the least squared error of ``b @ a``."""
    left, r_b = torch.linalg.qr(part.b.double())
    right, r_a = torch.linalg.qr(part.a.double().T)
    a, b = _factors(part.scale * (r_b @ r_a.T), rank)
    return Part(part.layer, part.first, (a @ right.T).float(), (left @ b).float())


def extracted(layer: str, first: int, difference: Tensor, rank: int) -> Part:
    """The best part of at most this rank for the difference of two weights [rows, in]."""
    a, b = _factors(difference.double(), rank)
    return Part(layer, first, a.float(), b.float())


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(a, b) of the best ``b @ a`` of at most this rank, equally large."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
