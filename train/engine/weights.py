"""What a run leaves for sampling: a model's weights in one file, or, of an adapter's run, the adapter's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdit import adapters, checkpoint
from mmdit.adapters.parts import Adapter, of_layer
from mmdit.model import MMDiT
from mmdit.sampling.sample import ADAPTER, WEIGHTS
from train.config import Config
from train.engine import parallel
from train.engine.parallel import World


def base_of(config: Config) -> dict[str, str]:
    """The base of a run's adapter, by the bytes of its files; nothing of a run that trains a whole model. To be asked
    for before it is read: its files may be others later."""
    return {"base": checkpoint.fingerprint(config.initial)} if config.adapter.rank and config.initial else {}


def file_of(config: Config) -> Path:
    return config.run / (ADAPTER if config.adapter.rank else WEIGHTS)


def save(
    path: Path, model: MMDiT, tensors: Mapping[str, Tensor], config: Config, world: World, extra: dict[str, Any],
    base: Mapping[str, str],
) -> None:  # fmt: skip
    """Writes these weights, on the main process; all take part.

    Args: tensors: by name, in place of the model's. base: see `base_of`; an adapter's file names it."""
    whole = parallel.gathered({**parallel.trained_state(model), **tensors}, world)
    if not world.main:
        return
    if not config.adapter.rank:                                     # one file, so that it is whole or the former one
        checkpoint.save(model, path, weights=whole, extra=extra, max_shard_bytes=1 << 62)
        return
    parts = [
        part
        for name, layer in adapters.layers(model)
        for part in of_layer(name, layer.parts, layer.scaling, whole[f"{name}.lora_a"], whole[f"{name}.lora_b"])
    ]
    where = "" if config.initial is None else str(config.initial.resolve())
    about = {"extra": json.dumps(extra), "base": json.dumps({"path": where, **base})}
    adapters.save(Adapter(parts), path, model.config, extra=about)
