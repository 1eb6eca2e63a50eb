"""python -m mmdit lora: look at LoRA files, convert, merge, extract and resize them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from tyro.conf import Positional

from mmdit import checkpoint, commands
from mmdit.adapters import formats
from mmdit.adapters.parts import Adapter, Part, disjoint, extracted, load, merge, truncated
from mmdit.adapters.writing import save
from mmdit.commands import DTYPES, Dtype
from mmdit.config import MMDiTConfig
from mmdit.model import MMDiT

Format = Literal["native", "diffusers", "kohya", "comfyui"]


def weighted(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH. Raises: ValueError for a strength that is no number."""
    if Path(text).exists() or ":" not in text:
        return Path(text), 1.0
    name, _, weight = text.rpartition(":")
    try:
        return Path(name), float(weight)
    except ValueError as error:
        raise ValueError(f"lora is {text!r}; expected FILE or FILE:STRENGTH, as in style.safetensors:0.8") from error


def put_on(model: MMDiT, files: tuple[str, ...]) -> list[str]:
    """Loads LoRA files on a model. Returns: what a reader should be told."""
    notes = []
    for path, weight in map(weighted, files):
        adapter = formats.read(path, model.config)
        load(model, adapter.times(weight))
        notes += [f"{path}: {note}" for note in adapter.notes]
    return notes


def _config(file: Path, base: Path | None) -> MMDiTConfig | None:
    return formats.config_of(file) if base is None else checkpoint.open_checkpoint(base).config


def _read(file: Path, base: Path | None) -> tuple[Adapter, MMDiTConfig]:
    config = _config(file, base)
    adapter = formats.read(file, config)
    for note in adapter.notes:
        print(f"note: {note}")
    return adapter, config or formats.released(file)


def info(file: Positional[Path], base: Path | None = None) -> None:
    """Say what a LoRA file holds: format, layers, ranks, and how much each kind of layer changes.

    Args:
        file: A LoRA file in any of the formats.
        base: Weights of its model, if they are none of the released ones.
    """
    adapter, _ = _read(file, base)
    layers = adapter.by_layer()
    numbers = sum(part.a.numel() + part.b.numel() for part in adapter.parts)
    print(f"{file}: format {adapter.format}, {len(layers)} layers, {numbers:,} parameters")
    kinds: dict[str, list[Part]] = {}
    for layer, parts in layers.items():
        kind = ".".join(name for name in layer.split(".") if not name.isdigit())
        kinds.setdefault(kind, []).extend(parts)
    print(f"{'layers':32s} {'parts':>6s} {'ranks':>10s} {'norm of the change':>20s}")
    for kind, parts in kinds.items():
        ranks = ", ".join(map(str, sorted({part.rank for part in parts})))
        change = sum(_norm(part) ** 2 for part in parts) ** 0.5
        print(f"{kind:32s} {len(parts):6d} {ranks:>10s} {change:20.4g}")


def _norm(part: Part) -> float:
    """Of ``scale * b @ a``, by the small products."""
    b, a = part.b.double(), part.a.double()
    return abs(part.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0)) ** 0.5


def convert(
    file: Positional[Path], destination: Positional[Path], format: Format, base: Path | None = None,
    dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Convert a LoRA file from one format to another, exactly.

    Args:
        file: A LoRA file in any of the formats.
        destination: A .safetensors file; for diffusers a folder will do.
        format: native (ours), diffusers, kohya or comfyui.
        base: Weights of its model, if they are none of the released ones.
        dtype: Of the result.
    """
    adapter, config = _read(file, base)
    print(f"wrote {save(adapter, destination, config, format=format, dtype=DTYPES[dtype])}")


def merged(
    base: Positional[Path], files: Positional[tuple[str, ...]], out: Path,
    layout: Literal["native", "sd3", "diffusers"] = "native", dtype: Dtype | None = None,
) -> None:  # fmt: skip
    """Add LoRA files to the weights of a model. In 16 bits small changes are lost: keep the files.

    Args:
        base: Weights in any layout.
        files: LoRA files, each as FILE or FILE:STRENGTH.
        out: A .safetensors file; a folder for diffusers.
        layout: native (ours), sd3 (the released single file) or diffusers.
        dtype: Of the result; as stored unless given.
    """
    opened = checkpoint.open_checkpoint(base)
    model = opened.model()
    for note in put_on(model, files):
        print(f"note: {note}")
    merge(model)
    kind = DTYPES[dtype] if dtype else None
    written = checkpoint.save(model, out, layout=layout, extra=opened.extra, dtype=kind)
    print("wrote " + ", ".join(map(str, written)))


def extract(
    tuned: Positional[Path], base: Positional[Path], destination: Positional[Path], rank: int = 32,
    format: Format = "native", dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Make a LoRA file of the difference between fine-tuned weights and their base.

    Args:
        tuned: Fine-tuned weights, in any layout.
        base: What they were fine-tuned from.
        destination: A .safetensors file; for diffusers a folder will do.
        rank: Of each low-rank part; the part of the difference beyond it is left out, and said.
        format: native (ours), diffusers, kohya or comfyui.
        dtype: Of the result.
    """
    one, two = checkpoint.open_checkpoint(tuned), checkpoint.open_checkpoint(base)
    if one.config != two.config:
        raise ValueError(f"{tuned} and {base} are models of two kinds: {one.config} and {two.config}")
    parts, left, whole = [], 0.0, 0.0
    for piece, other in tqdm(list(zip(one.pieces(), two.pieces(), strict=True)), desc="extract", disable=None):
        if len(piece.shape) != 2 or not piece.native.endswith(".weight"):
            continue
        difference = one.read(piece).double() - two.read(other).double()
        if not difference.any():
            continue
        layer, count = piece.native.removesuffix(".weight"), 3 if piece.native.endswith(".qkv.weight") else 1
        for i, rows in enumerate(difference.chunk(count)):
            part = extracted(layer, piece.first + i * len(rows), rows, rank)
            parts.append(part)
            whole += float(rows.square().sum())
            left += float((rows - part.delta()).square().sum())
    if not parts:
        raise ValueError(f"{tuned} and {base} have the same linear layers: there is nothing to extract")
    written = save(Adapter(parts), destination, one.config, format=format, dtype=DTYPES[dtype])
    print(f"wrote {written}: rank {rank} holds {1 - left / whole:.1%} of the squared difference")


def resize(
    file: Positional[Path], destination: Positional[Path], rank: int, format: Format | None = None,
    base: Path | None = None, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Make the ranks of a LoRA file smaller, by its largest singular values.

    Args:
        file: A LoRA file in any of the formats.
        destination: A .safetensors file; for diffusers a folder will do.
        rank: The largest rank of the result.
        format: native (ours), diffusers, kohya or comfyui; as it was unless given.
        base: Weights of its model, if they are none of the released ones.
        dtype: Of the result.
    """
    adapter, config = _read(file, base)
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1")
    parts = [part for layer in adapter.by_layer().values() for part in disjoint(layer)]
    smaller = [truncated(part, rank) if part.rank > rank else part for part in tqdm(parts, desc="resize", disable=None)]
    pairs = zip(parts, smaller, strict=True)
    left = sum(_norm(block) ** 2 for block in map(_difference, *zip(*pairs, strict=True)))
    whole = sum(_norm(part) ** 2 for part in parts)
    wanted = format or (adapter.format if adapter.format in formats.FORMATS else "native")
    written = save(
        Adapter(smaller, adapter.format, adapter.others), destination, config, format=wanted, dtype=DTYPES[dtype]
    )
    print(f"wrote {written}: rank {rank} holds {1 - left / max(whole, 1e-300):.1%} of the squared change")


def _difference(one: Part, two: Part) -> Part:
    """one - two, for their norm."""
    b = torch.cat([one.b.double() * one.scale, -two.b.double() * two.scale], 1)
    return Part(one.layer, one.first, torch.cat([one.a.double(), two.a.double()]), b)


PROG = "python -m mmdit lora"
NAMED: dict[str, Callable[..., Any]] = {
    "info": info, "convert": convert, "merge": merged, "extract": extract, "resize": resize,
}  # fmt: skip
COMMANDS = {name: commands.flags(function, f"{PROG} {name}") for name, function in NAMED.items()}


def lora(arguments: list[str]) -> None:
    """Look at LoRA files; convert, merge, extract and resize them."""
    commands.dispatch(PROG, "LoRA files of diffusers, kohya, ComfyUI and ours.", COMMANDS, arguments or ["--help"])
