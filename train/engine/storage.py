"""Checkpoints of torch.distributed.checkpoint whose table of contents is JSON. Its own is a pickle, and reading one of
somebody else's runs what they put there. Tensors are read with weights_only, which runs nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmdit.files import read_json, write_atomically

CONTENTS = "contents.json"
FORMER = ".metadata"         # of checkpoints from before: a pickle
METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
                                    "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (FILES, "_StorageInfo"), (FILES, "_StoragePrefix"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
}  # fmt: skip
"""What a former table of contents is made of. None of it does anything but hold values."""


class Writer(FileSystemWriter):
    """Writes CONTENTS instead of a pickle."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):         # why a write failed, which torch.save's own error hides
                raise error.__context__ from None
            raise

    def finish(self, metadata: Metadata, results: Any) -> None:
        places = {written.index: written.storage_data for one in results for written in one}
        write_atomically(Path(self.path) / CONTENTS, json.dumps(_as_json(metadata, places)).encode())


class Reader(FileSystemReader):
    """Reads CONTENTS, or what was there before it, by an unpickler that knows nothing but its own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        metadata = _from_json(folder / CONTENTS) if (folder / CONTENTS).is_file() else _former(folder / FORMER)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _as_json(metadata: Metadata, places: dict[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    tensors = {}
    for name, held in metadata.state_dict_metadata.items():
        if not isinstance(held, TensorStorageMetadata):
            raise TypeError(f"checkpoint: {name} is no tensor")
        chunks = [[list(chunk.offsets), list(chunk.sizes)] for chunk in held.chunks]
        dtype = str(held.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(held.size), "chunks": chunks}
    listed = [
        [at.fqn, at.offset and list(at.offset), at.index, place.relative_path, place.offset, place.length]
        for at, place in places.items()
    ]
    return {"version": 1, "tensors": tensors, "places": listed, "paths": metadata.planner_data}


def _from_json(path: Path) -> Metadata:
    """Raises: ValueError that names the file."""
    said = read_json(path)
    try:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, held["dtype"])), torch.Size(held["size"]),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in held["chunks"]],
            )
            for name, held in said["tensors"].items()
        }  # fmt: skip
        places = {
            MetadataIndex(name, offset, index): _StorageInfo(_inside(file), start, length)
            for name, offset, index, file, start, length in said["places"]
        }
        paths = {name: tuple(parts) for name, parts in said["paths"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of contents of a checkpoint ({error})") from error
    return Metadata(tensors, paths, places)                                                      # type: ignore[arg-type]


def _inside(file: str) -> str:
    """A name without a way out of the checkpoint's folder."""
    if Path(file).name != file:
        raise ValueError(f"it names {file!r}")
    return file


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}, which is no part of a checkpoint")


def _former(path: Path) -> Metadata:
    with path.open("rb") as file:
        found: Metadata = _Unpickler(file).load()
    return found
