"""Images and captions into shards: decode, fit into a bucket, encode, write. Interrupted, it goes on where it was; with
torchrun its processes share the blocks (train/data/blocks.py), and the cache is the same for any number of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from mmdit import autoencoder, encoders, keyed, text
from mmdit.files import write_atomically
from train import parallel
from train.config import Parallel
from train.data.blocks import Block, gathered
from train.data.shards import INDEX, Index, Sample, captions_of
from train.data.sources import DataError, Record, fit_into, open_source
from train.interrupts import Interrupts
from train.parallel import World

Size = tuple[int, int]
Item = TypeVar("Item")
Found = TypeVar("Found")
RELEASED = {"clip_l": "", "clip_g": "_2", "t5": "_3"}          # and what their folders' names end in
REMEMBERED = 1 << 30         # bytes of captions' features that are kept, for data sets that repeat them


@dataclass(frozen=True)
class Precompute:
    """What precompute does. Everything that decides the contents goes into the cache's fingerprint."""

    source: str = "shapes"
    """shapes, scenes, openmoji, a folder with sidecar .txt or metadata.jsonl, WebDataset .tar or Hugging Face .parquet
    files: one, a folder of them, a glob, or a range, "set-{00000..00099}.tar"."""
    cache: Path = Path("cache/shapes")
    """Folder to write."""
    sizes: tuple[Size, ...] = ((32, 32),)
    """Buckets, height x width in pixels; an image is resized and cropped to the one closest in aspect ratio."""
    area: int = 0
    """Side of a square in pixels: instead of sizes, buckets of about this area with sides from 3/4 to 3/2 of it."""
    encoders: tuple[str, ...] = ("words",)
    """Text encoders: words, minilm; clip_l, clip_g and t5 of the pipeline."""
    max_words: int = 77
    """Of the encoder words: what is longer is cut."""
    synthetic: float = 0.5
    """Of samples with an original and a synthetic caption, the share that keeps the synthetic one, by key."""
    pixel_factor: int = 2
    """Pixel space: a block of this many pixels squared becomes one latent pixel."""
    pipeline: Path | None = None
    """Folder of a StableDiffusion3Pipeline: its autoencoder instead of pixel space, and its text encoders."""
    posterior: Literal["mode", "sample"] = "mode"
    """Of the pipeline's autoencoder: the posterior's mean, or one draw of it for each image."""
    t5_tokens: int = 77
    """Length of T5's part."""
    device: str = "cpu"
    """Where the pipeline's parts run: cpu or cuda, with torchrun one GPU for each process."""
    val_share: float = 0.02
    """Share held out for validation, by key, where the source has no split of its own."""
    copies: int = 12
    """For the source shapes: drawings per training caption; for scenes 64 times as many of each kind."""
    shard_size: int = 4096
    """Records of a block: one process's piece of work, which makes one shard of each bucket."""
    batch: int = 32
    """Samples encoded at a time."""
    workers: int = 4
    """Threads of a process that decode images."""
    on_error: Literal["stop", "skip"] = "stop"
    """A missing caption or unreadable image: stop with an error, or leave it out and list it in rejected.jsonl."""
    report: bool = False
    """Instead of filling the cache, measure what each encoder costs (the paper's table 7)."""
    step_ms: float = 568.0
    """For the report: milliseconds of a training step of `batch` samples; the paper's 2B step unless given."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch", "workers", "pixel_factor"):
            if getattr(self, name) < 1:
                raise DataError(f"precompute: {name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.synthetic <= 1:
            raise DataError(f"precompute: synthetic is {self.synthetic}; expected a share between 0 and 1")

    @property
    def buckets(self) -> tuple[Size, ...]:
        """(height, width) of each."""
        if not self.area:
            return self.sizes
        eighths = [(rows, round(64 / rows)) for rows in range(6, 13)]
        return tuple((self.area * h // 8, self.area * w // 8) for h, w in eighths)


def precompute(config: Precompute) -> Index:
    """Fills config.cache and returns its index.

    Raises: DataError for an empty source, a bad record (with on_error="stop"; what was encoded is kept), or a cache
        made with other settings; KeyboardInterrupt after a signal, when what was encoded is on disk.
    """
    patient = Parallel(timeout_minutes=7 * 24 * 60)                       # processes do not finish at the same time
    with parallel.world(config.device, patient) as world:
        return _precompute(config, world)


def _precompute(config: Precompute, world: World) -> Index:
    records = open_source(config.source, copies=config.copies)
    if not records:
        raise DataError(f"source {config.source!r} holds no records")
    cache, vae = config.cache, build_autoencoder(config, world.device)
    _check_sizes(config.buckets, vae.factor)
    readers = _encoders(config, records, world)
    settings = {
        "source": config.source,
        "contents": _digest(records),
        "sizes": [list(size) for size in config.buckets],
        "autoencoder": vae.spec(),
        "encoders": [encoder.spec() for encoder in readers],
        "val_share": config.val_share,
        "synthetic": config.synthetic,
        "shard_size": config.shard_size,
    }
    index = Index(settings)
    todo: list[int] = []
    if world.main:
        index = _begin(cache, settings)
        todo = _undone(cache, records, config)
        if todo:
            index.save(cache)                                                           # unfinished from now on
    todo = world.shared(todo)
    work = _Work(config, records, vae, readers)
    mine = todo[world.rank :: world.size]
    count = sum(len(work.rows(number)) for number in mine)
    label = f"precompute {config.source}" + (f", process 0 of {world.size}" if world.size > 1 else "")
    with Interrupts("keeping what is encoded") as interrupts, tqdm(total=count, desc=label, unit="img",
                                                                     disable=not world.main) as bar:  # fmt: skip
        for number in mine:
            work.make(Block.load(cache, number), bar.update, interrupts)
            if interrupts.received:
                raise KeyboardInterrupt(f"{interrupts.received.name}: the same command goes on from here")
    world.largest(0)                                                                  # everybody has written its blocks
    return world.shared(_finish(config, index, len(records)) if world.main else None)


def _finish(config: Precompute, index: Index, records: int) -> Index:
    blocks = [Block.load(config.cache, number) for number in range(-(-records // config.shard_size))]
    rejected = [entry for block in blocks for entry in block.rejected]
    (config.cache / "rejected.jsonl").unlink(missing_ok=True)
    if rejected:
        write_atomically(
            config.cache / "rejected.jsonl", "".join(json.dumps(entry) + "\n" for entry in rejected).encode()
        )
    index.shards = gathered(blocks)
    if not any(bucket.startswith("train/") for bucket in index.shards):
        raise DataError(f"source {config.source!r}: no usable training sample among {records} records")
    index.complete = True
    index.save(config.cache)
    return index


Image = tuple[int, Record, str, np.ndarray]
"""(id, record, bucket, pixels)"""


class _Work:
    """Encodes blocks."""

    def __init__(
        self, config: Precompute, records: list[Record], vae: autoencoder.Autoencoder, readers: list[text.TextEncoder]
    ) -> None:
        self.config, self.records, self.vae, self.readers = config, records, vae, readers
        self._memory: dict[str, list[text.TextFeatures]] = {}

    def rows(self, number: int) -> range:
        """Ids of a block's records."""
        size = self.config.shard_size
        return range(number * size, min((number + 1) * size, len(self.records)))

    def make(self, block: Block, advance: Callable[[int], object], interrupts: Interrupts) -> None:
        """Encodes what the block lacks, and writes it, also when something stops it: nothing encoded is lost."""
        samples = block.samples(self.config.cache)
        rows = self.rows(block.number)
        block.rejected, block.done = [], False
        block.save(self.config.cache)                        # so that it counts as unfinished until it is whole again
        advance(len(samples))
        waiting: dict[str, list[Image]] = defaultdict(list)

        def flush(bucket: str) -> None:
            batch = waiting.pop(bucket)
            for sample in self._encode(batch):
                samples[sample.id] = (bucket, sample)
            advance(len(batch))

        finished = False
        try:
            for image in self._images([i for i in rows if i not in samples], block):
                waiting[image[2]].append(image)
                if len(waiting[image[2]]) == self.config.batch:
                    flush(image[2])
                if interrupts.received:
                    break
            else:
                finished = True
        finally:
            try:
                for bucket in list(waiting):
                    flush(bucket)
                block.done = finished
            finally:
                block.write(self.config.cache, samples)

    def _images(self, ids: list[int], block: Block) -> Iterator[Image]:
        """Decoded and fitted into their buckets, in order."""
        with ThreadPoolExecutor(self.config.workers) as pool:
            for i, found in zip(ids, _ahead(pool, self._read, ids, 2 * self.config.batch), strict=True):
                if not isinstance(found, DataError):
                    yield found
                elif self.config.on_error == "skip":
                    block.rejected.append({"key": self.records[i].key, "why": str(found)})
                else:
                    raise DataError(f"{found}. Mend it, or pass --on-error skip; what was done is kept") from found

    def _read(self, i: int) -> Image | DataError:
        record = self.records[i]
        try:
            if record.problem:
                raise DataError(f"{record.key}: {record.problem}")
            if not caption_of(record, self.config.synthetic):
                raise DataError(f"{record.key}: no caption")
            image = record.image()
        except DataError as error:
            return error
        height, width = _closest(image.height / image.width, self.config.buckets)
        bucket = f"{_split(record, self.config.val_share)}/{height}x{width}"
        return i, record, bucket, fit_into(image, height, width)

    def _encode(self, batch: list[Image]) -> list[Sample]:
        latents = self.vae.encode(autoencoder.to_float(np.stack([pixels for *_, pixels in batch]))).cpu()
        captions = [caption_of(record, self.config.synthetic) or "" for _, record, *_ in batch]
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._memory]
        if new:
            by_encoder = [[_stored(features) for features in encoder.encode(new)] for encoder in self.readers]
            self._memory |= {caption: list(said) for caption, *said in zip(new, *by_encoder, strict=True)}
        features = [self._memory[caption] for caption in captions]
        if sum(f.tokens.numel() for f in features[0]) * 2 * len(self._memory) > REMEMBERED:
            self._memory.clear()
        return [
            Sample(i, record.key, caption, latent.bfloat16(), said)
            for (i, record, *_), caption, latent, said in zip(batch, captions, latents, features, strict=True)
        ]


def _stored(features: text.TextFeatures) -> text.TextFeatures:
    """As a shard holds them."""
    return text.TextFeatures(features.tokens.bfloat16(), features.pooled.bfloat16())


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Found], items: Iterable[Item], window: int
) -> Iterator[Found]:
    """Results in order, at most `window` of them before they are asked for."""
    futures: deque[Future[Found]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == window:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def caption_of(record: Record, synthetic: float) -> str | None:
    """The caption a sample keeps: of two, the synthetic one in the given share of samples, by key."""
    if record.caption and record.synthetic:
        drawn = keyed.generator(0, f"caption {record.key}").random()
        return record.synthetic if drawn < synthetic else record.caption
    return record.caption or record.synthetic


def build_autoencoder(config: Precompute, device: torch.device) -> autoencoder.Autoencoder:
    if config.pipeline is None:
        return autoencoder.PixelSpace(config.pixel_factor)
    return autoencoder.KL(str(config.pipeline / "vae"), posterior=config.posterior, device=str(device))


def build_encoder(config: Precompute, name: str, device: torch.device) -> text.TextEncoder:
    if name not in RELEASED:
        return text.build({"kind": name, **({"max_tokens": config.max_words} if name == "words" else {})})
    if config.pipeline is None:
        raise DataError(f"text encoder {name} is a pipeline's: pass --pipeline FOLDER")
    suffix = RELEASED[name]
    folders = [str(config.pipeline / (part + suffix)) for part in ("text_encoder", "tokenizer")]
    encoder: encoders.Clip | encoders.T5
    if name == "t5":
        encoder = encoders.T5(folders[0], folders[1], max_tokens=config.t5_tokens)
    else:
        encoder = encoders.Clip(folders[0], folders[1], beside=name == "clip_g")
    encoder.model.to(device)
    return encoder


def _encoders(config: Precompute, records: list[Record], world: World) -> list[text.TextEncoder]:
    """Of MiniLM, which is fitted to the captions, the main process's, and that of a cache which is there already: a
    caption mended since must not refit it."""
    found = []
    for name in config.encoders:
        if name == "minilm":
            found.append(text.build(world.shared(_fitted(config, records) if world.main else None)))
        else:
            found.append(build_encoder(config, name, world.device))
    return found


def _fitted(config: Precompute, records: list[Record]) -> dict[str, Any]:
    """The spec of MiniLM."""
    if (config.cache / INDEX).exists():
        for spec in Index.load(config.cache).settings["encoders"]:
            if spec["kind"] == "minilm":
                return dict(spec)
    captions = [
        caption
        for record in records
        if _split(record, config.val_share) == "train" and (caption := caption_of(record, config.synthetic))
    ]
    if not captions:
        raise DataError(f"source {config.source!r} has no caption to fit minilm's features to")
    encoder = text.MiniLM()
    encoder.fit(captions[:: max(1, len(captions) // 2000)])
    return encoder.spec()


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


def _undone(cache: Path, records: list[Record], config: Precompute) -> list[int]:
    """Numbers of blocks to make. Raises: DataError if a caption has changed since, or a shard was lost."""
    todo = []
    for number in range(-(-len(records) // config.shard_size)):
        block = Block.load(cache, number)
        for entry in block.shards.values():
            path = cache / entry["file"]
            whole = path.is_file() and path.stat().st_size == entry["bytes"] and path.with_suffix(".jsonl").is_file()
            if block.done and not whole:
                raise DataError(f"{path} is missing or cut off: run python -m train verify --repair {cache} first")
            if not whole:
                continue
            for sample in captions_of(cache / entry["file"]):
                if caption_of(records[sample["id"]], config.synthetic) != sample["caption"]:
                    raise DataError(
                        f"{sample['key']}: its caption has changed since {cache} was made; choose another"
                    )
        if not block.done or (block.rejected and config.on_error == "stop"):
            todo.append(number)
    return todo


def _split(record: Record, val_share: float) -> str:
    return record.split or ("val" if keyed.generator(0, f"split {record.key}").random() < val_share else "train")


def _closest(aspect: float, sizes: Sequence[Size]) -> Size:
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(aspect)))


def _check_sizes(sizes: Sequence[Size], factor: int) -> None:
    for height, width in sizes:
        if height < 1 or width < 1 or height % factor or width % factor:
            raise DataError(f"size {height}x{width} is not a multiple of the autoencoder's factor {factor}")
