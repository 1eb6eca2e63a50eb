"""What a run needs and how long its steps should take, on GPUs that need not be here:
python -m train plan d38-256 --gpus 64 --gpu h100

Memory by component from shapes alone, activations from tracing a step on fake tensors, time from the roofline: every
kernel takes what its FLOPs or bytes demand at stated shares of a data sheet, or what was measured. Communication is put
beside the computation, not on top: FSDP overlaps them where it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from mmdit import MMDiT, backbones
from mmdit.cost.counting import Kernel, Made, Trace, made_in, trace
from mmdit.cost.flops import TEXT_TOKENS, training_flops
from mmdit.cost.hardware import GPUS, Gpu, assumed, by_prefix, gpu, seconds
from train.config import Config, Parallel
from train.engine import parallel

NETWORK = {"within a node": 450e9, "between nodes": 50e9}
"""Bytes per second and GPU, each way: NVLink 4, and a 400 Gb/s adapter for each GPU; by their data sheets."""
PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    gpus: int
    replicas: int
    batch: int
    """Samples of the whole batch."""
    accumulate: int

    @property
    def shards(self) -> int:
        return self.gpus // self.replicas

    @property
    def local(self) -> int:
        """Samples of one process at a time, at most."""
        return -(-self.batch // (self.gpus * self.accumulate))


@dataclass(frozen=True)
class Plan:
    """A forecast, per GPU."""

    memory: dict[str, float]
    """Bytes, by component."""
    sent: dict[str, float]
    """Bytes a GPU receives a step, by collective."""
    compute: float
    """Seconds of kernels a step."""
    network: float
    """Seconds of communication a step, were nothing else going on."""
    mfu: float
    """Model FLOPs over the peak, of the kernels alone."""
    mfu_bound: float
    """With the longer of kernels and communication."""

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def link(gpus: int) -> float:
    """Bytes per second of the slowest link between so many."""
    return NETWORK["within a node" if gpus <= PER_NODE else "between nodes"]


def units(model: MMDiT) -> dict[str, int]:
    """Parameters of FSDP's units: each block, the stacked modulation, the rest."""
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    found = {f"block {i}": count(block) for i, block in enumerate(model.blocks)}
    found["modulation"] = count(model.modulation)
    found["rest"] = count(model) - sum(found.values())
    return found


def model_on_meta(config: Config) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(config.model)


def as_trained(call: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast to bf16: weights that FSDP gathered in bf16 meet fp32 positions, so the images' stream is fp32."""

    def under_autocast(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):                            # fake tensors are those of a CPU
            return call(*inputs)

    return under_autocast


def whole_model(config: Config, batch: int, pixels: int) -> Made:
    """A call of the model as it is trained, to be traced."""
    with made_in(torch.bfloat16):
        model = MMDiT(config.model)
    c, side = config.model, pixels // (config.model.token_pixels // config.model.patch_size)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    context, pooled = normal(batch, TEXT_TOKENS, c.context_dim), normal(batch, c.pooled_dim)
    latents = normal(batch, c.in_channels, side, side)
    return as_trained(model), [latents, torch.rand(batch), context, pooled], [*model.parameters()]


def one_block(config: Config, index: int, batch: int, pixels: int) -> Made:
    """A call of a block as it is trained, to be traced."""
    with made_in(torch.bfloat16):
        block = backbones.block(config.model, index)
    c, tokens = config.model, (pixels // config.model.token_pixels) ** 2
    leaf = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    texts = (c.text_split, TEXT_TOKENS - c.text_split) if c.text_split else (TEXT_TOKENS,)
    xs = [*(leaf(batch, n, c.width) for n in texts), leaf(batch, tokens, c.width, dtype=torch.float32)]
    vectors = [tuple(leaf(batch, c.width) for _ in range(n)) for n in block.vectors]
    inputs = [*xs, *(v for half in vectors for v in half)]
    return as_trained(lambda *_: block(xs, vectors, [None] * len(xs))), inputs, list(block.parameters())


@lru_cache(maxsize=8)
def _traces(config: Config, batch: int, pixels: int) -> tuple[Trace, list[Trace]]:
    """Of the model, and of each of its blocks: those that take the same modulation vectors are alike."""
    of: dict[str, Trace] = {}
    kinds = [str(block.vectors) for block in model_on_meta(config).blocks]
    for i, kind in enumerate(kinds):
        if kind not in of:
            of[kind] = trace(partial(one_block, config, i, batch, pixels), backward=True)
    return trace(partial(whole_model, config, batch, pixels), backward=True), [of[kind] for kind in kinds]


def activations(config: Config, batch: int, pixels: int) -> tuple[int, list[Kernel]]:
    """(bytes kept between forward and backward, kernels of a step with what is computed again)."""
    kind, neutral = config.parallel.checkpointing, replace(config, parallel=Parallel())
    whole, blocks = _traces(neutral, batch, pixels)
    if kind == "none":
        return whole.kept, whole.kernels
    c, tokens = config.model, (pixels // config.model.token_pixels) ** 2
    inputs = batch * c.width * (2 * TEXT_TOKENS + 4 * tokens)                    # a block's: text bf16, images fp32
    kept, kernels = max(0, whole.kept - sum(block.kept for block in blocks)), list(whole.kernels)
    for block in blocks:
        forward = block.kernels[: block.forward]
        stay = [k for k in forward if kind == "selective" and _stays(k)]
        kept += inputs + sum(sum(k.writes.values()) for k in stay)
        kernels += [k for k in forward if k not in stay]
    return kept + max(block.kept for block in blocks), kernels


def _stays(kernel: Kernel) -> bool:
    """Whether selective checkpointing keeps what a kernel writes; a product's output is a matrix."""
    if kernel.op not in parallel.PRODUCTS:
        return parallel.kept(kernel.op)
    (_, _, rows, columns), *_ = kernel.writes
    return parallel.kept(kernel.op, kernel.flops // (2 * rows * columns), columns)


def plan(config: Config, layout: Layout, sheet: Gpu, name: str, pixels: int) -> Plan:
    """The forecast of a run at `pixels` squared on `layout.gpus` of a GPU."""
    model = model_on_meta(config)
    sizes, parameters = units(model), sum(p.numel() for p in model.parameters())
    kept, kernels = activations(config, layout.local, pixels)
    shard = parameters / layout.shards
    blocks = [n for unit, n in sizes.items() if unit.startswith("block")]
    ahead = config.parallel.prefetch * max(blocks)
    gathered = sizes["rest"] + ahead + max(sizes["modulation"], *blocks)       # what computes, and the next blocks
    memory = {
        "weights, fp32, sharded": 4 * shard,
        "gradients, fp32, sharded": 4 * shard,
        "AdamW's moments, fp32, sharded": 8 * shard,
        "average (EMA), fp32, sharded": 4 * shard,
        "gathered units, bf16": 2 * gathered,
        "a unit's gradient before it is reduced, bf16 and fp32": 6 * max(sizes.values()),
        f"activations of {layout.local} samples": float(kept),
    }
    if layout.accumulate > 1 and layout.gpus > 1:                # added up here, reduced after the last part
        memory["gradients before they are reduced, whole, fp32"] = 4.0 * parameters
    if layout.gpus == 1:
        memory["a unit's gradient before it is reduced, bf16 and fp32"] = 0.0
    share = (layout.shards - 1) / layout.shards
    sent = {
        "all-gather of weights, bf16, forward and backward": 2 * 2 * parameters * share * layout.accumulate,
        "reduce-scatter of gradients, fp32": 4 * parameters * share,
        "all-reduce over replicas, fp32": 8 * shard * (layout.replicas - 1) / layout.replicas,
    }
    gather, reduce, across = sent.values()                  # shards of one model are neighbours; replicas are not
    network = (gather + reduce) / link(layout.shards) + across / link(layout.gpus)
    ceiling = assumed(sheet, name)
    compute = layout.accumulate * sum(seconds(k, ceiling) for k in kernels)
    compute += 4 * 8 * shard / ceiling.copy                                    # AdamW and the average: eight passes
    tokens = (pixels // config.model.token_pixels) ** 2
    flops = layout.local * layout.accumulate * training_flops(config.model, tokens).total
    mfu, bound = flops / compute / sheet.flops, flops / max(compute, network) / sheet.flops
    return Plan(memory, sent, compute, network, mfu, bound)


def find_gpu(name: str) -> tuple[Gpu, str]:
    """Raises: ValueError for a GPU that is not known."""
    full = by_prefix(name) or name
    known = gpu(full)
    if known is None:
        raise ValueError(f"plan: gpu is {name!r}; expected how one of these begins: {', '.join(GPUS)}")
    return known, full


def advice(config: Config, layout: Layout, sheet: Gpu, found: Plan, name: str, pixels: int) -> list[str]:
    """Whether it fits, and the first changes that make it fit, each tried."""
    room = 0.92 * sheet.memory                                   # the rest: CUDA's context, workspaces, fragmentation
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
        lines.append(f"  {kept / 1e9:8.2f} GB  {kind:9s}  kernels {took / least - 1:+.0%}")
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


