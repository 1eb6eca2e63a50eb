"""The cache between precompute and training: safetensors shards, their captions, and an index that vouches for them.

    CACHE/index.json                    settings, their fingerprint, each shard's size and checksum
    CACHE/blocks/00000.json             what came of the first records of the source (train/data/blocks.py)
    CACHE/train/32x32/00000.safetensors latents [n, C, h, w] bf16; ids [n]; per encoder e: e.tokens [sum of lengths,
                                        dim] bf16 without padding, e.offsets [n + 1], e.pooled [n, pooled_dim] bf16
    CACHE/train/32x32/00000.jsonl       {"id", "key", "caption"} per sample, "stamp" and "digest" of a picture's file
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdit import numbers
from mmdit.autoencoder import Unit
from mmdit.encoders import TextFeatures, fingerprint
from mmdit.files import read_lines, read_object, write_atomically
from train.data.records import DataError

VERSION = 2
INDEX = "index.json"


@dataclass
class Sample:
    """One image and caption, encoded."""

    id: int
    key: str
    caption: str
    latent: Tensor
    features: list[TextFeatures]
    """One per encoder."""
    file: dict[str, str] = field(default_factory=dict)
    """Of a picture that came as a file: "stamp", its size and time, and "digest", of its bytes: see `records`."""


@dataclass
class Index:
    """What a cache holds. `settings` is everything that decides the contents; see `fingerprint`."""

    settings: dict[str, Any]
    complete: bool = False
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """"train/32x32" -> [{"file", "samples", "bytes", "sha256"}]"""

    @property
    def fingerprint(self) -> str:
        return fingerprint({"version": VERSION, **self.settings})

    def save(self, cache: Path) -> None:
        body = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "complete": self.complete,
            "settings": self.settings,
            "shards": self.shards,
        }
        write_atomically(cache / INDEX, json.dumps(body, indent=1).encode())

    @classmethod
    def load(cls, cache: Path) -> Index:
        """Raises: DataError if there is no index, or it is damaged or of another version."""
        path = cache / INDEX
        if not path.is_file():
            raise DataError(f"{cache} is not a precomputed cache (no {INDEX}); make it with python -m train precompute")
        try:
            body = read_object(path)
            index = cls(body["settings"], body["complete"], body["shards"])
            written = (body["version"], body["fingerprint"])
            _check_entries(body["shards"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); precompute again into an empty folder") from error
        if written != (VERSION, index.fingerprint):
            raise DataError(
                f"{path}: fingerprint {written[1]} (version {written[0]}) does not match its settings "
                f"({index.fingerprint}, version {VERSION}): the cache is stale; precompute again into an empty folder"
            )
        return index


def _check_entries(shards: dict[str, list[dict[str, Any]]]) -> None:
    """Raises: KeyError, TypeError, AttributeError or ValueError unless it lists shards by bucket."""
    for bucket, entries in shards.items():
        for entry in entries:
            if not isinstance(entry["file"], str) or not isinstance(entry["sha256"], str):
                raise TypeError(f"a shard of {bucket} without a name")
            for name in ("bytes", "samples"):
                numbers.whole(f"{name} of {entry['file']}", entry[name], 0)


def write_shard(cache: Path, file: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Writes CACHE/file and its captions. Returns: its entry for an index."""
    tensors = {
        "latents": torch.stack([s.latent for s in samples]).to(torch.bfloat16),
        "ids": torch.tensor([s.id for s in samples]),
    }
    for e, features in enumerate(zip(*(s.features for s in samples), strict=True)):
        lengths = torch.tensor([0] + [len(f.tokens) for f in features])
        tensors[f"{e}.tokens"] = torch.cat([f.tokens for f in features]).to(torch.bfloat16)
        tensors[f"{e}.offsets"] = lengths.cumsum(0)
        tensors[f"{e}.pooled"] = torch.stack([f.pooled for f in features]).to(torch.bfloat16)
    captions = "".join(json.dumps({"id": s.id, "key": s.key, "caption": s.caption, **s.file}) + "\n" for s in samples)
    write_atomically((cache / file).with_suffix(".jsonl"), captions.encode())
    content = save(tensors)
    write_atomically(cache / file, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return {"file": file, "samples": len(samples), "bytes": len(content), "sha256": sha256}


def captions_of(shard: Path) -> list[dict[str, Any]]:
    """{"id", "key", "caption", ...} of each sample. Raises: DataError."""
    file = shard.with_suffix(".jsonl")
    try:
        found = [json.loads(line) for line in read_lines(file)]
        if all({"id", "key", "caption"} <= entry.keys() for entry in found):
            return found
        reason = "an entry lacks id, key or caption"
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        reason = str(error)
    raise DataError(f"{file} is damaged ({reason}): run python -m train verify --repair, then precompute again")


class Cache:
    """A complete cache, opened for reading.

    Raises: DataError if the index is missing, stale or unfinished, or a shard is missing or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = Index.load(self.path)
        if not self.index.complete:
            raise DataError(f"{self.path}: precompute did not finish; run the same command again to resume")
        for entry in self._entries():
            file = self.path / entry["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                came = "is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{file} {came}; the index says {entry['bytes']} bytes: restore it, or run python -m train verify "
                    f"--repair {self.path} and precompute again"
                )

    def _entries(self) -> Iterator[dict[str, Any]]:
        for entries in self.index.shards.values():
            yield from entries

    @property
    def settings(self) -> dict[str, Any]:
        return self.index.settings

    @property
    def contents(self) -> str:
        """Changes whenever a sample does."""
        return fingerprint({"shards": [[e["file"], e["sha256"]] for e in self._entries()]})

    def buckets(self, split: str) -> dict[str, Bucket]:
        """Buckets of "train" or "val", by size ("32x32")."""
        return {
            name.split("/")[1]: Bucket([self.path / e["file"] for e in entries], [e["samples"] for e in entries])
            for name, entries in sorted(self.index.shards.items())
            if name.startswith(split + "/")
        }


STATISTICS = 4096       # samples that are looked at, at most


def unit_of(cache: Cache) -> Unit:
    """What scales the training latents to mean 0 and deviation 1 over all channels: of samples at equal distances, so
    that it is the same wherever it is computed."""
    buckets = cache.buckets("train").values()
    step = max(1, sum(len(b) for b in buckets) // STATISTICS)
    total, squares, count = 0.0, 0.0, 0
    for bucket in buckets:
        for row in range(0, len(bucket), step):
            latent = bucket[row].latent.double()
            total, count = total + float(latent.sum()), count + latent.numel()
            squares += float(latent.square().sum())
    mean = total / count
    variance = squares / count - mean**2
    if variance < 1e-12:
        raise DataError(f"{cache.path}: all latents are {mean:g}; there is nothing to scale to unit size")
    return Unit(mean, variance**0.5)


def damage(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a shard whose entry in the index is this; None: nothing."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size} bytes, the index says {entry['bytes']}"
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        return "its checksum differs from the index"
    try:
        captions = captions_of(path)
    except DataError:
        captions = []
    if len(captions) != entry["samples"]:
        return f"its captions in {path.with_suffix('.jsonl').name} are missing, damaged or cut off"
    return None


class Bucket:
    """All samples of one split and image size, as rows 0 .. len - 1 across its shards."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self.files = list(files)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._open = lru_cache(maxsize=64)(self._open_shard)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _open_shard(self, number: int) -> dict[str, Tensor]:
        """Its tensors, mapped: they are read from the disk as they are used."""
        try:
            with safe_open(self.files[number], framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.files[number]}: not a complete shard ({error})") from error

    def __getitem__(self, row: int) -> Sample:
        """In bf16, as stored; without key and caption, which training does not need: see `captions`."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        tensors = self._open(number)
        i = row - int(self.starts[number])
        features = []
        try:
            for e in range((len(tensors) - 2) // 3):
                start, stop = tensors[f"{e}.offsets"][i : i + 2].tolist()
                features.append(TextFeatures(tensors[f"{e}.tokens"][start:stop], tensors[f"{e}.pooled"][i]))
            return Sample(int(tensors["ids"][i]), "", "", tensors["latents"][i], features)
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{self.files[number]}: not a shard of samples ({error!r})") from error

    def captions(self) -> list[str]:
        """All captions, row by row."""
        return [sample["caption"] for file in self.files for sample in captions_of(file)]
