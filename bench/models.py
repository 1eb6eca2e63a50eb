"""The model and its blocks at the sizes of the paper, and the ways to run them that are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import rfkernels
from bench import eager
from bench.environment import excluded, importable, pretending
from mmdit import MMDiT, blocks, presets
from mmdit.cost import counting
from mmdit.cost.counting import Trace, made_in
from mmdit.cost.flops import TEXT_TOKENS, training_flops

PIXELS_PER_TOKEN = 16
STEPS = ("training", "sampling")
"""Forward and backward; forward alone. No optimizer."""


@dataclass(frozen=True)
class Size:
    """A model of the paper's series on square images."""

    depth: int
    pixels: int
    batch: int

    @property
    def tokens(self) -> int:
        return (self.pixels // PIXELS_PER_TOKEN) ** 2

    def flops(self, step: str) -> float:
        """Model FLOPs of a step."""
        one = training_flops(presets.by_depth(self.depth), self.tokens, TEXT_TOKENS).total
        return self.batch * one / (1 if step == "training" else 3)

    def name(self, step: str) -> str:
        return f"d{self.depth}-{self.pixels}px-B{self.batch} {step} step"

    def record(self) -> dict[str, int]:
        return asdict(self)


# Batches that fill an H200 (139 GiB) in training with what eager PyTorch keeps, and 1.
GPU = (Size(24, 256, 32), Size(24, 512, 8), Size(24, 1024, 2), Size(24, 256, 1), Size(38, 256, 8), Size(38, 1024, 1))
CPU = (Size(2, 64, 1),) if pretending() else (Size(6, 256, 2),)


def ours(size: Size) -> MMDiT:
    """With weights that are not zero anywhere, on torch's default device."""
    made = MMDiT(presets.by_depth(size.depth, resolution=size.pixels))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.03)
    return made


def parameters(depth: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(presets.by_depth(depth)).parameters())


def inputs(size: Size, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
    """(latent, timestep, context, pooled)"""
    config, side = presets.by_depth(size.depth), size.pixels // 8
    shapes = [(config.in_channels, side, side), (TEXT_TOKENS, config.context_dim), (config.pooled_dim,)]
    latent, context, pooled = (torch.randn(size.batch, *s, device=device, dtype=dtype) for s in shapes)
    return latent, torch.rand(size.batch, device=device), context, pooled


class Diffusers(nn.Module):
    """diffusers' model, called like ours."""

    def __init__(self, size: Size) -> None:
        from diffusers import SD3Transformer2DModel

        super().__init__()
        c = presets.by_depth(size.depth, resolution=size.pixels)
        self.most = c.max_tokens[0]
        self.theirs = SD3Transformer2DModel(
            sample_size=size.pixels // 8, num_layers=c.depth, attention_head_dim=c.head_dim,
            num_attention_heads=c.heads, joint_attention_dim=c.context_dim, caption_projection_dim=c.width,
            pooled_projection_dim=c.pooled_dim, pos_embed_max_size=self.most, qk_norm="rms_norm",
        )  # fmt: skip

    def give_weights_to(self, ours: MMDiT) -> None:
        from tests.mmdit.test_diffusers_parity import carried_over

        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.03)
        ours.load_state_dict(carried_over(self.theirs.state_dict(), (), True, self.most, ours.config.depth))

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        out: Tensor = self.theirs(latent, context, pooled, 1000 * timestep, return_dict=False)[0]
        return out


COMPILED: dict[str, tuple[Callable[[MMDiT], Any], str | None]] = {
    "ours, compiled": (eager.twin, None),
    "compile": (eager.model, None),
    "max-autotune": (eager.model, "max-autotune-no-cudagraphs"),
}


def names() -> list[str]:
    """The ways to run a model that this machine has."""
    found = ["ours", "eager"] + ["diffusers"] * importable("diffusers")
    every = [*found, *COMPILED] if torch.cuda.is_available() else found
    return [name for name in every if name not in excluded()]


def contenders(
    size: Size, device: torch.device, dtype: torch.dtype, only: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Those (or `only` these), as one function on the same weights; memory is shared by all but diffusers'."""
    wanted = names() if only is None else list(only)
    with device, made_in(dtype):
        source = ours(size)
        found: dict[str, nn.Module] = {"ours": source, "eager": eager.model(source)}
        if "diffusers" in wanted:
            theirs = Diffusers(size)
            theirs.give_weights_to(source)
            found["diffusers"] = theirs
    for name in wanted:
        if name in COMPILED:
            build, mode = COMPILED[name]
            found[name] = build(source)
            found[name].blocks = nn.ModuleList(eager.twin(block) for block in found[name].blocks)
            for block in found[name].blocks:             # all but the last are one graph, compiled once
                block.compile(fullgraph=True, dynamic=False, mode=mode)
    return found


class Autocast(nn.Module):
    """A model with fp32 parameters and inputs under autocast: its residual stream is fp32, its branches are bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return self.model(*inputs)


@contextmanager
def one_dtype() -> Iterator[None]:
    """Inside, our blocks use the ops as if they took one dtype only, as they did: what is bf16 is cast to the stream's
    fp32 before them, and autocast casts what they give before the next product."""

    def wide(op: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        return lambda x, *rest: op(x, *(t.to(x.dtype) for t in rest), **settings)

    ops = {
        "adaln": wide(rfkernels.adaln, dtype=torch.float32),
        "gated_adaln": wide(rfkernels.gated_adaln, dtype=torch.float32),
        "gated_residual": wide(rfkernels.gated_residual),
    }
    with patch.multiple(blocks, **ops):
        yield


def counted(size: Size, step: str, way: str, dtype: torch.dtype = torch.bfloat16, autocast: bool = False) -> Trace:
    """What a step of "ours" or "eager" launches on a GPU; of "ours, one dtype" see `one_dtype`."""

    def make() -> counting.Made:
        with made_in(dtype):
            made: nn.Module = MMDiT(presets.by_depth(size.depth, resolution=size.pixels))
        if way == "eager":
            made = eager.model(made, eager.rms_norm_as_on_a_gpu)
        return Autocast(made) if autocast else made, list(inputs(size, dtype=dtype)), list(made.parameters())

    with one_dtype() if way == "ours, one dtype" else nullcontext():
        return counting.trace(make, backward=step == "training")
