"""What a checkpoint holds, in words."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from tqdm import tqdm

from mmdit.checkpoint.layouts import LAYOUTS, POSITIONS
from mmdit.checkpoint.store import Checkpoint
from mmdit.checkpoint.tensors import DTYPES, FP8


def report(opened: Checkpoint) -> tuple[list[str], list[str]]:
    """(a description, its anomalies): tensors with NaN or infinities, weights that are zero throughout, several dtypes,
    dtypes that are no weights', and names or shapes that do not fit."""
    config, names = opened.config, opened.names()
    anomalies: list[str] = []
    try:
        opened.pieces()
    except ValueError as error:
        anomalies += str(error).split(": ", 1)[1].split("; ")
    parts: dict[str, list[int]] = {}
    dtypes: dict[str, int] = {}
    for name, entry in tqdm(names.items(), desc="reading", disable=None):
        part = parts.setdefault(re.sub(r"\.\d+\.", ".*.", name).rsplit(".", 1)[0], [0, 0])
        part[0] += 1
        part[1] += math.prod(entry.shape)
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
        if entry.dtype not in DTYPES | FP8:
            anomalies.append(f"{name} has dtype {entry.dtype}, which is no weight's")
            continue
        low, high = torch.aminmax(opened.source.read(opened.prefix + name))
        if not (low.isfinite() and high.isfinite()):
            anomalies.append(f"{name} holds NaN or infinities")
        elif low == high == 0 and name.endswith("weight") and len(entry.shape) > 1:
            anomalies.append(f"{name} is zero throughout")
    positions = POSITIONS[LAYOUTS.index(opened.layout)]
    total = sum(math.prod(e.shape) for n, e in names.items() if n != positions)
    counted = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    if len({e.dtype for n, e in names.items() if n != positions} - FP8.keys()) > 1:
        anomalies.append(f"several dtypes: {counted}")
    lines = [
        f"{opened.source.where}: layout {opened.layout}, {total:,} parameters in {len(names)} tensors ({counted})",
        str(config),
        *(f"also holds {count} tensors of {part}*" for part, count in opened.others.items()),
        f"{'part':58s} {'tensors':>8s} {'numbers':>15s}",
        *(f"{name:58s} {count:8d} {numbers:15,d}" for name, (count, numbers) in parts.items()),
    ]
    return lines, anomalies


def left_behind(extra: dict[str, Any]) -> list[str]:
    """What a trained run's metadata say that who reads other layouts will not know."""
    found, formulation = [], str(extra.get("formulation", "rf"))
    if not formulation.startswith("rf"):
        found.append(f"this model was trained as {formulation} and does not give a velocity")
    if extra.get("autoencoder", {}).get("kind") == "unit":
        found.append("this model draws latents of unit size, to be scaled before they are decoded")
    return found
