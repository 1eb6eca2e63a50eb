"""Images and captions into shards: decode, fit into a bucket, encode, write. Interrupted, it resumes where it was; with
torchrun its processes share the blocks (train/data/blocks.py), and the cache is the same for any number of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mmdit import autoencoder, devices
from mmdit.encoders import TextEncoder, TextFeatures
from mmdit.files import write_atomically
from mmdit.pictures import fit_into
from train.config import Parallel
from train.data.blocks import Block, gathered
from train.data.encoding import build_autoencoder, build_encoders, caption_of, split_of
from train.data.records import PAIRS, DataError, Record, Records, digest_of
from train.data.settings import Precompute, Size
from train.data.shards import INDEX, Index, Sample, captions_of
from train.data.sources import open_source
from train.engine import parallel
from train.engine.interrupts import Interrupts
from train.engine.parallel import World

Item = TypeVar("Item")
Found = TypeVar("Found")
REJECTED = "rejected.jsonl"
REMEMBERED = 1 << 30         # bytes of captions' features that are kept, for data sets that repeat them


def precompute(config: Precompute) -> Index:
    """Fills config.cache and returns its index.

    Raises: DataError for an empty source, a bad record (with on_error="stop"; what was encoded is kept), or a cache
        made with other settings; InUse if another process fills it; KeyboardInterrupt after a signal, when what was
        encoded is on disk.
    """
    patient = Parallel(timeout_minutes=7 * 24 * 60)                       # processes do not finish at the same time
    if (config.cache / "config.json").is_file():
        raise DataError(f"{config.cache} is a run's folder, no cache")
    with parallel.world(str(devices.pick(config.device)), patient) as world:
        records = open_source(config.source, copies=config.copies, splits=config.splits)
        with parallel.alone(config.cache, world):
            return _precompute(config, world, records)


def _precompute(config: Precompute, world: World, records: Records) -> Index:
    cache, vae = config.cache, build_autoencoder(config, world.device)
    _check_sizes(config.buckets, vae.factor)
    readers = build_encoders(config, records, world)
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
    settings |= _pairs(records)
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
                raise KeyboardInterrupt(f"{interrupts.received.name}: the same command resumes from here")
    world.largest(0)                                                                  # everybody has written its blocks
    made = world.shared(_finish(config, index, len(records)) if world.main else None)
    if world.main:
        _tell(config, records, made)
    return made


def _tell(config: Precompute, records: Records, made: Index) -> None:
    """What came of the source's files."""
    if not any(bucket.startswith("val/") for bucket in made.shards):
        print(f"warning: nothing validates (val_share {config.val_share:g}): a run will have no validation loss, and "
              "will draw the prompts of --samples.prompts alone", flush=True)  # fmt: skip
    rejected = config.cache / REJECTED
    if rejected.is_file():
        count = rejected.read_bytes().count(b"\n")
        print(f"{count:,} of {len(records):,} pictures were left out; {rejected} says why", flush=True)
    print(f"{config.source}: {records.told()}", flush=True)


def _finish(config: Precompute, index: Index, records: int) -> Index:
    blocks = [Block.load(config.cache, number) for number in range(-(-records // config.shard_size))]
    rejected = [{name: entry[name] for name in ("key", "why")} for block in blocks for entry in block.rejected]
    (config.cache / REJECTED).unlink(missing_ok=True)
    if rejected:
        write_atomically(config.cache / REJECTED, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
    index.shards = gathered(blocks)
    if not any(bucket.startswith("train/") for bucket in index.shards):
        why = f"the first of {len(rejected)} left out: {rejected[0]['why']}" if rejected else "all validate"
        raise DataError(f"source {config.source!r}: no usable training sample among {records} records; {why}")
    index.complete = True
    index.save(config.cache)
    return index


Image = tuple[int, Record, str, np.ndarray, dict[str, str]]
"""(id, record, bucket, pixels of its pictures, its files' stamp and digest)"""


class _Work:
    """Encodes blocks."""

    def __init__(
        self, config: Precompute, records: list[Record], vae: autoencoder.Autoencoder, readers: list[TextEncoder]
    ) -> None:
        self.config, self.records, self.vae, self.readers = config, records, vae, readers
        self._memory: dict[str, list[TextFeatures]] = {}

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
                    record = self.records[i]
                    block.rejected.append({"key": record.key, "why": str(found), "is": _state(record), "id": str(i)})
                else:
                    raise DataError(f"{found}. Mend it, or pass --on-error skip; what was done is kept") from found

    def _read(self, i: int) -> Image | DataError:
        record = self.records[i]
        try:
            if record.problem:
                raise DataError(f"{record.key}: {record.problem}")
            if not caption_of(record, self.config.synthetic):
                raise DataError(f"{record.key}: no caption")
            stamp = record.stamp()
            images, digest = record.read()
            height, width = _closest(images[0].height / images[0].width, self.config.buckets)
            pixels = np.stack([fit_into(image, height, width) for image in images])
        except ValueError as error:                                       # DataError is one
            said = str(error)
            return DataError(said if record.key in said else f"{record.key}: {said}")
        file = {} if stamp is None or digest is None else {"stamp": stamp, "digest": digest}
        bucket = f"{split_of(record, self.config.val_share)}/{height}x{width}"
        return i, record, bucket, pixels, file

    def _encode(self, batch: list[Image]) -> list[Sample]:
        images = np.stack([pixels for *_, pixels, _ in batch])                      # [B, pictures, H, W, 3]
        latents = self.vae.encode(autoencoder.to_float(images.reshape(-1, *images.shape[2:]))).cpu()
        latents = latents.unflatten(0, images.shape[:2]).flatten(1, 2)               # pictures beside in channels
        captions = [caption_of(record, self.config.synthetic) or "" for _, record, *_ in batch]
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._memory]
        if new:
            by_encoder = [[_stored(features) for features in encoder.encode(new)] for encoder in self.readers]
            self._memory |= {caption: list(said) for caption, *said in zip(new, *by_encoder, strict=True)}
        features = [self._memory[caption] for caption in captions]
        if sum(f.tokens.numel() for f in features[0]) * 2 * len(self._memory) > REMEMBERED:
            self._memory.clear()
        return [
            Sample(i, record.key, caption, latent.bfloat16(), said, file)
            for (i, record, *_, file), caption, latent, said in zip(batch, captions, latents, features, strict=True)
        ]


def _stored(features: TextFeatures) -> TextFeatures:
    """As a shard holds them."""
    return TextFeatures(features.tokens.bfloat16(), features.pooled.bfloat16())


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


def _begin(cache: Path, settings: dict) -> Index:
    """A new index, or the former one of the same settings."""
    if not (cache / INDEX).exists():
        index = Index(settings)
        index.save(cache)
        return index
    index = Index.load(cache)
    settings = _as_known(settings, index.settings)
    if index.fingerprint != Index(settings).fingerprint:
        changed = sorted(k for k in settings if index.settings.get(k) != settings[k])
        raise DataError(f"{cache} was made with other settings ({', '.join(changed)} differ): choose another --cache")
    index.complete = False
    return index


def _as_known(settings: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """Settings without what an older version's cache says nothing of: which configuration a network had."""

    def known(part: Any, before: Any) -> Any:
        if not isinstance(part, dict) or not isinstance(before, dict) or "settings" in before:
            return part
        return {name: value for name, value in part.items() if name != "settings"}

    encoders = former.get("encoders", [])
    pairs = zip(settings["encoders"], encoders, strict=True) if len(encoders) == len(settings["encoders"]) else ()
    found = [known(part, before) for part, before in pairs] or settings["encoders"]
    vae = known(settings["autoencoder"], former.get("autoencoder"))
    return {**settings, "encoders": found, "autoencoder": vae}


def _pairs(records: Records) -> dict[str, Any]:
    """What settings say of records that are pairs of pictures. Raises: DataError if they are not all alike."""
    kinds = {record.pair: record.key for record in records}
    if len(kinds) > 1:
        told = " and ".join(f"{PAIRS[kind]} ({key})" for kind, key in kinds.items())
        raise DataError(f"the source holds {told}; expected one kind")
    (kind,) = kinds or ("",)
    two: dict[str, Any] = {"pictures": 2}
    return {"": {}, "preference": two, "edit": {**two, "pair": "edit"}}[kind]


def _digest(records: list[Record]) -> str:
    """Changes with the records, their order and their splits."""
    listing = "\n".join(f"{r.key}\t{r.split}" for r in records)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _undone(cache: Path, records: list[Record], config: Precompute) -> list[int]:
    """Numbers of blocks to make. Raises: DataError if a caption or picture has changed since, or a shard was lost."""
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
                if not 0 <= sample["id"] < len(records):
                    raise DataError(f"{path.with_suffix('.jsonl')} names record {sample['id']} of {len(records)}")
                record = records[sample["id"]]
                same = caption_of(record, config.synthetic) == sample["caption"]
                if not same or _replaced(record, sample):
                    what = "picture" if same else "caption"
                    raise DataError(f"{sample['key']}: its {what} has changed since {cache} was made; choose another")
        again = [entry for entry in block.rejected if config.on_error == "stop" or _mended(entry, records)]
        if not block.done or again:
            todo.append(number)
    return todo


def _mended(entry: dict[str, str], records: list[Record]) -> bool:
    """Whether what was left out is not what it was; of caches of before nobody knows."""
    number = entry.get("id", "")
    return not number.isdecimal() or int(number) >= len(records) or entry.get("is") != _state(records[int(number)])


def _state(record: Record) -> str:
    """What a record that was left out is: another once somebody has mended its picture or caption."""
    return digest_of(repr((record.stamp(), record.caption, record.synthetic, record.problem)).encode())


def _replaced(record: Record, sample: dict[str, Any]) -> bool:
    """Whether another picture lies under the name: told by size and time, in doubt by the bytes."""
    if "stamp" not in sample or record.stamp() == sample["stamp"]:
        return False
    return record.digest() != sample["digest"]


def _closest(aspect: float, sizes: Sequence[Size]) -> Size:
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(aspect)))


def _check_sizes(sizes: Sequence[Size], factor: int) -> None:
    for height, width in sizes:
        if height < 1 or width < 1 or height % factor or width % factor:
            raise DataError(f"size {height}x{width} is not a multiple of the autoencoder's factor {factor}")
