"""Processes: who they are, how a model is spread over them, and what they agree on.

A run started with torchrun is spread by FSDP2: every block is a unit, the stacked modulation (a third of all
parameters, used once per sample) another, the rest the root. Gradients are sums over the processes: each process's loss
is its samples' share of the whole batch's mean, so nothing is divided by a number of processes. Started without
torchrun there is one process and nothing is spread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmdit import adapters
from mmdit.adapters import Lora
from mmdit.config import MMDiTConfig
from mmdit.files import InUse, claimed
from mmdit.model import MMDiT, fill
from train.config import Parallel
from train.engine.rendezvous import fresh_store

NO_ADAPTER = Lora()
RECOMPILES = 64
"""Of a compiled block's forward, at most: beyond, a run that compiles whole blocks ends."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Of the processes that shard a model, or (replicas, shards); None without torchrun."""
    side: Any = None
    """A process group of its own for what runs beside training, in a thread: checkpoints."""
    talk: Any = None
    """And one, of the CPUs, for what the main thread tells meanwhile: Gloo pairs what two threads send over one group
    as it comes, and nobody has to wait for a GPU."""

    @property
    def main(self) -> bool:
        """Whether this process writes logs, pictures and weights."""
        return self.rank == 0

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of a batch: all parts together are the batch, in order."""
        return np.array_split(rows, self.size)[self.rank]

    def sums(self, *values: float) -> list[float]:
        """Of each value, over all processes; in fp64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        return self._reduced(values, dist.ReduceOp.MAX)

    def shared(self, value: Any) -> Any:
        """What the main process has, for all: anything that can be pickled."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]

    def _reduced(self, values: tuple[float, ...], op: Any) -> list[float]:
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.talk)
        return tensor.tolist()

    def added(self, value: Tensor) -> Tensor:
        """The sum over all processes, on the device: the host does not wait."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """The folder is this run's, of all its processes, for as long as it is open. Raises: InUse, in each of them."""
    with ExitStack() as stack:
        why = None
        if world.main:
            try:
                stack.enter_context(claimed(folder))
            except InUse as error:
                why = str(error)
        if why := world.shared(why):
            raise InUse(why)
        yield


@contextmanager
def world(device: str, parallel: Parallel) -> Iterator[World]:
    """Joins the processes that torchrun started, for as long as it is open.

    Args: device: "cuda" or "cpu".
    Raises: ValueError if the replicas do not divide the processes.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(torch.device(device))
        return
    size, rank, local = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if size % parallel.replicas:
        raise ValueError(f"parallel.replicas is {parallel.replicas}; expected a divisor of the {size} processes")
    here = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    timeout = timedelta(minutes=parallel.timeout_minutes)
    store, rank, size = fresh_store(timeout)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        shape: tuple[int, ...] = (size,)
        names: tuple[str, ...] = ("shard",)
        if parallel.replicas > 1:
            shape, names = (parallel.replicas, size // parallel.replicas), ("replicate", "shard")
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        side, talk = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        yield World(here, rank, size, mesh, side, talk)
        dist.barrier()                                     # who leaves first takes the others' connections along
    finally:
        dist.destroy_process_group()


def build(
    config: MMDiTConfig, parallel: Parallel, world: World, seed: int, bf16: bool, lora: Lora = NO_ADAPTER,
    store: torch.dtype = torch.float32,
) -> MMDiT:  # fmt: skip
    """A model with initial weights that are the same on any number of processes.

    In this order: adapters, activation checkpointing, compilation per block, sharding. Trained weights are stored as
    `store`; with `bf16` they are gathered in bf16 and gradients reduced in fp32. What adapters leave frozen is stored
    in bf16 then, and its values are not set. Inputs are not cast: timesteps stay fp32.
    """
    with torch.device("meta"):
        model = MMDiT(config)
    if lora.rank:
        adapters.attach(model, lora)
        for parameter in frozen(model).values() if bf16 else ():
            parameter.data = parameter.data.bfloat16()
    for parameter in trained(model).values():
        parameter.data = parameter.data.to(store)
    if parallel.compile:                                # kinds of blocks, times latent sizes, times adapters on and off
        torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)
    block: Any
    for block in model.blocks:
        if parallel.checkpointing == "full":
            block.leaves_pending = False                # one tensor of each stream is kept, not two
        if parallel.checkpointing != "none":
            block.forward = _checkpointed(block.forward, parallel.checkpointing)
        if parallel.compile:
            block.compile(fullgraph=True)
    if world.mesh is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for unit in (*model.blocks, model.modulation.linear, model):
            fully_shard(unit, mesh=world.mesh, mp_policy=policy)
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)     # Gloo has no scaled sums: its average silently sums
        _prefetch(model, parallel.prefetch)
    model.to_empty(device=world.device)
    initialise(model, seed)
    return model


def _prefetch(model: MMDiT, ahead: int) -> None:
    """While a unit computes, the weights of the next blocks are gathered."""
    order: list[Any] = [model.modulation.linear, *model.blocks]
    for i, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[i + 1 : i + 1 + ahead])
        unit.set_modules_to_backward_prefetch(order[max(0, i - ahead) : i][::-1])


SDPA = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
PRODUCTS = ("aten.mm", "aten.addmm")
ATTENTION = {"rfkernels.joint_attention", *(f"aten._scaled_dot_product_{kind}" for kind in SDPA)}


def kept(op: str, inner: int = 0, columns: int = 0) -> bool:
    """Whether selective checkpointing keeps the output of an operator: attention, and products [., inner] by [inner,
    columns] that do not widen (a block's two projections back to its width). These cost most to compute again for what
    they occupy. What qkv and the MLP's first layer give, seven of a block's eleven widths, is computed again."""
    return op in ATTENTION or (op in PRODUCTS and inner >= columns)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(op).removesuffix(".default")
    sizes = args[-1].shape if name in PRODUCTS else ()
    return CheckpointPolicy.MUST_SAVE if kept(name, *sizes) else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A forward whose activations are computed again in the backward. A function of its own, not a `partial`: Dynamo
    passes over checkpoint itself as over all of PyTorch's code, and would compile nothing."""
    more: dict[str, Any] = {}
    if kind == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **more)

    return checkpointed


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What optimizer, average and checkpoints hold."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without what is frozen, and then without buffers too: those are the base's."""
    state = model.state_dict()
    return {name: state[name] for name in trained(model)} if frozen(model) else state


@torch.no_grad()
def initialise(model: MMDiT, seed: int) -> None:
    """Each parameter from a generator keyed by (seed, its name); a parameter is whole in memory one at a time. Of what
    is frozen only the norms, which a base may lack: the rest is loaded."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith("norm.weight"):
            continue
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        whole = torch.empty(parameter.shape)
        fill(name, whole, generator)
        parameter.copy_(like(parameter, whole))
    model.patch_embed.fill_positions()


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread as a parameter is."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main process; the others, which all have to take part, keep nothing."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            found[name] = whole.detach().cpu()
        del whole
    return found


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over the processes, or only adds them up here."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@contextmanager
def resharded(model: MMDiT, *, settle: bool) -> Iterator[None]:
    """Around a look at a model whose weights are others for a while: FSDP leaves the root gathered after a forward, and
    the next one would compute with what it gathered before, not with the shards that have come back.

    Args: settle: no forward has been run yet. FSDP takes for its root whatever runs first, which sampling must not be.
    """
    spread = isinstance(model, FSDPModule)
    if spread and settle:
        c, device = model.config, model.patch_embed.pos_embed.device
        text = (1, c.text_split + 1, c.context_dim), (1, c.pooled_dim)
        shapes = (1, c.in_channels, c.patch_size, c.patch_size), (1,), *text
        with torch.no_grad():
            model(*(torch.zeros(shape, device=device) for shape in shapes))
    try:
        if spread:
            model.reshard()                                                                         # type: ignore[operator]
        yield
    finally:
        if spread:
            model.reshard()                                                                         # type: ignore[operator]


def gather_root(model: nn.Module) -> None:
    """Until the model is resharded, parts that are no unit may be called by themselves, as sampling does."""
    if isinstance(model, FSDPModule):
        model.unshard()
