"""Measures launch settings on this GPU and writes its launch table: python -m bench.sweep --out FOLDER --minutes 8

Bounded in time, most promising first, resumable: what was measured is in FOLDER/sweep.json and is not measured again.
With --candidates only the settings of that file are tried, see bench.device.precompile. The table, FOLDER/<gpu>.json,
goes to rfkernels/launch_tables. A setting that does not compile, does not fit in shared memory or changes a result
beyond rounding is passed over, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import environment
from bench.environment import pretending
from bench.measure import interleaved
from mmdit.files import write_atomically
from rfkernels import launch_tables
from rfkernels.adaln import launch as adaln
from rfkernels.joint_attention import launch as attention
from rfkernels.launch_tables import AttentionLaunch, PatchLaunch, RowLaunch, attention_launch, patch_launch, row_launch
from rfkernels.position import launch as patches
from rfkernels.position.launch import Patches
from rfkernels.triton_support import capability

TEXT = 154
WIDTHS = (64,) if pretending() else (1536, 2432, 1152, 1920, 960, 3072)
BATCH, TOKENS = (1, 9) if pretending() else (64, 256)
DIMS, HEADS = ((16,), 1) if pretending() else ((64, 128), 24)
Setting = RowLaunch | AttentionLaunch | PatchLaunch


@dataclass(frozen=True)
class Task:
    """One entry of a launch table, the settings to try and a call that uses it."""

    kernel: str
    key: str
    now: Setting
    candidates: tuple[Setting, ...]
    call: Callable[[], list[Tensor]]

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.key}"


def row_tasks(device: torch.device) -> Iterator[Task]:
    """The adaLN family at the widths of d = 24 and 38, then the others, at 16k rows."""
    lanes_and_warps = [RowLaunch(lanes, warps) for lanes in (16, 32, 64, 128) for warps in (2, 4, 8, 16)]
    walks = [RowLaunch(lanes, warps, programs, stages) for stages in (2, 3, 1) for programs in (2, 3, 4, 6)
             for lanes in (32, 64, 128, 256) for warps in (2, 4, 8) if 8 <= programs * warps <= 24]  # fmt: skip
    norm, kept = (True, "layer", 1e-6), torch.bfloat16
    for width in WIDTHS:
        batch, tokens = BATCH, TOKENS
        x, y, z, h = torch.randn(4, batch, tokens, width, device=device, dtype=torch.bfloat16).unbind()
        v = torch.randn(batch, width, device=device, dtype=torch.bfloat16)
        wide_x, wide_z = x.float(), z.float()             # the residual stream under autocast
        statistics = adaln.adaln(x, v, v, *norm, kept)[1]
        calls: dict[str, Callable[[], Any]] = {
            "adaln_fwd": lambda x=x, v=v: adaln.adaln(x, v, v, *norm, kept),
            "adaln_bwd": lambda x=x, y=y, v=v, s=statistics: adaln.adaln_backward(y, x, v, v, s, *norm),
            "gated_adaln_fwd": lambda x=x, y=y, v=v: adaln.gated_adaln(x, y, v, v, v, *norm, kept),
            "gated_adaln_bwd": lambda x=x, y=y, z=z, h=h, v=v, s=statistics: adaln.gated_adaln_backward(
                z, h, x, y, v, v, v, s, *norm, kept, True
            ),
            "gated_adaln_bwd_mixed": lambda x=wide_x, y=y, z=wide_z, h=h, v=v, s=statistics: adaln.gated_adaln_backward(
                z, h, x, y, v, v, v, s, *norm, torch.float32, True
            ),
            "gated_residual_fwd": lambda x=x, y=y, v=v: [adaln.gated_residual(x, y, v)],
            "gated_residual_bwd": lambda x=x, y=y, v=v: adaln.gated_residual_backward(x, y, v),
        }
        for kernel, call in calls.items():
            most = launch_tables.CHANNELS_PER_THREAD[kernel]
            tried = walks if "bwd" in kernel else lanes_and_warps
            fits = tuple(c for c in tried if c.lanes <= 32 * c.warps and width <= 2 * most * c.lanes)
            yield Task(kernel, str(width), row_launch(kernel, width), fits, lambda call=call: list(call()))


def attention_tasks(device: torch.device) -> Iterator[Task]:
    """Forward and both backward kernels at head dimensions 64 and 128, at the paper's pretraining shape."""
    arch = capability(device)
    for dim in DIMS:
        batch, heads, sizes = max(1, BATCH // 2), HEADS, (TEXT * TOKENS // 256, TOKENS)
        qkvs = [torch.randn(batch, n, 3, heads, dim, device=device, dtype=torch.bfloat16) for n in sizes]
        weight = torch.ones(dim, device=device)
        tensors = [qkvs[0], weight, weight, qkvs[1], weight, weight]
        settings = ("3qk,3qk", dim**-0.5, 1e-6)
        outputs = attention.forward(tensors, *settings)
        grads = [torch.randn_like(out) for out in outputs[:2]]
        calls: dict[str, Callable[[], list[Tensor]]] = {
            "attention_fwd": lambda t=tensors, s=settings: attention.forward(t, *s),
            "attention_bwd_q": lambda g=grads, o=outputs, t=tensors, s=settings: attention.backward(g, o, t, *s, True),
        }
        calls["attention_bwd_kv"] = calls["attention_bwd_q"]
        tiles = [(64, 64, 4), (128, 64, 8), (64, 128, 4), (64, 32, 4), (32, 64, 4), (128, 128, 8), (64, 64, 8),
                 (64, 32, 8), (32, 64, 8), (128, 32, 8), (32, 32, 4), (128, 64, 4), (128, 32, 4),
                 (128, 128, 4)]  # fmt: skip
        tried = [AttentionLaunch(m, n, w, s, r) for s in (2, 3, 4) for r in (0, 168, 128) for m, n, w in tiles]
        for kernel, call in calls.items():
            yield Task(kernel, f"{dim}/2", attention_launch(kernel, dim, 2, arch), tuple(tried), call)


def patch_tasks(device: torch.device, batch: int = BATCH, widths: tuple[int, ...] = WIDTHS[:2]) -> Iterator[Task]:
    """The kernels between a latent and its tokens, at the widths of d = 24 and 38."""
    tiles = [(64, 128, 64, 4), (64, 64, 64, 4), (128, 128, 64, 8), (128, 64, 64, 4), (64, 256, 64, 8), (32, 128, 64, 4)]
    tried = tuple(PatchLaunch(*tile, stages) for stages in (2, 3, 4) for tile in tiles)
    for width in widths:
        normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
        latent, x, weight, bias = normal(batch, 16, 32, 32), normal(batch, 256, width), normal(width, 64), normal(width)
        positions = torch.randn(256, width, device=device)
        embedded, rows = Patches(latent, 2, True), (64, 1)

        def gradient(x: Tensor = x, p: Patches = embedded, w: Tensor = weight, b: Tensor = bias) -> list[Tensor]:
            dweight, sums = torch.empty_like(w), torch.empty_like(b)
            patches.weight_gradient(x, p, dweight, (64, 1), sums)
            return [dweight, sums]

        calls: dict[str, Callable[[], list[Tensor]]] = {
            "patches_to_tokens": partial(
                lambda *a: [patches.to_tokens(*a)], embedded, weight, rows, width, bias, positions
            ),
            "tokens_to_patches": partial(
                lambda x, like, w, s: [patches.to_latent(x, Patches(torch.empty_like(like), 2, False), w, s)],
                x, latent, weight, rows,
            ),
            "patch_weight_bwd": gradient,
        }  # fmt: skip
        for kernel, call in calls.items():
            yield Task(kernel, f"{width}/2", patch_launch(kernel, width, 2), tried, call)


def using(task: Task, setting: Any, table: dict[str, Any]) -> None:
    table.setdefault(task.kernel, {})[task.key] = asdict(setting)
    adaln._settings_at.cache_clear()
    attention._settings_at.cache_clear()


def try_setting(task: Task, setting: Any, table: dict[str, Any], want: list[Tensor]) -> tuple[float | None, str]:
    """(seconds, "") or (None, why not)."""
    using(task, setting, table)
    try:
        got = task.call()
        for a, b in zip(got, want, strict=True):
            off = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-20)) if b.numel() else 0.0
            if not off < 0.02:
                return None, f"result off by {off:.1%}"
        rounds = 1 if pretending() else 5
        return interleaved({"it": lambda i: task.call()}, environment.device(), rounds)["it"].median, ""
    except Exception as error:                    # does not compile, or does not fit: the next one
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def main(out: Path, minutes: float = 8.0, only: str = "", candidates: Path | None = None) -> None:
    if not torch.cuda.is_available() and not pretending():
        sys.exit("error: the sweep measures on a GPU, and there is none")
    chosen = json.loads(candidates.read_text()) if candidates is not None and candidates.is_file() else None
    if candidates is not None and chosen is None:
        print(f"no {candidates}: every setting is tried", flush=True)
    device, deadline = environment.device(), time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    log, name = out / "sweep.json", environment.device_name()
    done: dict[str, dict[str, Any]] = json.loads(log.read_text())["measured"] if log.is_file() else {}
    table = launch_tables.table(name)             # the one the launchers read, changed in place
    kept = json.loads(json.dumps(table))
    stopped = False
    for tasks in (attention_tasks, row_tasks, patch_tasks):
        for task in tasks(device):
            if only not in task.name or stopped:
                continue
            entries = done.setdefault(task.name, {})
            using(task, task.now, table)
            want = task.call()
            for setting in tqdm(dict.fromkeys((task.now, *task.candidates)), desc=task.name, disable=None):
                key = json.dumps(asdict(setting))
                if key in entries or (chosen is not None and key not in chosen.get(task.name, ())):
                    continue
                if stopped := time.monotonic() > deadline:
                    break
                seconds, why = try_setting(task, setting, table, want)
                entries[key] = {"us": None if seconds is None else round(seconds * 1e6, 2), "why": why}
                write_atomically(log, json.dumps({"environment": environment.environment(), "measured": done}).encode())
            timed = {k: e["us"] for k, e in entries.items() if e["us"] is not None}
            if timed:
                best = min(timed, key=lambda k: timed[k])
                kept.setdefault(task.kernel, {})[task.key] = json.loads(best)
                table.setdefault(task.kernel, {})[task.key] = json.loads(best)
                before = timed.get(json.dumps(asdict(task.now)))
                print(f"{task.name:28s} {before or 0:9.1f} us -> {timed[best]:9.1f} us  {best}", flush=True)
                found = out / f"{name.lower().replace(' ', '_')}.json"              # whenever this is stopped
                write_atomically(found, (json.dumps(kept, indent=1) + "\n").encode())
    if stopped:
        print("stopped by the clock: run again to continue")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description="Sweep launch settings on this GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for sweep.json and the launch table")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long; the next run continues (8)")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--candidates", type=Path, help="try only the settings in this file of bench.device.precompile")
    main(**vars(parser.parse_args()))
