"""What people upload: a run's weights in a layout, and a model card beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmdit import adapters, checkpoint
from mmdit.checkpoint.layouts import POSITIONS
from mmdit.checkpoint.report import left_behind
from mmdit.files import write_atomically
from mmdit.sampling.sample import ADAPTER, WEIGHTS
from train.config import Config
from train.report.curves import points_of
from train.report.page import CAPTIONS, entries, flat

SETTINGS = ("objective", "batch", "optimizer.kind", "optimizer.lr", "optimizer.warmup", "ema.decay", "encoder_dropout",
            "caption_dropout", "adapter.rank", "adapter.targets", "precision", "seed")  # fmt: skip
SAMPLES, CARD = "samples.png", "README.md"


def export(run: Path, out: Path, layout: str, dtype: torch.dtype | None = None, license: str = "other") -> list[Path]:
    """Weights and a card.

    Args:
        layout: of a model "native", "sd3" or "diffusers"; of an adapter "native", "diffusers", "kohya" or "comfyui".
        dtype: of the weights; as the run left them unless given. license: as hubs name it.
    Returns: the files written; the card is last.
    Raises: FileNotFoundError without weights; FileExistsError for a folder that is not empty; ValueError for a layout
        that cannot hold the model.
    """
    config = Config.of_run(run)
    source = run / (ADAPTER if config.adapter.rank else WEIGHTS)
    if not source.is_file():
        raise FileNotFoundError(f"{run} holds no {source.name}: has the run saved yet?")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; expected a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    if config.adapter.rank:
        adapter = adapters.read(source, config.model)
        target = out / "pytorch_lora_weights.safetensors"
        written = [adapters.save(adapter, target, config.model, format=layout, dtype=dtype or torch.float32)]
        extra: dict[str, Any] = adapters.about(source)[1]
        count = sum(part.a.numel() + part.b.numel() for part in adapter.parts)
    else:
        opened = checkpoint.open_checkpoint(source)
        target = out if layout == "diffusers" else out / WEIGHTS
        written = checkpoint.convert(source, target, layout=layout, dtype=dtype)
        extra, count = opened.extra, sum(
            torch.Size(entry.shape).numel() for name, entry in opened.names().items() if name != POSITIONS[0]
        )
    if pictures := sorted((run / "samples").glob("step-*.png")):
        shutil.copyfile(pictures[-1], out / SAMPLES)
        written.append(out / SAMPLES)
    about = {
        "license": license, "layout": layout, "weights": target.name, "parameters": f"{count:,}",
        "picture": SAMPLES if pictures else "", "left": left_behind(extra) if layout != "native" else [],
    }  # fmt: skip
    write_atomically(out / CARD, _card(run, config, extra, about).encode())
    return [*written, out / CARD]


def _card(run: Path, config: Config, extra: dict[str, Any], about: dict[str, Any]) -> str:
    """A model card. about: what the template asks besides, of what was written."""
    from jinja2 import Environment, PackageLoader

    metrics, said = entries(run / "metrics.jsonl"), run / "samples" / CAPTIONS
    validation, training = points_of(metrics, "validation/loss"), points_of(metrics, "train/loss")
    settings = flat(json.loads(config.to_json()))
    template = Environment(loader=PackageLoader("train.report", "."), autoescape=False).get_template("card.md")
    return template.render(
        **about, name=run.resolve().name, adapter=config.adapter.rank > 0,
        base="" if config.initial is None else config.initial.name,
        steps=f"{training[-1][0]:,}" if training else "no logged",
        captions=json.loads(said.read_text()) if said.is_file() else [],
        formulation=extra.get("formulation", "rf"), guidance=extra.get("guidance"), sample_steps=extra.get("steps"),
        shift=extra.get("sampling_shift"), pixels=" x ".join(map(str, extra.get("size", []))),
        settings=[(name, settings[name]) for name in SETTINGS if config.adapter.rank or "adapter." not in name],
        validation=f"{validation[-1][1]:.4f} at step {validation[-1][0]:,}" if validation else "",
    )  # fmt: skip
