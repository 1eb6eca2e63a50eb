"""Does fine-tuning run on this device? python -m bench.device.tuning

From one base of the tiny model, in bf16, each held to the same run on the CPU in fp32:

    adapter           a LoRA, whose moments have 8 bits
    low memory        all weights in bf16, moments of 8 bits
    preference        a LoRA on pairs of pictures
    edit by channels, edit by tokens
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.device.runner import VERDICT
from bench.device.training import BATCH, CLOSE, WORK, compare, config
from bench.environment import pretending
from mmdit import MMDiT, checkpoint
from mmdit.adapters import Lora
from train.config import Config, Optimizer, Preference, Samples, Validation
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.engine.loop import train

STEPS = 4 if pretending() else 12
FOLDERS = {"pairs": ("winner", "loser", "caption"), "edits": ("target", "source", "instruction")}


def cache(kind: str) -> Path:
    """Pairs of one light and one dark picture, precomputed once."""
    made = WORK / "tuning" / kind / "cache"
    if not made.is_dir():
        folder = WORK / "tuning" / kind / "pictures"
        folder.mkdir(parents=True)
        lines = []
        for i in range(32):
            paths = [f"{i}-{value}.png" for value in (200 + i, 20 + i)]
            for path in paths:
                value = int(path.partition("-")[2][:-4])
                Image.new("RGB", (32, 32), (value, value, 255 - value)).save(folder / path)
            named = dict(zip(FOLDERS[kind], (*paths, f"number {i}"), strict=True))
            lines.append(json.dumps({**named, "split": "val" if i < 4 else "train"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        precompute(Precompute(source=str(folder), cache=made, workers=1))
    return made


def runs() -> Iterator[tuple[str, dict[str, Any]]]:
    """What each changes of a run of the tiny model."""
    eight = Optimizer(lr=1e-3, warmup=2, states="int8")
    model, lora = config("base").model, Lora(rank=4, targets=("all",))
    pairs: dict[str, Any] = {"cache": cache("pairs"), "objective": "preference", "preference": Preference(beta=20.0)}
    edits: dict[str, Any] = {"cache": cache("edits"), "objective": "editing"}
    yield "adapter", {"adapter": lora, "optimizer": eight}
    yield "low-memory", {"optimizer": dataclasses.replace(eight, weights="bf16")}
    yield "preference", {**pairs, "adapter": lora, "optimizer": eight, "encoder_dropout": 0.0}
    yield "channels", {**edits, "model": dataclasses.replace(model, reference_channels=12)}
    yield "tokens", {**edits, "model": dataclasses.replace(model, reference_tokens=True)}


def tuned(name: str, device: str, changes: dict[str, Any], base: Path) -> Config:
    made = config(f"tuned-{name}{'-cpu' * (device == 'cpu')}", device=device)
    changes = dict(changes)
    if device == "cpu" and "optimizer" in changes:                       # fp32 weights, as the CPU's precision asks
        changes["optimizer"] = dataclasses.replace(changes["optimizer"], weights="fp32")
    made = dataclasses.replace(
        made, initial=base, steps=STEPS, batch=BATCH // 2, checkpoint_every=STEPS // 2, log_every=STEPS // 2,
        validation=Validation(every=0, samples=2), samples=Samples(every=0, count=1, steps=2), **changes,
    )  # fmt: skip
    train(made)
    return made


def main() -> int:
    base, failed = WORK / "tuning" / "base.safetensors", []
    base.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MMDiT(config("base").model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    checkpoint.save(model, base)
    for name, changes in list(runs())[:: 4 if pretending() else 1]:
        here, cpu = (tuned(name, device, changes, base) for device in ("auto", "cpu"))
        if compare(f"tuned-{name}", here, cpu, CLOSE):
            failed.append(name)
    if failed:
        print(f"{VERDICT}off, or not finished: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
