"""The forecast of a run: memory by component, communication and time per GPU."""

from __future__ import annotations

from dataclasses import dataclass

from mmdit import MMDiT
from mmdit.cost.flops import training_flops
from mmdit.cost.hardware import Gpu, assumed, seconds
from train.config import Config
from train.planning.activations import activations, model_on_meta

NETWORK = {"within a node": 450e9, "between nodes": 50e9}
"""Bytes per second and GPU, each way: NVLink 4, and a 400 Gb/s adapter for each GPU; by their data sheets."""
PER_NODE = 8
MOMENTS = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0 + 8 / 256}
"""Bytes of AdamW's two moments a parameter; with 8 bits two scales for 256 of them."""


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
    """Seconds of communication a step, if nothing else ran."""
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


def units(model: MMDiT, trained: bool = False) -> dict[str, int]:
    """Parameters of FSDP's units, or those that are trained: each block, the stacked modulation, the rest."""
    count = lambda module: sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)  # noqa: E731
    found = {f"block {i}": count(block) for i, block in enumerate(model.blocks)}
    found["modulation"] = count(model.modulation)
    found["rest"] = count(model) - sum(found.values())
    return found


def plan(config: Config, layout: Layout, sheet: Gpu, name: str, pixels: int) -> Plan:
    """The forecast of a run at `pixels` squared on `layout.gpus` of a GPU."""
    model = model_on_meta(config)
    sizes, parameters = units(model), sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept, kernels = activations(config, layout.local, pixels)
    shard, frozen = trained / layout.shards, (parameters - trained) / layout.shards
    blocks = [n for unit, n in sizes.items() if unit.startswith("block")]
    ahead = config.parallel.prefetch * max(blocks)
    gathered = sizes["rest"] + ahead + max(sizes["modulation"], *blocks)       # what computes, and the next blocks
    held = config.optimizer
    stored = 2 if held.weights == "bf16" else 4
    memory = {
        **({"frozen weights, bf16, sharded": 2 * frozen} if frozen else {}),
        f"weights, {held.weights}, sharded": stored * shard,
        f"gradients, {held.weights}, sharded": stored * shard,
        f"AdamW's moments, {held.states}, sharded": MOMENTS[held.states] * shard,
        "average (EMA), fp32, sharded": 4 * shard,
        "gathered units, bf16": 2 * gathered,
        "a unit's gradient before it is reduced, bf16 and fp32": 6 * max(units(model, trained=True).values()),
        f"activations of {layout.local} samples": float(kept),
    }
    if layout.accumulate > 1 and layout.gpus > 1:                # added up here, reduced after the last part
        memory["gradients before they are reduced, whole, fp32"] = 4.0 * trained
    if layout.gpus == 1:
        memory["a unit's gradient before it is reduced, bf16 and fp32"] = 0.0
        if frozen:                                       # nothing is gathered; autocast casts no weight that is bf16
            memory["gathered units, bf16"] = 2.0 * trained
    share = (layout.shards - 1) / layout.shards
    sent = {
        "all-gather of weights, bf16, forward and backward": 2 * 2 * parameters * share * layout.accumulate,
        "reduce-scatter of gradients, fp32": 4 * trained * share,
        "all-reduce over replicas, fp32": 8 * shard * (layout.replicas - 1) / layout.replicas,
    }
    gather, reduce, across = sent.values()                  # shards of one model are neighbours; replicas are not
    network = (gather + reduce) / link(layout.shards) + across / link(layout.gpus)
    ceiling = assumed(sheet, name)
    compute = layout.accumulate * sum(seconds(k, ceiling) for k in kernels)
    compute *= config.flops_share / (config.pictures * (2 if frozen else 3) / 3)                # a reference's forward
    compute += 4 * 8 * shard / ceiling.copy                                    # AdamW and the average: eight passes
    tokens = (pixels // config.model.token_pixels) ** 2
    flops = layout.local * layout.accumulate * training_flops(config.model, tokens).total
    flops *= config.flops_share
    mfu, bound = flops / compute / sheet.flops, flops / max(compute, network) / sheet.flops
    return Plan(memory, sent, compute, network, mfu, bound)
