"""The whole model, a training step and a sampling step: ours against the same weights in eager PyTorch, diffusers and,
on a GPU, compilers. On a CPU at d = 6, which is what it can do; on a GPU at d = 24 and 38 in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import environment, models
from bench.breakdown import breakdown
from bench.measure import Call, Samples, interleaved
from bench.models import STEPS
from mmdit.cost.hardware import gpu

DEVICE = environment.device()
CASES = [(size, step) for size in (models.GPU if DEVICE.type == "cuda" else models.CPU) for step in STEPS]
SIZES = {size.name(step): (size, step) for size, step in CASES}
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
Breakdown = tuple[dict[str, float], int | None]


def training(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    model(*inputs).square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def sampling(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        model(*inputs)


def outputs(model: nn.Module, inputs: tuple[Tensor, ...], step: str) -> list[Tensor]:
    """What has to agree: the velocity, and in training the gradient of the text's projection, which passes through
    every block."""
    with torch.set_grad_enabled(step == "training"):
        out = model(*inputs)
        if step != "training":
            return [out]
        named = dict(model.named_parameters())
        wanted = [named[n] for n in ("context_embed.0.weight", "theirs.context_embedder.weight") if n in named]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), wanted)]


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:100]}"


def disagreement(got: list[Tensor], exact: list[Tensor]) -> str | None:
    off = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, exact, strict=True))
    return None if off < (0.05 if DTYPE is torch.bfloat16 else 1e-3) else f"not the same function: off by {off:.1%}"


@cache
def measured(name: str) -> tuple[dict[str, Samples], dict[str, str], dict[str, Breakdown]]:
    """(samples by contender, why the others were left out, where their time goes)."""
    size, step = SIZES[name]
    torch._dynamo.reset()                         # sizes share code, and past eight of one a compiler gives up
    ways = models.contenders(size, DEVICE, DTYPE)
    inputs = models.inputs(size, DEVICE, DTYPE)
    run = training if step == "training" else sampling
    exact, wrong = outputs(ways["eager"], inputs, step), {}
    for way, model in ways.items():
        try:
            found = disagreement(outputs(model, inputs, step), exact)
            run(model, inputs)                    # all of it, before it is timed with others
        except Exception as error:                # a compiler may fail, memory may end; said so, and left out
            found = why(error)
            if way in ("ours", "eager"):
                raise
        if found:
            wrong[way] = found
    assert "ours" not in wrong and "eager" not in wrong, wrong
    del exact

    def calling(model: nn.Module) -> Call:
        return lambda i: run(model, inputs)

    calls = {way: calling(model) for way, model in ways.items() if way not in wrong}
    samples = interleaved(calls, DEVICE)
    return samples, wrong, {way: breakdown(lambda call=call: call(0)) for way, call in calls.items()}


def record(name: str, way: str) -> dict[str, Any]:
    size, step = SIZES[name]
    samples, _, broken_down = measured(name)
    one, flops, base = samples[way], size.flops(step), models.names()
    found: dict[str, Any] = {
        "contender": way, "step": step, **size.record(), "dtype": str(DTYPE).removeprefix("torch."),
        "spread": round(one.spread, 4), "graph": one.graph, "peak_bytes": one.peak_bytes,
        "img/s": round(size.batch / one.median, 3), "flops": flops, "TFLOP/s": round(flops / one.median / 1e12, 3),
    }  # fmt: skip
    seconds, kernels = broken_down[way]
    total = sum(seconds.values())                 # the profiler slows what it watches: shares of the time, not times
    found["breakdown"] = {kind: round(one.median * s / total, 6) for kind, s in seconds.items()}
    if kernels is not None:
        found["launches_profiled"] = kernels
    if known := gpu(environment.device_name()):
        found["MFU"] = round(flops / one.median / known.flops, 4)
    if way in ("ours", "eager"):
        count = models.counted(size, step, way, DTYPE)
        found |= {"launches": count.launches, "moved_bytes": count.bytes, "kept_bytes": count.kept}
    if way == "ours":
        found["ratio"] = one.over(samples["eager"])
        if "diffusers" in base and "diffusers" in samples:
            found["ratio_diffusers"] = one.over(samples["diffusers"])
        best = min((n for n in samples if not n.startswith("ours")), key=lambda n: samples[n].median)
        found["best_other"], found["speedup_over_best"] = best, round(samples[best].over(one), 3)
    return found


@pytest.mark.parametrize("way", models.names())
@pytest.mark.parametrize("name", SIZES)
def test_model(name: str, way: str, report: Callable[..., None], request: Any) -> None:
    if not environment.asked_for(name, request.config.getoption("--ops")):
        pytest.skip("not asked for")
    samples, wrong, _ = measured(name)
    if way in wrong:
        pytest.skip(f"{way}: {wrong[way]}")
    report(name, samples[way].seconds, **record(name, way))
