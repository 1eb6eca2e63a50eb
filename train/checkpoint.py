"""The state of a run on disk: weights, average, optimizer moments, and where the run stands. One safetensors file,
written atomically; no pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit.files import replacing
from train.ema import EmaWeights


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Finished steps."""
    seconds: float = 0.0
    """Spent so far."""


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _moments(optimizer: torch.optim.Optimizer, names: dict[Any, str]) -> dict[str, Tensor]:
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def save(
    folder: Path,
    model: nn.Module,
    ema: EmaWeights,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    decides: dict[str, Any],
    keep: int,
) -> Path:
    """Writes the state after progress.step steps, then removes all but the newest `keep` files."""
    path = folder / f"step-{progress.step:08d}.safetensors"
    names = {p: n for n, p in model.named_parameters()}
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.weights.items()}
    tensors |= _moments(optimizer, names)
    metadata = {"step": str(progress.step), "seconds": repr(progress.seconds), "config": json.dumps(decides)}
    with replacing(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
    for old in _files(folder)[:-keep]:
        old.unlink()
    return path


def restore(
    folder: Path,
    model: nn.Module,
    ema: EmaWeights,
    optimizer: torch.optim.Optimizer,
    decides: dict[str, Any],
) -> Progress:
    """Loads the newest checkpoint of a run, if there is one, into model, ema and optimizer.

    Raises: ValueError if the run was made with another configuration, or its newest checkpoint is damaged.
    """
    files = _files(folder)
    if not files:
        return Progress()
    path = files[-1]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to go on from the checkpoint before it") from error
    written = json.loads(metadata["config"])
    changed = sorted(k for k in decides.keys() | written.keys() if written.get(k) != decides.get(k))
    if changed:
        raise ValueError(f"{folder.parent} holds a run with other settings ({', '.join(changed)}); choose another")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        ema.weights[name].copy_(tensors[f"ema.{name}"])
        state = {
            key: tensors[f"optimizer.{name}.{key}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{name}.{key}" in tensors
        }
        fused = any(group.get("fused") for group in optimizer.param_groups) # it wants its step there too
        optimizer.state[parameter] = {
            k: v.to(parameter.device) if fused or k != "step" else v for k, v in state.items()
        }
    return Progress(int(metadata["step"]), float(metadata["seconds"]))
