"""Tensors on disk: read by name when asked for, written one after another, so that a model of any size passes through
the memory of one of its tensors. Only safetensors: no pickle is ever loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdit.files import read_object, replacing, write_atomically

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Read as fp32, never written."""
SCALES, ASIDE = ("scale_weight", "weight_scale"), ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")
"""What ComfyUI keeps beside `x.weight` in fp8: x.scale_weight, a number it is to be multiplied by (x.weight_scale in
newer files), and what only computing in fp8 needs."""
STEMS = ("model", "diffusion_pytorch_model")      # of the files of a folder
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it."""

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


class Source:
    """Named tensors of a file, of shards or of a dictionary.

    Args: source: a .safetensors file, the index of shards, or a state dict.
    Raises: FileNotFoundError; ValueError for a pickle, a truncated file, a missing shard or a broken index."""

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, Any] = {}
        self._tensors = source if isinstance(source, Mapping) else None
        if self._tensors is not None:
            self.where, names = "the state dict", {**NAMES, **{dtype: name for name, dtype in FP8.items()}}
            for name, tensor in self._tensors.items():
                self.entries[name] = Entry(tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
            self._scales = self._take_scales()
            return
        path = Path(source)                                                                        # type: ignore[arg-type]
        self.where = str(path)
        for shard in [path] if path.suffix != ".json" else self.shards(path):
            file = _open(shard)
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in self._files:
                    raise ValueError(f"{path}: tensor {name} is in two shards")
                view = file.get_slice(name)
                self.entries[name], self._files[name] = Entry(tuple(view.get_shape()), view.get_dtype()), file
        if path.suffix == ".json":
            self._check_index(path)
        self._scales = self._take_scales()

    def _take_scales(self) -> dict[str, str]:
        """Of weights in fp8 the names of their scales. These, and the rest of ASIDE, are no tensors of a model."""
        found: dict[str, str] = {}
        for name, entry in self.entries.items():
            stem = name.removesuffix("weight")
            scales = [stem + scale for scale in SCALES if stem + scale in self.entries]
            if entry.dtype in FP8 and stem != name and scales:
                found[name] = scales[0]
        for name, scale in found.items():
            if torch.Size(self.entries.pop(scale).shape).numel() != 1:
                raise ValueError(f"{self.where}: {scale}, of {name}, is not one number; other scalings are not known")
        if any(entry.dtype in FP8 for entry in self.entries.values()):
            for name in [name for name in self.entries if name.rpartition(".")[2] in ASIDE]:
                del self.entries[name]
        return found

    @staticmethod
    def shards(index: Path) -> list[Path]:
        """The files that an index names. Raises: ValueError, FileNotFoundError."""
        try:
            names = list(read_object(index)["weight_map"].values())
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("its shards are no names of files beside it")
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards: {type(error).__name__} {error}") from error
        paths = [index.with_name(name) for name in dict.fromkeys(names)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
        return paths

    def _check_index(self, index: Path) -> None:
        named = json.loads(index.read_text())["weight_map"]
        absent = [name for name in named if name not in self.entries]
        if absent:
            raise ValueError(f"{index} names tensors that its shards do not hold: {', '.join(absent[:5])}")

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """A tensor, or `rows` rows of it from `first` on; of fp8 in fp32, scaled.

        Raises: ValueError for a dtype that is no weight's."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES | FP8:
            raise ValueError(
                f"{self.where}: tensor {name} has dtype {entry.dtype}; expected one of {', '.join(DTYPES | FP8)}: "
                "weights quantised otherwise have to be cast first"
            )
        if entry.dtype not in FP8:
            return self._raw(name, first, rows)
        scale = float(self._raw(self._scales[name])) if name in self._scales else 1.0
        return self._raw(name, first, rows).float() * scale

    def _raw(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        if self._tensors is not None:
            tensor = self._tensors[name].detach()
            return tensor if rows is None else tensor[first : first + rows]
        file = self._files[name]
        try:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[first : first + rows]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.where}: tensor {name} cannot be read: {error}") from error


def _open(path: Path) -> Any:
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code when it is loaded; expected safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def variant(folder: Path) -> str | None:
    """Of weights that a folder holds in a variant alone, as in model.fp16.safetensors, its name; None of others.

    Raises: ValueError if there are several."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if any(f"{stem}.safetensors{end}" in names for stem in STEMS for end in ("", ".index.json")):
        return None
    one = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)")
    found = sorted({match[1] or match[2] for name in names if (match := one.fullmatch(name))})
    if len(found) > 1:
        raise ValueError(f"{folder} holds the variants {', '.join(found)}; expected one, or none")
    return found[0] if found else None


def locate(source: str | os.PathLike[str]) -> Path:
    """The file or index to read for a path: itself, or what a folder holds; a pipeline's folder holds a transformer.

    Raises: FileNotFoundError; ValueError for a folder that holds pickles only."""
    path = Path(source)
    if not path.is_dir():
        index = path.with_name(path.name + ".index.json")
        return index if index.is_file() and not path.is_file() else path
    if (path / "transformer").is_dir():
        path = path / "transformer"
    kind = variant(path)
    for stem in STEMS:
        one, many = (f".{kind}", f".{kind}.json") if kind else ("", ".json")
        for name in (f"{stem}{one}.safetensors", f"{stem}.safetensors.index{many}"):
            if (path / name).is_file():
                return path / name
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return single[0]
    pickles = [p.name for p in path.iterdir() if p.suffix in PICKLES]
    if pickles:
        listed = ", ".join(pickles[:3])
        raise ValueError(f"{path} holds pickles only ({listed}), which can run code; expected safetensors")
    raise FileNotFoundError(f"{path} holds no model.safetensors, diffusion_pytorch_model.safetensors or their index")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its entry, and its parts along the first dimension, made when they are asked for."""

    entry: Entry
    parts: Callable[[], Iterator[Tensor]]


def write(
    path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str], most: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Writes tensors to `path`, or, if they are more than `most` bytes, to numbered shards and an index beside it, each
    atomically and the index last. A part is in memory at a time, which the library's `save_file` cannot do.

    Returns: the files, in order."""
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.entry.bytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.entry.bytes
    if len(shards) == 1:
        _write_one(path, tensors, metadata)
        return [path]
    paths = [path.with_name(f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    for shard_path, shard in zip(paths, shards, strict=True):
        _write_one(shard_path, shard, metadata)
    index = path.with_name(path.name + ".index.json")
    total = sum(t.entry.bytes for t in tensors.values())
    where = {name: p.name for p, shard in zip(paths, shards, strict=True) for name in shard}
    write_atomically(index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode())
    return [*paths, index]


def _write_one(path: Path, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """The format: length of the header, the header in JSON, padded to 8 bytes, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        entry = tensor.entry
        end = offset + entry.bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            _write_parts(file, name, tensor)


def _write_parts(file: BinaryIO, name: str, tensor: Planned) -> None:
    start = file.tell()
    for part in tensor.parts():
        file.write(part.to(DTYPES[tensor.entry.dtype]).cpu().reshape(-1).view(torch.uint8).numpy().data)
    written = file.tell() - start
    assert written == tensor.entry.bytes, f"{name}: {written} bytes, planned {tensor.entry.bytes}"
