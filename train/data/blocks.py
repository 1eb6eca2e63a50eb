"""How precompute divides its work: block k holds the same records of the source whoever encodes it, and makes at most
one shard, number k, of each bucket. What came of it is written last, to CACHE/blocks/k.json, so a kill loses no more
than the blocks that were being made, and any number of processes may share the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdit.files import claimed, read_object, write_atomically
from train.data.records import DataError
from train.data.shards import Bucket, Index, Sample, captions_of, damage, write_shard

QUARANTINE = "quarantine"


@dataclass
class Block:
    """What came of one block."""

    number: int
    done: bool = False
    """Whether every record was encoded or left out."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By bucket, as in the index."""
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Records that were left out: "key", "why", "id", and what they were then, "is"."""

    @staticmethod
    def path(cache: Path, number: int) -> Path:
        return cache / "blocks" / f"{number:05d}.json"

    @classmethod
    def load(cls, cache: Path, number: int) -> Block:
        """As it was left, or a new one."""
        path = cls.path(cache, number)
        if not path.is_file():
            return cls(number)
        try:
            found = cls(**read_object(path))
            if not all(isinstance(entry["file"], str) for entry in found.shards.values()):
                raise TypeError("a shard without a file")
            if not all(isinstance(entry[name], str) for entry in found.rejected for name in ("key", "why")):
                raise TypeError("a picture that was left out without a reason")
            return found
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): remove it, and precompute makes its block anew") from error

    def save(self, cache: Path) -> None:
        write_atomically(self.path(cache, self.number), json.dumps(asdict(self)).encode())

    def samples(self, cache: Path) -> dict[int, tuple[str, Sample]]:
        """(bucket, sample) by id: what need not be encoded again. A shard that is not the one listed, as after a kill
        while it was written anew, counts as absent."""
        found = {}
        for name, entry in self.shards.items():
            if damage(cache / entry["file"], entry) is not None:
                continue
            bucket = Bucket([cache / entry["file"]], [entry["samples"]])
            for row, said in enumerate(captions_of(cache / entry["file"])):
                sample = bucket[row]
                sample.key, sample.caption = said["key"], said["caption"]
                sample.file = {name: said[name] for name in ("stamp", "digest") if name in said}
                found[sample.id] = (name, sample)
        return found

    def write(self, cache: Path, samples: dict[int, tuple[str, Sample]]) -> None:
        """Shards of these samples, in order of their ids, then the block's file."""
        by_bucket: dict[str, list[Sample]] = {}
        for i in sorted(samples):
            by_bucket.setdefault(samples[i][0], []).append(samples[i][1])
        self.shards = {
            bucket: write_shard(cache, f"{bucket}/{self.number:05d}.safetensors", chosen)
            for bucket, chosen in sorted(by_bucket.items())
        }
        self.save(cache)


def gathered(blocks: Iterable[Block]) -> dict[str, list[dict[str, Any]]]:
    """The shards of all blocks by bucket, as an index lists them."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        for bucket, entry in block.shards.items():
            shards.setdefault(bucket, []).append(entry)
    return shards


def _of_block(index: Index, number: int) -> dict[str, dict[str, Any]]:
    """A block's shards by an index, for where its own file was lost."""
    entries = ((bucket, entry) for bucket, all_of_it in index.shards.items() for entry in all_of_it)
    return {bucket: entry for bucket, entry in entries if int(Path(entry["file"]).stem) == number}


def check(cache: Path, *, take_out: bool = False, make_anew: bool = False) -> list[str]:
    """Every shard whose tensors or captions are missing or not those of the index, with what is wrong.

    Args:
        take_out: move them to CACHE/quarantine and out of the index; the cache can be used without them.
        make_anew: besides, call their blocks and the cache unfinished, so that precompute makes what they held anew.
    Raises: DataError if there is no index, or it is damaged; InUse if the cache is to be changed and another process
        fills it."""
    index = Index.load(cache)                                            # what is no cache is not claimed
    if not (take_out or make_anew):
        return _checked(cache, index, False, False)
    with claimed(cache):
        return _checked(cache, Index.load(cache), take_out, make_anew)   # as whoever had it before left it


def _checked(cache: Path, index: Index, take_out: bool, make_anew: bool) -> list[str]:
    blocks = {int(path.stem): Block.load(cache, int(path.stem)) for path in (cache / "blocks").glob("*[0-9].json")}
    listed = index.shards if index.complete else gathered(blocks[number] for number in sorted(blocks))
    found = []
    for bucket, entry in tqdm([(b, e) for b, es in listed.items() for e in es], desc=f"verify {cache}", disable=None):
        path = cache / entry["file"]
        if (why := damage(path, entry)) is None:
            continue
        found.append(f"{path}: {why}")
        if not (take_out or make_anew):
            continue
        # first nobody counts on it any more, then it is moved
        index.shards[bucket] = [e for e in index.shards.get(bucket, []) if e["file"] != entry["file"]]
        index.complete = index.complete and not make_anew
        index.save(cache)
        number = int(path.stem)
        block = blocks.setdefault(number, Block(number, True, _of_block(index, number)))
        block.shards.pop(bucket, None)
        block.done = block.done and not make_anew
        block.save(cache)
        for part in (path, path.with_suffix(".jsonl")):
            if part.is_file():
                aside = cache / QUARANTINE / part.relative_to(cache)
                aside.parent.mkdir(parents=True, exist_ok=True)
                part.replace(aside)
    return found
