"""LoRA files in the formats that people exchange, read and written by the checkpoints' own table of names.

| format | a module's name | tensors | its strength |
|---|---|---|---|
| native | ours, with the rows: `blocks.0.image.attn.qkv[0:1536]` | lora_a, lora_b | 1 |
| diffusers | transformer. + diffusers' | lora_A.weight, lora_B.weight | metadata (lora_adapter_metadata), or 1 |
| kohya | lora_unet_ + the released, dots as underscores | lora_down.weight, lora_up.weight | .alpha / rank |
| comfyui | diffusion_model. + the released | lora_A.weight, lora_B.weight | .alpha / rank |

This file has the names and reads; writing.py writes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit import presets
from mmdit.adapters.parts import Adapter, Part
from mmdit.checkpoint.layouts import pieces
from mmdit.checkpoint.store import fingerprint, swap
from mmdit.checkpoint.tensors import Source
from mmdit.config import MMDiTConfig
from mmdit.files import naming

FORMATS = ("native", "diffusers", "kohya", "comfyui")
NATIVE = "rfkernels.lora"
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
"""How A and B are called, by format and age."""
TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "text_encoders.", "lora_te")
REFUSED = (
    (r"\.(dora_scale|lora_magnitude_vector)", "DoRA, whose weights are normalised: merge it with what made it"),
    (r"\.hada_w", "LoHa, which is no low-rank product: merge it with what made it"),
    (r"\.lokr_w", "LoKr, which is no low-rank product: merge it with what made it"),
    (r"\.lora_mid\.weight", "a convolution's LoRA in three parts"),
    (r"\.(diff|diff_b|set_weight|reshape_weight|w_norm|b_norm)$", "whole weights beside low-rank ones"),
    (r"\.lora_B\.bias", "LoRA with a bias"),
)
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Place:
    """Where a module of another layout stands in ours."""

    layer: str
    first: int
    rows: int
    columns: int
    swapped: bool
    """The halves of its rows change places."""


def places(config: MMDiTConfig, layout: str) -> dict[str, Place]:
    """The linear layers of a layout ("sd3" or "diffusers") by their names. Of a model with reference tokens, those
    of the model that it was made from: other layouts have no more."""
    found = {}
    for piece in pieces(replace(config, reference_tokens=False))[0]:
        if not piece.native.endswith(".weight") or len(piece.shape) != 2:
            continue
        names = piece.names(layout)
        rows, layer = piece.shape[0] // max(1, len(names)), piece.native.removesuffix(".weight")
        for i, name in enumerate(names):
            swapped = piece.swapped and layout == "diffusers"
            place = Place(layer, piece.first + i * rows, rows, piece.shape[1], swapped)
            found[name.removesuffix(".weight")] = place
    return found


def spelled(config: MMDiTConfig) -> dict[str, tuple[str, Place]]:
    """(format, place) of every way to name a module."""
    found: dict[str, tuple[str, Place]] = {}
    for name, place in places(config, "sd3").items():
        found[f"lora_unet_{name.replace('.', '_')}"] = "kohya", place
        for prefix in ("diffusion_model.", "model.diffusion_model.", ""):
            found[prefix + name] = "comfyui", place
    for name, place in places(config, "diffusers").items():
        for prefix in ("transformer.", "base_model.model.", ""):
            found[prefix + name] = "diffusers", place
        for prefix in ("lora_transformer_", "lycoris_"):
            found[prefix + name.replace(".", "_")] = "diffusers", place
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def read(source: str | os.PathLike[str] | Mapping[str, Tensor], config: MMDiTConfig | None = None) -> Adapter:
    """A LoRA file in any of the formats.

    Args:
        source: a .safetensors file, a folder with pytorch_lora_weights.safetensors, or a state dict.
        config: of the model that it is for; told by its metadata or found among the released models unless given.
    Raises: FileNotFoundError; ValueError that names every tensor which is not understood, has no partner, holds NaN or
        belongs to another kind of adapter: a file is read whole or not at all.

    >>> adapter = read("style.safetensors")                                                         # doctest: +SKIP
    >>> adapter.format, adapter.notes                                                               # doctest: +SKIP
    ('kohya', [])
    """
    file = Source(source if isinstance(source, Mapping) else _file(source))
    _refuse_others(file)
    if file.metadata.get("format") == NATIVE:
        return _native(file)
    modules, others = _modules(file)
    if not modules:
        said = f": {len(others)} tensors are for text encoders" if others else ""
        raise ValueError(f"{file.where} is no LoRA that can be read: no low-rank tensors for the model{said}")
    config = config or _among_released(modules, file)
    known = spelled(config)
    problems = [f"unknown module {name}" for name in modules if name not in known]
    adapter, peft = Adapter([], others=others), _peft(file)
    used: set[str] = set()
    for name, tensors in modules.items():
        if name not in known:
            continue
        own, place = known[name]
        used.add(own)
        problem, part = _part(name, tensors, place, peft)
        problems += [problem] if problem else []
        adapter.parts += [part] if part else []
    if problems:
        raise ValueError(f"{file.where} is no LoRA that can be read: " + "; ".join(problems[:20]))
    adapter.format = " and ".join(sorted(used))
    if others:
        adapter.notes.append(f"{len(others)} tensors for text encoders are kept, not used: {next(iter(others))}, ...")
    return _mend_split_qkv(adapter, file.metadata)


def _file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    return path / DIFFUSERS_FILE if path.is_dir() else path


def config_of(source: str | os.PathLike[str]) -> MMDiTConfig | None:
    """Of the model that a file of ours says it is for."""
    text = Source(_file(source)).metadata.get("config")
    return None if text is None else MMDiTConfig.from_dict(json.loads(text))


def released(source: str | os.PathLike[str]) -> MMDiTConfig:
    """The released model that a file of another program is for, by its names and sizes. Raises: ValueError."""
    file = Source(_file(source))
    return _among_released(_modules(file)[0], file)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an adapter of ours."""
    return Source(path).metadata.get("format") == NATIVE


def about(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """(where the base of an adapter lies, how to sample) of a file that training wrote.

    Raises: FileNotFoundError or ValueError if the base is not there or another."""
    file = Source(path)
    try:
        base, extra = (json.loads(file.metadata[name]) for name in ("base", "extra"))
        where, wanted = Path(base["path"]), base["base"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say which model it is for: load it on one (--lora)") from error
    if not where.exists():
        raise FileNotFoundError(f"{path} is an adapter of {where}, which is not there")
    if (found := fingerprint(where)) != wanted:
        raise ValueError(f"{path} is an adapter of the weights {wanted}; {where} holds {found}")
    return where, extra


def _refuse_others(file: Source) -> None:
    for pattern, what in REFUSED:
        for name in file.entries:
            if re.search(pattern, name):
                raise ValueError(f"{file.where}: tensor {name} is of {what}")
    if _peft(file).get("use_dora"):
        raise ValueError(f"{file.where} says use_dora: DoRA, whose weights are normalised, cannot be read")


def _modules(file: Source) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Of each module its tensors "a", "b" and "alpha"; and what is for text encoders."""
    ends = {end: kind for pair in PAIRS for end, kind in zip(pair, "ab", strict=True)} | {".alpha": "alpha"}
    modules: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    unknown = []
    for name in file.entries:
        if name.startswith(TEXT):
            others[name] = file.read(name)
            continue
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            unknown.append(name)
        else:
            modules.setdefault(name.removesuffix(end), {})[ends[end]] = file.read(name)
    if unknown:
        raise ValueError(f"{file.where} is no LoRA that can be read: unknown " + ", ".join(sorted(unknown)[:20]))
    return modules, others


def _among_released(modules: Mapping[str, dict[str, Tensor]], file: Source) -> MMDiTConfig:
    """The released model whose layers have these names and sizes."""
    for config in (presets.sd35_medium(), presets.sd3_medium(), presets.sd35_large()):
        known = spelled(config)
        if all(name in known and _fits(tensors, known[name][1]) for name, tensors in modules.items()):
            return config
    first = ", ".join(list(modules)[:3])
    raise ValueError(
        f"{file.where} fits none of the released models (sd3-medium, sd3.5-medium, sd3.5-large) by its names and sizes "
        f"({first}, ...); give the weights of its base model"
    )


def _fits(tensors: Mapping[str, Tensor], place: Place) -> bool:
    a, b = tensors.get("a"), tensors.get("b")
    return a is None or b is None or (a.shape[-1], b.shape[0]) == (place.columns, place.rows)


def _part(
    name: str, tensors: Mapping[str, Tensor], place: Place, peft: Mapping[str, Any]
) -> tuple[str | None, Part | None]:
    """(what is wrong, nothing) or (nothing, the part)."""
    if not {"a", "b"} <= tensors.keys():
        return f"{name} has {' and '.join(sorted(tensors))} alone", None
    a, b = tensors["a"], tensors["b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or not _fits(tensors, place):
        wanted = f"[r, {place.columns}] and [{place.rows}, r]"
        return f"{name} has shapes {list(a.shape)} and {list(b.shape)}, expected {wanted}", None
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        return f"{name} holds NaN or infinities", None
    rank = a.shape[0]
    if "alpha" in tensors:
        alpha = float(tensors["alpha"])
        scale = alpha / rank if alpha else 1.0                                  # kohya: an alpha of 0 is none
    else:
        scale = _peft_scale(name, rank, peft)
    if not math.isfinite(scale):
        return f"{name} has an alpha that is no number", None
    return None, Part(place.layer, place.first, a, swap(b) if place.swapped else b, scale)


def _peft(file: Source) -> dict[str, Any]:
    """The transformer's part of what diffusers keeps of PEFT's configuration. Raises: ValueError."""
    if METADATA not in file.metadata:
        return {}
    with naming(file.where):
        found = json.loads(file.metadata[METADATA])
        if not isinstance(found, dict):
            raise ValueError(f"{METADATA} is {type(found).__name__}; expected an object")
        own = {key.removeprefix("transformer."): value for key, value in found.items()}
        for key in ("alpha_pattern", "rank_pattern"):
            for pattern in own.get(key) or {}:
                if re.search(r"[^\w.\\\-^$]", pattern):      # regular expressions to PEFT; here names of modules
                    raise ValueError(f"{key} has {pattern!r}, which is no module's name")
        return own


def _peft_scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank as PEFT has it: a pattern names the end of a module's name."""
    if not config:
        return 1.0
    name = name.removeprefix("transformer.")

    def patterned(key: str, default: Any) -> Any:
        patterns = config.get(key) or {}
        return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)

    alpha = patterned("alpha_pattern", config.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        return math.nan
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _mend_split_qkv(adapter: Adapter, metadata: Mapping[str, str]) -> Adapter:
    """kohya's trainer, asked for q, k and v apart, writes them block-diagonally with three times the rank but leaves
    alpha as it was (sd-scripts issue 2204): who reads the file applies a third of what was trained."""
    arguments = metadata.get("ss_network_args", "").lower().replace(" ", "")
    if not re.search(r'"split_qkv":"?true', arguments):
        return adapter
    mended = 0
    for i, part in enumerate(adapter.parts):
        if part.layer.endswith(".qkv") and part.rank % 3 == 0 and _is_block_diagonal(part.b):
            adapter.parts[i] = Part(part.layer, part.first, part.a, part.b, 3 * part.scale)
            mended += 1
    if mended:
        adapter.notes.append(
            f"trained with split_qkv: alpha of {mended} layers of q, k and v is a third of what was trained with "
            "(sd-scripts issue 2204); read as trained. Other programs apply a third there"
        )
    return adapter


def _is_block_diagonal(b: Tensor) -> bool:
    rows, rank = b.shape[0] // 3, b.shape[1] // 3
    blocks = b.unflatten(0, (3, rows)).unflatten(2, (3, rank))                        # [part, rows, part, rank]
    return all(not blocks[i, :, j].any() for i in range(3) for j in range(3) if i != j)


def _native(file: Source) -> Adapter:
    tensors: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    problems = []
    for name in file.entries:
        if match := re.fullmatch(r"(.+)\[(\d+):(\d+)\]\.lora_(a|b)", name):
            layer, first, end, which = match.groups()
            tensors.setdefault((layer, int(first), int(end)), {})[which] = file.read(name)
        else:
            problems.append(f"unknown {name}")
    parts = []
    for (layer, first, end), pair in tensors.items():
        place, name = Place(layer, first, end - first, 0, False), f"{layer}[{first}:{end}]"
        if pair.keys() == {"a", "b"}:
            place = Place(layer, first, end - first, pair["a"].shape[-1], False)
        problem, part = _part(name, pair, place, {})
        problems += [problem] if problem else []
        parts += [part] if part else []
    if problems or not parts:
        raise ValueError(f"{file.where} is no LoRA that can be read: {'; '.join(problems[:20]) or 'it holds none'}")
    return Adapter(parts)
