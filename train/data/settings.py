"""What precompute is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmdit import numbers
from train.data.records import DataError
from train.data.splits import mapped

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Precompute:
    """What precompute does. Everything that decides the contents goes into the cache's fingerprint.

    Examples:
        >>> Precompute(source="pictures", cache=Path("cache/pictures"), area=512).encoders
        ('words',)
    """

    source: str = "shapes"
    """shapes, scenes, shapes-edits, scenes-edits, openmoji, a folder with sidecar .txt or metadata.jsonl, WebDataset
    .tar or Hugging Face .parquet files: one, a folder of them, a glob, or a range, "set-{00000..00099}.tar"."""
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
    """Folder of a StableDiffusion3Pipeline, or a released single file: its autoencoder instead of pixel space, and its
    text encoders (T5 of a folder alone, where its tokenizer is)."""
    posterior: Literal["mode", "sample"] = "mode"
    """Of the pipeline's autoencoder: the posterior's mean, or one draw of it for each image."""
    t5_tokens: int = 77
    """Length of T5's part."""
    device: str = "cpu"
    """Where the pipeline's parts run: cpu or cuda, with torchrun one GPU for each process."""
    val_share: float = 0.02
    """Share held out for validation, by key, where the source has no split of its own."""
    splits: tuple[str, ...] = ()
    """What a source's own splits stand for, NAME=train, NAME=val or NAME=-, left out. Known: train, training; val,
    valid, validation, dev and test, which validate."""
    copies: int = 12
    """For the source shapes: drawings per training caption; for scenes 64 times as many of each kind, for edits 400
    times as many."""
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
        for name in ("shard_size", "batch", "workers", "pixel_factor", "max_words"):
            if getattr(self, name) < 1:
                raise DataError(f"precompute: {name} is {getattr(self, name)}; expected at least 1")
        for name in ("sizes", "encoders"):
            if not getattr(self, name):
                raise DataError(f"precompute: {name} is empty; expected at least one")
        mapped(self.splits)
        try:
            for name in ("synthetic", "val_share"):
                numbers.between(f"precompute: {name}", getattr(self, name), 0, 1)
            for name, least in (("area", 0), ("copies", 1), ("t5_tokens", 1)):
                numbers.whole(f"precompute: {name}", getattr(self, name), least)
            numbers.above("precompute: step_ms", self.step_ms, 0)
        except ValueError as error:
            raise DataError(str(error)) from error

    @property
    def buckets(self) -> tuple[Size, ...]:
        """(height, width) of each."""
        if not self.area:
            return self.sizes
        eighths = [(rows, round(64 / rows)) for rows in range(6, 13)]
        return tuple((self.area * h // 8, self.area * w // 8) for h, w in eighths)
