"""Which caption a record has, and the encoders that precompute's settings name."""

from __future__ import annotations

from typing import Any

import torch

from mmdit import autoencoder, encoders, keyed
from train.data.records import DataError, Record
from train.data.settings import Precompute
from train.data.shards import INDEX, Index
from train.engine.parallel import World

OWN = ("words", "minilm")
RELEASED = {"clip_l": "", "clip_g": "_2", "t5": "_3"}          # and what their folders' names end in


def split_of(record: Record, val_share: float) -> str:
    return record.split or ("val" if keyed.generator(0, f"split {record.key}").random() < val_share else "train")


def caption_of(record: Record, synthetic: float) -> str | None:
    """The caption a sample keeps: of two, the synthetic one in the given share of samples, by key."""
    if record.caption and record.synthetic:
        drawn = keyed.generator(0, f"caption {record.key}").random()
        return record.synthetic if drawn < synthetic else record.caption
    return record.caption or record.synthetic


def build_autoencoder(config: Precompute, device: torch.device) -> autoencoder.Autoencoder:
    if config.pipeline is None:
        return autoencoder.PixelSpace(config.pixel_factor)
    source = config.pipeline if config.pipeline.is_file() else config.pipeline / "vae"
    return autoencoder.KL(str(source), posterior=config.posterior, device=str(device))


def build_encoder(config: Precompute, name: str, device: torch.device) -> encoders.TextEncoder:
    if name not in RELEASED:
        if name not in OWN:
            raise DataError(f"text encoder {name!r} is unknown; expected one of {', '.join((*OWN, *RELEASED))}")
        return encoders.build({"kind": name, **({"max_tokens": config.max_words} if name == "words" else {})})
    if config.pipeline is None:
        raise DataError(f"text encoder {name} is a pipeline's: pass --pipeline FOLDER")
    suffix = RELEASED[name]
    source, tokenizer = (str(config.pipeline / (part + suffix)) for part in ("text_encoder", "tokenizer"))
    if config.pipeline.is_file():
        source, tokenizer = str(config.pipeline), ""
    encoder: encoders.Clip | encoders.OpenClip | encoders.T5
    if name == "t5":
        encoder = encoders.T5(source, tokenizer, max_tokens=config.t5_tokens)
    else:
        encoder = encoders.clip(source, tokenizer, part=name)
    encoder.model.to(device)
    return encoder


def build_encoders(config: Precompute, records: list[Record], world: World) -> list[encoders.TextEncoder]:
    """Of MiniLM, which is fitted to the captions, the main process's, and that of a cache which is there already: a
    caption mended since must not refit it."""
    found = []
    for name in config.encoders:
        if name == "minilm":
            found.append(encoders.build(world.shared(_fitted(config, records) if world.main else None)))
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
        if split_of(record, config.val_share) == "train" and (caption := caption_of(record, config.synthetic))
    ]
    if not captions:
        raise DataError(f"source {config.source!r} has no caption to fit minilm's features to")
    encoder = encoders.MiniLM()
    encoder.fit(captions[:: max(1, len(captions) // 2000)])
    return encoder.spec()
