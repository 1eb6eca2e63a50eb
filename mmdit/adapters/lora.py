"""Which layers of a model are adapted, and adapting them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmdit import numbers
from mmdit.adapters.layers import LoraLinear
from mmdit.model import MMDiT

_ATTENTION, _MLP = r"blocks\.\d+\.\w+\.(attn2?|reference)\.(qkv|proj)", r"blocks\.\d+\.\w+\.mlp\.fc[12]"
PRESETS = {
    "attention": (_ATTENTION,),
    "blocks": (_ATTENTION, _MLP),
    "all": (_ATTENTION, _MLP, r"modulation\.linear", r"(time|pooled)_embed\.fc[12]", r"context_embed\.\d+",
            r"final_layer\.unembed\.linear"),
}  # fmt: skip
"""Layers by the name of a set. attention: the projections of all streams, with the second attention of MMDiT-X and
those to references; blocks: and the MLPs; all: every linear layer, as for the paper's preferences (appendix C)."""


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter; rank 0: none, the whole model is trained."""

    rank: int = 0
    """Of each low-rank part."""
    alpha: float | None = None
    """The low-rank part is multiplied by alpha / rank; None: alpha is the rank."""
    dropout: float = 0.0
    """Of the low-rank part's input, in training; drawn by PyTorch's own generator: such a run depends on the number of
    processes and on resumes."""
    targets: tuple[str, ...] = ("attention",)
    """attention, blocks (attention and MLPs), all, or regular expressions for whole names of linear layers."""
    split_qkv: bool = True
    """q, k and v have a low-rank part each, as in diffusers; otherwise they share A."""

    def __post_init__(self) -> None:
        numbers.whole("Lora: rank", self.rank, 0)
        numbers.between("Lora: dropout", self.dropout, 0, 1)
        if self.alpha is not None:
            numbers.above("Lora: alpha", self.alpha, 0)


def parts_of(model: MMDiT, name: str, split_qkv: bool) -> tuple[int, ...]:
    """Of a layer's equal groups of rows, which low-rank part each has. The stacked modulation has one for each half of
    a block and one for the final layer, as other layouts keep them."""
    if name == "modulation.linear":
        return tuple(part for part, count in enumerate(model.modulation.counts) for _ in range(count))
    return (0, 1, 2) if name.endswith(".qkv") and split_qkv else (0,)


def matching(model: nn.Module, targets: tuple[str, ...]) -> Iterator[str]:
    """The names of the linear layers that are meant. Raises: ValueError for a target that matches none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for target in targets:
        patterns = PRESETS.get(target, (target,))
        matched = {name for name in names for pattern in patterns if re.fullmatch(pattern, name)}
        if not matched:
            known = ", ".join(PRESETS)
            raise ValueError(f"Lora: target {target!r} matches no linear layer; expected {known}, or names of layers")
        found |= matched
    return (name for name in names if name in found)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of another."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def attach(model: MMDiT, lora: Lora) -> None:
    """Freezes a model and gives the layers that are meant a low-rank part, which changes nothing yet. Before sharding:
    what is added later would be whole on every process, its gradients not reduced.

    Raises: ValueError for rank 0 or a target that matches no layer.

    >>> model = mmdit.MMDiT(mmdit.presets.tiny())
    >>> attach(model, Lora(rank=4, targets=("blocks",)))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    15360
    """
    if lora.rank < 1:
        raise ValueError(f"Lora: rank is {lora.rank}; expected at least 1")
    if model.config.backbone != "joint":
        raise ValueError(f"Lora: the backbone is {model.config.backbone}; adapters are for joint blocks")
    model.requires_grad_(False)
    for name in matching(model, lora.targets):
        parts = parts_of(model, name, lora.split_qkv)
        layer: Any = model.get_submodule(name)
        made = LoraLinear.of(layer, lora.rank, lora.alpha, parts, lora.dropout)
        if not made.lora_a.is_meta:
            made.reset_adapter()
        replace(model, name, made)
