"""Model weights on disk: one safetensors file with the configuration in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdit.config import MMDiTConfig
from mmdit.files import replacing
from mmdit.model import MMDiT


def save(
    config: MMDiTConfig, weights: dict[str, Tensor], path: str | os.PathLike[str], extra: dict[str, Any] | None = None
) -> None:
    """Writes weights (a state dict of MMDiT(config)) to `path`, atomically; `extra` is JSON kept beside the config."""
    path = Path(path)
    metadata = {"format": "rfkernels.mmdit", "config": json.dumps(config.to_dict()), "extra": json.dumps(extra or {})}
    with replacing(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial, metadata=metadata)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[MMDiT, dict[str, Any]]:
    """Reads a file written by `save`.

    Returns: the model in evaluation mode, and `extra`.
    Raises: FileNotFoundError; ValueError for a truncated or foreign file, or one whose keys or shapes do not fit its
        configuration (all of them are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint.load: no file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "rfkernels.mmdit":
                raise ValueError(f"checkpoint.load: {path} was not written by save(): no rfkernels.mmdit metadata")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"checkpoint.load: {path} is not a complete safetensors file: {error}") from error
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig.from_dict(json.loads(metadata["config"])))
    expected = {k: v.shape for k, v in model.state_dict().items()}
    problems = [f"missing {k}" for k in expected.keys() - weights.keys()]
    problems += [f"unknown {k}" for k in weights.keys() - expected.keys()]
    problems += [
        f"{k} has shape {list(weights[k].shape)}, expected {list(shape)}"
        for k, shape in expected.items()
        if k in weights and weights[k].shape != shape
    ]
    if problems:
        raise ValueError(f"checkpoint.load: {path} does not fit its configuration: " + "; ".join(sorted(problems)))
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval(), json.loads(metadata["extra"])
