"""Writing LoRA files, in the formats of formats.py. What is written has its strength in B, so that readers that know
nothing of alpha, or read it elsewhere, agree."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmdit.adapters.formats import DIFFUSERS_FILE, FORMATS, METADATA, NATIVE, PAIRS, Place, places
from mmdit.adapters.parts import Adapter, Part, block_diagonal, disjoint, overlapping
from mmdit.checkpoint.store import swap
from mmdit.checkpoint.tensors import NAMES, Entry, Planned, write
from mmdit.config import MMDiTConfig


def save(
    adapter: Adapter,
    path: str | os.PathLike[str],
    config: MMDiTConfig,
    *,
    format: str = "native",
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA file, atomically.

    Args:
        path: a .safetensors file, or for diffusers a folder, which gets pytorch_lora_weights.safetensors.
        config: of the model that it is for. extra: more metadata, as text.
    Returns: the file.
    Raises: ValueError for an unknown format, a model that has no such layout, or an adapter without parts.
    """
    if format not in FORMATS:
        raise ValueError(f"lora: format is {format!r}; expected one of {', '.join(FORMATS)}")
    if not adapter.parts:
        raise ValueError("lora: the adapter has no low-rank parts to write")
    path = Path(path)
    if format == "diffusers" and path.suffix != ".safetensors":
        path = path / DIFFUSERS_FILE
    made = {layer: disjoint(parts) for layer, parts in adapter.by_layer().items()}
    if format == "native":
        tensors, metadata = _as_native(made), {"format": NATIVE, "config": json.dumps(config.to_dict())}
    else:
        tensors, metadata = _as_other(made, config, format)
    metadata |= extra or {}
    if format == adapter.format:
        tensors |= adapter.others
    plan = {
        name: Planned(Entry(tuple(tensor.shape), NAMES[dtype]), lambda tensor=tensor: iter([tensor]))  # type: ignore[misc]
        for name, tensor in tensors.items()
    }
    write(path, plan, metadata, most=1 << 62)
    return path


def _as_native(made: Mapping[str, list[Part]]) -> dict[str, Tensor]:
    tensors = {}
    for layer, parts in made.items():
        for part in parts:
            name = f"{layer}[{part.first}:{part.end}]"
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = part.a, part.b
    return tensors


def _as_other(
    made: Mapping[str, list[Part]], config: MMDiTConfig, format: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    known = places(config, "diffusers" if format == "diffusers" else "sd3")
    found = dict(_placed(made, known))
    left = [name for name, parts in made.items() for part in parts if not _is_placed(part, known.values())]
    if left:
        raise ValueError(f"lora: {', '.join(sorted(set(left))[:5])} have no name in the format {format} of this model")
    tensors: dict[str, Tensor] = {}
    rank = max(part.rank for part in found.values())
    for name, part in found.items():
        if format == "kohya":
            name, ends = f"lora_unet_{name.replace('.', '_')}", PAIRS[1]
        else:
            name, ends = f"{'transformer' if format == 'diffusers' else 'diffusion_model'}.{name}", PAIRS[0]
        a, b = part.a, part.b
        if format == "diffusers" and part.rank < rank:           # of several ranks old readers take the first for all
            a = torch.cat([a, a.new_zeros(rank - part.rank, a.shape[1])])
            b = torch.cat([b, b.new_zeros(b.shape[0], rank - part.rank)], 1)
        tensors[name + ends[0]], tensors[name + ends[1]] = a, b
        if format != "diffusers":
            tensors[f"{name}.alpha"] = torch.tensor(float(part.rank))
    if format == "diffusers":
        own = {"r": rank, "lora_alpha": rank, "target_modules": list(found)}    # of more keys older readers fail
        own = {f"transformer.{key}": value for key, value in own.items()}
        return tensors, {"format": "pt", METADATA: json.dumps(own)}
    if format == "kohya":
        about = {"network_module": "networks.lora_sd3", "network_dim": str(rank), "network_alpha": str(rank)}
        return tensors, {f"ss_{key}": value for key, value in about.items()}
    return tensors, {"format": "pt"}


def _is_placed(part: Part, known: Iterable[Place]) -> bool:
    """Whether all of a part's rows stand somewhere."""
    own = (place for place in known if place.layer == part.layer)
    rows = sum(max(0, min(part.end, p.first + p.rows) - max(part.first, p.first)) for p in own)
    return rows == part.end - part.first


def _placed(made: Mapping[str, list[Part]], known: Mapping[str, Place]) -> Iterator[tuple[str, Part]]:
    """Each module of a layout that has a low-rank part, with the rows in its order."""
    for name, place in known.items():
        inside = overlapping(made.get(place.layer, ()), place.first, place.first + place.rows)
        if not inside:
            continue
        part = block_diagonal(inside, place.first, place.rows)
        yield name, Part(name, place.first, part.a, swap(part.b) if place.swapped else part.b)
