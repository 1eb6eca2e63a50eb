"""Opening, loading, saving and converting checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmdit import numbers
from mmdit.checkpoint.layouts import LAYOUTS, OTHER_PARTS, POSITIONS, SD3_PREFIX, Piece, detect, infer, pieces
from mmdit.checkpoint.tensors import DTYPES, FP8, MAX_SHARD_BYTES, NAMES, Entry, Planned, Source, locate, write
from mmdit.config import MMDiTConfig
from mmdit.files import naming, read_object, sampled_digest, write_atomically
from mmdit.model import MMDiT

FORMAT = "rfkernels.mmdit"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass
class Checkpoint:
    """An opened checkpoint: what it is, without its weights having been read."""

    source: Source
    layout: str
    """One of "native", "sd3", "diffusers"."""
    prefix: str
    """Before the model's names."""
    config: MMDiTConfig
    extra: dict[str, Any]
    """What was saved beside the weights: how to sample, for one."""
    others: dict[str, int]
    """Tensors of other parts in the file (autoencoder, text encoders), counted by prefix."""

    def names(self) -> dict[str, Entry]:
        """The model's tensors, without the prefix."""
        return {
            name.removeprefix(self.prefix): entry
            for name, entry in self.source.entries.items()
            if name.startswith(self.prefix) and not name.startswith(OTHER_PARTS)
        }

    def pieces(self) -> list[Piece]:
        """Of the model, after a strict look at the names and shapes.

        Raises: ValueError that lists what is missing, unknown or misshaped."""
        found, shapes = pieces(self.config)
        wanted = {n: p.part_shape(self.layout) for p in found for n in p.names(self.layout)}
        if self.layout == "native":
            wanted = shapes
        have = {name: entry.shape for name, entry in self.names().items()}
        problems = [f"missing {name}" for name in wanted.keys() - have.keys()]
        problems += [f"unknown {name}" for name in have.keys() - wanted.keys()]
        problems += [
            f"{name} has shape {list(have[name])}, expected {list(shape)}"
            for name, shape in wanted.items()
            if name in have and have[name] != shape
        ]
        if problems:
            raise ValueError(f"{self.source.where} does not fit its configuration: " + "; ".join(sorted(problems)))
        return found

    def dtype(self) -> torch.dtype:
        """Of the weights, positions left aside; with some in fp8 that of the others, or bf16.

        Raises: ValueError if there are several, with a name of each."""
        positions = POSITIONS[LAYOUTS.index(self.layout)]
        examples = {e.dtype: n for n, e in self.names().items() if n != positions and e.dtype not in FP8}
        if not examples:
            return torch.bfloat16
        if len(examples) > 1:
            listed = ", ".join(f"{dtype} ({name})" for dtype, name in examples.items())
            raise ValueError(f"{self.source.where} mixes dtypes: {listed}; say which one is wanted (dtype=)")
        ((name, _),) = examples.items()
        if name not in DTYPES:
            self.source.read(self.prefix + examples[name])                   # names the tensor and says what to do
        return DTYPES[name]

    def read(self, piece: Piece, *, finite: bool = True) -> Tensor:
        """A piece as rows of our parameter. Raises: ValueError that names a tensor with NaN or infinities."""
        names, rows = piece.names(self.layout), None if self.layout != "native" else piece.shape[0]
        parts = [self.source.read(self.prefix + name, piece.first, rows) for name in names]
        for name, part in zip(names, parts, strict=True):
            if finite and part.numel() and not torch.isfinite(torch.stack(part.aminmax())).all():
                raise ValueError(f"{self.source.where}: tensor {self.prefix + name} holds NaN or infinities")
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return swap(whole) if piece.swapped and self.layout == "diffusers" else whole

    def model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, finite: bool = True
    ) -> MMDiT:
        """The model in evaluation mode. See `load`."""
        found, dtype = self.pieces(), dtype or self.dtype()
        with torch.device("meta"):
            model = MMDiT(self.config)
        state = {}
        for name, value in model.state_dict().items():
            kind = torch.float32 if name == POSITIONS[0] else dtype
            state[name] = torch.empty(value.shape, dtype=kind, device=device)
        for piece in found:
            state[piece.native][piece.first : piece.first + piece.shape[0]].copy_(self.read(piece, finite=finite))
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()


def swap(tensor: Tensor) -> Tensor:
    """(scale, shift) <-> (shift, scale)."""
    return torch.cat(tensor.chunk(2)[::-1])


def open_checkpoint(source: str | os.PathLike[str] | Mapping[str, Tensor], **known: Any) -> Checkpoint:
    """Looks at a checkpoint without reading its weights.

    Args:
        source: as for `load`. known: fields of MMDiTConfig that its tensors do not tell (heads without QK-norm).
    Raises: as `load`."""
    path = None if isinstance(source, Mapping) else locate(source)
    tensors = Source(source if path is None else path)
    layout, prefix = detect(tensors.entries, tensors.where)
    own = tensors.metadata.get("format") == FORMAT
    extra = _extra(tensors, own)
    others: dict[str, int] = {}
    for name in tensors.entries:
        if not name.startswith(prefix) or name.startswith(OTHER_PARTS):
            part = next((p for p in OTHER_PARTS if name.startswith(p)), None)
            if part is None:
                raise ValueError(f"{tensors.where}: tensor {name} belongs to nothing that is known")
            others[part] = others.get(part, 0) + 1
    if own:
        with naming(tensors.where):
            config = MMDiTConfig.from_dict({**_own(tensors, "config"), **known})
    elif layout == "native":
        if not known:
            raise ValueError(f"{tensors.where}: no configuration in its metadata; give its fields (depth=, ...)")
        config = MMDiTConfig.from_dict(known)
    else:
        shapes = {n.removeprefix(prefix): e.shape for n, e in tensors.entries.items() if n.startswith(prefix)}
        beside = {} if path is None else _config_beside(path)
        with naming(tensors.where):
            config = infer(layout, shapes, {**beside, **known}, tensors.where)
    return Checkpoint(tensors, layout, prefix, config, extra, others)


def _extra(tensors: Source, own: bool) -> dict[str, Any]:
    """What is kept beside weights of ours, in any layout; a key of that name that somebody else wrote is none."""
    try:
        return _own(tensors, "extra") if "extra" in tensors.metadata else {}
    except ValueError:
        if own:
            raise
        return {}


def _own(tensors: Source, name: str) -> dict[str, Any]:
    """JSON of our own layout's metadata. Raises: ValueError that names the file."""
    try:
        found = json.loads(tensors.metadata[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{tensors.where}: its metadata holds no {name} that can be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"{tensors.where}: {name} in its metadata is {type(found).__name__}; expected an object")
    return found


def _config_beside(path: Path) -> dict[str, Any]:
    """Of a diffusers folder what the tensors do not tell."""
    file = path.with_name("config.json")
    if not file.is_file():
        return {}
    values = read_object(file)
    if values.get("_class_name", "SD3Transformer2DModel") != "SD3Transformer2DModel":
        raise ValueError(f"{file} describes a {values['_class_name']}; expected SD3Transformer2DModel")
    names = {"num_attention_heads": "heads", "attention_head_dim": "head_dim"}
    for name in names.keys() & values.keys():
        numbers.whole(f"{file}: {name}", values[name], 1)
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    finite: bool = True,
    **known: Any,
) -> MMDiT:
    """A model from weights in any of the three layouts.

    Args:
        source: a .safetensors file (a released single file may hold the autoencoder and text encoders too), an index of
            shards, a folder (a diffusers transformer or pipeline, or ours), or a state dict.
        device, dtype: of the weights; their own dtype unless given. Positions are always fp32.
        finite: refuse weights with NaN or infinities (reads each once).
        known: fields of MMDiTConfig that neither tensors nor config.json tell (heads without QK-norm).
    Returns: the model in evaluation mode.
    Raises: FileNotFoundError; ValueError for a pickle, a truncated or foreign file, mixed layouts or dtypes, and
        tensors that are missing, unknown, misshaped or not finite: by name.

    >>> model = load("sd3.5_medium.safetensors", dtype=torch.bfloat16)                              # doctest: +SKIP
    """
    return open_checkpoint(source, **known).model(device, dtype, finite=finite)


def fingerprint(source: str | os.PathLike[str]) -> str:
    """Of a checkpoint's files: their headers and a thousandth of their bytes, evenly spread."""
    path = locate(source)
    return sampled_digest(Source.shards(path) if path.suffix == ".json" else [path])


# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    model: MMDiT,
    path: str | os.PathLike[str],
    *,
    layout: str = "native",
    weights: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes a model, atomically file by file.

    Args:
        path: a .safetensors file; for diffusers a folder, which gets a config.json.
        layout: "native", "sd3" or "diffusers".
        weights: instead of the model's own (an average of them).
        extra: JSON kept in the metadata.
        dtype: of the weights on disk; as they are unless given.
        max_shard_bytes: beyond, shards and an index are written.
    Returns: the files written.
    Raises: ValueError for an unknown layout, or a model that has no such layout.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = save(mmdit.MMDiT(mmdit.presets.tiny()), f"{folder}/model.safetensors")
    ...     [file.name for file in files], load(f"{folder}/model.safetensors").config.depth
    (['model.safetensors'], 2)
    """
    state = model.state_dict() if weights is None else weights
    opened = Checkpoint(Source(state), "native", "", model.config, dict(extra or {}), {})
    return _write(opened, path, layout, dtype, max_shard_bytes, None)


def convert(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    layout: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
    **known: Any,
) -> list[Path]:
    """From one layout to another, tensor by tensor: the memory of a tensor serves for a model of any size.

    Args: as for `load` and `save`. Returns: the files written. Raises: as they do.

    >>> convert("sd3.5_medium.safetensors", "sd3.5-medium", layout="diffusers")                     # doctest: +SKIP
    """
    return _write(open_checkpoint(source, **known), path, layout, dtype, max_shard_bytes, progress)


def _write(
    opened: Checkpoint, path: str | os.PathLike[str], layout: str, dtype: torch.dtype | None, most: int,
    progress: bool | None,
) -> list[Path]:  # fmt: skip
    if layout not in LAYOUTS:
        raise ValueError(f"checkpoint: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    config, path = opened.config, Path(path)
    if layout != "native":
        rows, columns = config.max_tokens
        if config.weight_sets != 2 or config.backbone != "joint" or rows != columns:
            raise ValueError(
                f"checkpoint: layout {layout!r} is for joint blocks with two weight sets and a square position "
                f"table; the model has {config.backbone}, {config.weight_sets} and {rows} x {columns}"
            )
    found = opened.pieces()
    bar = tqdm(total=len(found), desc=f"{opened.layout} -> {layout}", disable=not progress)

    def read(piece: Piece) -> Tensor:
        tensor = opened.read(piece, finite=progress is not None)
        bar.update()
        return tensor

    own = NAMES[dtype or opened.dtype()]
    kind = lambda piece: "F32" if piece.native == POSITIONS[0] else own  # noqa: E731
    plan = _native_plan(found, read, kind) if layout == "native" else _plan(found, read, kind, layout)
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "extra": json.dumps(opened.extra)}
    if layout == "diffusers":
        path.mkdir(parents=True, exist_ok=True)
        written = write(path / DIFFUSERS_FILE, plan, {**metadata, "format": "pt"}, most)
        write_atomically(path / "config.json", json.dumps(diffusers_config(config), indent=2).encode())
        written.append(path / "config.json")
    else:
        written = write(path, plan, metadata, most)
    bar.close()
    return written


def _native_plan(found: list[Piece], read: Any, kind: Any) -> dict[str, Planned]:
    by_name: dict[str, list[Piece]] = {}
    for piece in found:
        by_name.setdefault(piece.native, []).append(piece)

    def parts(pieces_of_it: list[Piece]) -> Iterator[Tensor]:
        return (read(piece) for piece in pieces_of_it)

    plan = {}
    for name, group in by_name.items():
        shape = (sum(p.shape[0] for p in group), *group[0].shape[1:])
        plan[name] = Planned(Entry(shape, kind(group[0])), partial(parts, group))
    return plan


def _plan(found: list[Piece], read: Any, kind: Any, layout: str) -> dict[str, Planned]:
    def part(piece: Piece, i: int, count: int) -> Iterator[Tensor]:
        whole = read(piece)
        yield (swap(whole) if piece.swapped and layout == "diffusers" else whole).chunk(count)[i]

    prefix, plan = SD3_PREFIX if layout == "sd3" else "", {}
    for piece in found:
        names = piece.names(layout)
        for i, name in enumerate(names):
            entry = Entry(piece.part_shape(layout), kind(piece))
            plan[prefix + name] = Planned(entry, partial(part, piece, i, len(names)))
    return plan


def diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of diffusers' SD3Transformer2DModel."""
    side = config.max_tokens[0]
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": min(side, config.resolution // config.token_pixels) * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.input_channels,
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_dim,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": side,
        "dual_attention_layers": list(config.dual_attention),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
