"""Images and captions into shards: decode, fit into a bucket, encode, write. Interrupted, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from mmdit import autoencoder, encoders, keyed, text
from mmdit.files import write_atomically
from train.data.shards import INDEX, Index, Sample, write_shard
from train.data.sources import DataError, Record, fit_into, open_source

Size = tuple[int, int]
RELEASED = {"clip_l": "", "clip_g": "_2", "t5": "_3"}          # and what their folders' names end in
REMEMBERED = 20_000          # captions whose features are kept, for data sets that repeat them


@dataclass(frozen=True)
class Precompute:
    """What precompute does. Everything that decides the contents goes into the cache's fingerprint."""

    source: str = "shapes"
    """shapes, openmoji, a folder with sidecar .txt or metadata.jsonl, or a WebDataset .tar."""
    cache: Path = Path("cache/shapes")
    """Folder to write."""
    sizes: tuple[Size, ...] = ((32, 32),)
    """Buckets, height x width in pixels; an image goes to the one closest in aspect ratio."""
    encoders: tuple[str, ...] = ("words",)
    """Text encoders: words, minilm; clip_l, clip_g and t5 of the pipeline."""
    pixel_factor: int = 2
    """Pixel space: a block of this many pixels squared becomes one latent pixel."""
    pipeline: Path | None = None
    """Folder of a StableDiffusion3Pipeline: its autoencoder instead of pixel space, and its text encoders."""
    posterior: Literal["mode", "sample"] = "mode"
    """Of the pipeline's autoencoder: the posterior's mean, or one draw of it for each image."""
    t5_tokens: int = 77
    """Length of T5's part."""
    device: str = "cpu"
    """Where the pipeline's parts run."""
    val_share: float = 0.02
    """Share held out for validation, by key, where the source has no split of its own."""
    copies: int = 12
    """For the source shapes: drawings per training caption."""
    shard_size: int = 4096
    """Samples per shard."""
    on_error: Literal["stop", "skip"] = "stop"
    """A missing caption or unreadable image: stop with an error, or leave it out and list it in rejected.jsonl."""


def precompute(config: Precompute) -> Index:
    """Fills config.cache and returns its index.

    Raises: DataError for an empty source, a bad record (with on_error="stop"; what was encoded is kept), or a cache
        made with other settings.
    """
    records = open_source(config.source, copies=config.copies)
    if not records:
        raise DataError(f"source {config.source!r} holds no records")
    cache, vae = config.cache, _autoencoder(config)
    _check_sizes(config.sizes, vae.factor)
    readers = _encoders(config, records)
    settings = {
        "source": config.source,
        "contents": _digest(records),
        "sizes": [list(size) for size in config.sizes],
        "autoencoder": vae.spec(),
        "encoders": [encoder.spec() for encoder in readers],
        "val_share": config.val_share,
    }
    index = _begin(cache, settings)
    done = _done(cache, index, records)
    memory: dict[str, list[text.TextFeatures]] = {}
    waiting: dict[str, list[tuple[int, Record, np.ndarray]]] = defaultdict(list)
    rejected: list[dict[str, str]] = []

    def flush(bucket: str) -> None:
        rows = waiting.pop(bucket)
        latents = vae.encode(autoencoder.to_float(np.stack([image for *_, image in rows])))
        samples = []
        for (i, record, _), latent in zip(rows, latents, strict=True):
            caption = record.caption or ""
            if len(memory) > REMEMBERED:
                memory.clear()
            if caption not in memory:
                memory[caption] = [encoder.encode([caption])[0] for encoder in readers]
            samples.append(Sample(i, record.key, caption, latent, memory[caption]))
        write_shard(cache, index, bucket, samples)

    try:
        for i, record in enumerate(tqdm(records, desc=f"precompute {config.source}", unit="img")):
            if i in done:
                continue
            try:
                if not record.caption:
                    raise DataError(f"{record.key}: no caption")
                image = record.image()
            except DataError as error:
                if config.on_error == "stop":
                    raise DataError(f"{error}. Mend it, or pass --on-error skip; what was done is kept") from error
                rejected.append({"key": record.key, "why": str(error)})
                continue
            height, width = _closest(image.height / image.width, config.sizes)
            bucket = f"{_split(record, config.val_share)}/{height}x{width}"
            waiting[bucket].append((i, record, fit_into(image, height, width)))
            if len(waiting[bucket]) == config.shard_size:
                flush(bucket)
    finally:
        for bucket in list(waiting):                  # also when stopped by an error: nothing done is lost
            flush(bucket)
    if rejected:
        write_atomically(cache / "rejected.jsonl", "".join(json.dumps(r) + "\n" for r in rejected).encode())
    if not any(bucket.startswith("train/") for bucket in index.shards):
        raise DataError(f"source {config.source!r}: no usable training sample among {len(records)} records")
    index.complete = True
    index.save(cache)
    return index


def _autoencoder(config: Precompute) -> autoencoder.Autoencoder:
    if config.pipeline is None:
        return autoencoder.PixelSpace(config.pixel_factor)
    return autoencoder.KL(str(config.pipeline / "vae"), posterior=config.posterior, device=config.device)


def _encoder(config: Precompute, name: str) -> text.TextEncoder:
    if name not in RELEASED:
        return text.build({"kind": name})
    if config.pipeline is None:
        raise DataError(f"text encoder {name} is a pipeline's: pass --pipeline FOLDER")
    suffix = RELEASED[name]
    folders = [str(config.pipeline / (part + suffix)) for part in ("text_encoder", "tokenizer")]
    encoder: encoders.Clip | encoders.T5
    if name == "t5":
        encoder = encoders.T5(folders[0], folders[1], max_tokens=config.t5_tokens)
    else:
        encoder = encoders.Clip(folders[0], folders[1], beside=name == "clip_g")
    encoder.model.to(config.device)
    return encoder


def _encoders(config: Precompute, records: list[Record]) -> list[text.TextEncoder]:
    """Those of a cache that is there already (a caption mended since must not refit them), or new ones."""
    if (config.cache / INDEX).exists():
        specs = Index.load(config.cache).settings["encoders"]
        if tuple(spec["kind"] for spec in specs) == config.encoders:
            return [text.build(spec) for spec in specs]
    found = [_encoder(config, name) for name in config.encoders]
    captions = [r.caption for r in records if r.caption and _split(r, config.val_share) == "train"]
    for encoder in found:
        if isinstance(encoder, text.MiniLM):
            if not captions:
                raise DataError(f"source {config.source!r} has no caption to fit minilm's features to")
            encoder.fit(captions[:: max(1, len(captions) // 2000)])
    return found


def _begin(cache: Path, settings: dict) -> Index:
    """A new index, or the former one of the same settings."""
    if not (cache / INDEX).exists():
        index = Index(settings)
        index.save(cache)
        return index
    index = Index.load(cache)
    if index.fingerprint != Index(settings).fingerprint:
        changed = sorted(k for k in settings if index.settings.get(k) != settings[k])
        raise DataError(f"{cache} was made with other settings ({', '.join(changed)} differ): choose another --cache")
    index.complete = False
    return index


def _digest(records: list[Record]) -> str:
    """Changes with the records, their order and their splits."""
    listing = "\n".join(f"{r.key}\t{r.split}" for r in records)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _done(cache: Path, index: Index, records: list[Record]) -> set[int]:
    """Ids already in the cache. Raises: DataError if a caption has changed since."""
    done = set()
    for entry in (e for entries in index.shards.values() for e in entries):
        for line in (cache / entry["file"]).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            if records[sample["id"]].caption != sample["caption"]:
                raise DataError(f"{sample['key']}: its caption has changed since {cache} was made; choose another")
            done.add(sample["id"])
    return done


def _split(record: Record, val_share: float) -> str:
    return record.split or ("val" if keyed.generator(0, f"split {record.key}").random() < val_share else "train")


def _closest(aspect: float, sizes: Sequence[Size]) -> Size:
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(aspect)))


def _check_sizes(sizes: Sequence[Size], factor: int) -> None:
    for height, width in sizes:
        if height < 1 or width < 1 or height % factor or width % factor:
            raise DataError(f"size {height}x{width} is not a multiple of the autoencoder's factor {factor}")
