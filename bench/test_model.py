"""The whole model against diffusers' with the same weights, in one run: a training step and a sampling step.

On a CPU at d = 6, which is what it can do; on a GPU at d = 24 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import environment
from bench.measure import Samples, interleaved
from mmdit import MMDiT, presets
from mmdit.flops import training_flops

DEVICE = environment.device()
DEPTH, BATCH, DTYPE = (24, 32, torch.bfloat16) if DEVICE.type == "cuda" else (6, 2, torch.float32)
LATENT, TEXT, MOST = 32, 154, 64                # 256 pixels
STEPS = ("training", "sampling")
CONTENDERS = ("ours", "diffusers")


def models() -> tuple[nn.Module, nn.Module]:
    """(ours, diffusers'), the same function."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    from tests.mmdit.test_diffusers_parity import carried_over

    theirs = diffusers.SD3Transformer2DModel(
        sample_size=LATENT, num_layers=DEPTH, attention_head_dim=64, num_attention_heads=DEPTH,
        joint_attention_dim=4096, caption_projection_dim=64 * DEPTH, pooled_projection_dim=2048,
        pos_embed_max_size=MOST, qk_norm="rms_norm",
    )  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.03)
    ours = MMDiT(presets.by_depth(DEPTH, qk_norm=True, max_height=16 * MOST, max_width=16 * MOST))
    ours.load_state_dict(carried_over(theirs.state_dict(), (), True, MOST, DEPTH))
    return ours.to(DEVICE, DTYPE), theirs.to(DEVICE, DTYPE)


def batch() -> list[Tensor]:
    shapes = [(BATCH, 16, LATENT, LATENT), (BATCH, TEXT, 4096), (BATCH, 2048)]
    latent, context, pooled = (torch.randn(s, device=DEVICE, dtype=DTYPE) for s in shapes)
    return [latent, torch.rand(BATCH, device=DEVICE), context, pooled]


@cache
def measured(step: str) -> dict[str, Samples]:
    ours, theirs = models()
    latent, t, context, pooled = batch()
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(latent, t, context, pooled),
        "diffusers": lambda: theirs(latent, context, pooled, 1000 * t, return_dict=False)[0],
    }
    with torch.no_grad():
        a, b = forwards["ours"](), forwards["diffusers"]()
    off = float((a - b).norm() / b.norm())
    assert off < (0.05 if DEVICE.type == "cuda" else 1e-4), f"not the same function: off by {off:.1e}"

    def training(forward: Callable[[], Tensor], model: nn.Module) -> Callable[[int], None]:
        def step(i: int) -> None:
            forward().square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = None

        return step

    def sampling(forward: Callable[[], Tensor], model: nn.Module) -> Callable[[int], None]:
        def step(i: int) -> None:
            with torch.no_grad():
                forward()

        return step

    make = sampling if step == "sampling" else training
    return interleaved({n: make(forwards[n], m) for n, m in (("ours", ours), ("diffusers", theirs))}, DEVICE)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("step", STEPS)
def test_model(step: str, contender: str, report: Callable[..., None]) -> None:
    samples = measured(step)
    one = samples[contender]
    record: dict[str, Any] = {"contender": contender, "spread": round(one.spread, 4), "img/s": BATCH / one.median}
    if contender == "ours":
        record["ratio"] = one.over(samples["diffusers"])
        peak = environment.peak_flops(environment.device_name())
        if peak and step == "training":
            record["MFU"] = BATCH * training_flops(presets.by_depth(DEPTH), 256, TEXT).total / one.median / peak
    report(f"d = {DEPTH}, 256 pixels, batch {BATCH}, {step} step", one.seconds, **record)
