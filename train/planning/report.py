"""A plan as text, with the changes that would make it fit."""

from __future__ import annotations

from dataclasses import replace

from mmdit.cost.hardware import GPUS, Gpu, assumed, by_prefix, gpu, seconds
from train.config import Config
from train.planning.activations import activations, model_on_meta
from train.planning.plan import PER_NODE, Layout, Plan, link, plan, units

USABLE = 0.92               # of a GPU's memory; the rest: CUDA's context, workspaces, fragmentation
SIZES = (16, 24, 32, 48, 80, 141, 192)
"""Memories of GPUs that can be had, in GB."""


def find_gpu(name: str) -> tuple[Gpu, str]:
    """Raises: ValueError for a GPU that is not known."""
    full = by_prefix(name) or name
    known = gpu(full)
    if known is None:
        raise ValueError(f"plan: gpu is {name!r}; expected how one of these begins: {', '.join(GPUS)}")
    return known, full


def advice(config: Config, layout: Layout, sheet: Gpu, found: Plan, name: str, pixels: int) -> list[str]:
    """Whether it fits, and the first changes that make it fit, each tried."""
    room = USABLE * sheet.memory
    if found.total <= room:
        return [f"fits: {found.total / 1e9:.1f} of {sheet.memory / 1e9:.0f} GB"]
    lines = [f"does not fit: {found.total / 1e9:.1f} GB, {room / 1e9:.0f} of {sheet.memory / 1e9:.0f} can be used"]
    for kind in ("selective", "full"):
        changed = replace(config, parallel=replace(config.parallel, checkpointing=kind))
        tried = plan(changed, layout, sheet, name, pixels).total
        lines.append(f"  with --parallel.checkpointing {kind}: {tried / 1e9:.1f} GB")
        if tried <= room:
            return lines
    while layout.local > 1 and tried > room:
        layout = replace(layout, accumulate=layout.accumulate * 2)
        tried = plan(changed, layout, sheet, name, pixels).total
        lines.append(f"  and --parallel.accumulate {layout.accumulate}: {tried / 1e9:.1f} GB")
    if tried > room:
        lines.append("  more GPUs are needed: shards become smaller, activations and gathered units do not")
    return lines


def checkpointing(config: Config, layout: Layout, sheet: Gpu, name: str, pixels: int) -> list[str]:
    """What each setting of activation checkpointing keeps, and what computing the rest again costs."""
    lines, least = [], 0.0
    for kind in ("none", "selective", "full"):
        changed = replace(config, parallel=replace(config.parallel, checkpointing=kind))
        kept, kernels = activations(changed, layout.local, pixels)
        took = sum(seconds(k, assumed(sheet, name)) for k in kernels)
        least = least or took
        total = plan(changed, layout, sheet, name, pixels).total
        holds = next((f"a GPU of {size} GB" for size in SIZES if total <= USABLE * size * 1e9), "no single GPU")
        costs = f"{kept / 1e9:8.2f} GB  {kind:9s}  kernels {took / least - 1:+.0%}"
        lines.append(f"  {costs:40s}  {total / 1e9:6.1f} GB together: {holds}")
    return lines


def nearer(config: Config, layout: Layout, sheet: Gpu, found: Plan, name: str, pixels: int) -> list[str]:
    """If a step waits for the network: what a whole model in each node (HSDP) would change."""
    if found.network <= found.compute or layout.gpus <= PER_NODE or layout.shards <= PER_NODE or layout.gpus % PER_NODE:
        return []
    tried = plan(config, replace(layout, replicas=layout.gpus // PER_NODE), sheet, name, pixels)
    return [
        f"  with --parallel.replicas {layout.gpus // PER_NODE}, a model in each node: {tried.network:.2f} s, "
        f"{tried.total / 1e9:.1f} GB"
    ]


def report(config: Config, gpus: int, name: str, pixels: int | None) -> str:
    """The plan as text. Raises: ValueError for an unknown GPU, or a batch or replicas that do not fit the GPUs."""
    sheet, full = find_gpu(name)
    pixels, p = pixels or config.model.resolution, config.parallel
    if gpus < 1 or gpus % p.replicas:
        raise ValueError(f"plan: gpus is {gpus}; expected a multiple of parallel.replicas = {p.replicas}")
    if config.batch < gpus * p.accumulate:
        raise ValueError(f"plan: batch is {config.batch}; expected a sample for each of {gpus} x {p.accumulate} parts")
    layout = Layout(gpus, p.replicas, config.batch, p.accumulate)
    found, model = plan(config, layout, sheet, full, pixels), model_on_meta(config)
    count, sizes = sum(x.numel() for x in model.parameters()), units(model)
    per_step = max(found.compute, found.network)
    lines = [
        f"{config.run.name}: {count / 1e9:.2f}B parameters ({sizes['modulation'] / count:.0%} of them modulation), "
        f"{pixels} pixels, batch {config.batch}, on {gpus} x {full}: {layout.shards} shards, "
        f"{layout.replicas} replicas, {layout.local} samples at a time, {layout.accumulate} times a step",
        "",
        "memory of a GPU",
        *(f"  {value / 1e9:8.2f} GB  {part}" for part, value in found.memory.items()),
        f"  {found.total / 1e9:8.2f} GB  together",
        *advice(config, layout, sheet, found, full, pixels),
        "",
        f"activations of {layout.local} samples by --parallel.checkpointing",
        *checkpointing(config, layout, sheet, full, pixels),
        "",
        "received by a GPU a step",
        *(f"  {value / 1e9:8.2f} GB  {part}" for part, value in found.sent.items()),
        f"  {found.network:8.2f} s   at {link(layout.shards) / 1e9:.0f} GB/s among shards, "
        f"{link(gpus) / 1e9:.0f} among replicas",
        *nearer(config, layout, sheet, found, full, pixels),
        "",
        f"kernels of a step: {found.compute:.2f} s, MFU {found.mfu:.0%} ({assumed(sheet, full).source})",
        f"a step takes at least {per_step:.2f} s ({'network' if found.network > found.compute else 'kernels'}), "
        f"{config.batch / per_step:.0f} images/s, MFU {found.mfu_bound:.0%}: if communication hides behind kernels",
    ]
    if config.optimizer.kind == "muon":
        lines.append("Muon gathers matrices whole on each GPU: neither the memory nor the time of that is counted")
    if config.steps:
        lines.append(f"{config.steps:,} steps: {config.steps * per_step / 86400:.1f} days")
    lines.append("no GPU has confirmed this: the shares are assumptions, see mmdit/cost/hardware.py")
    return "\n".join(lines)


