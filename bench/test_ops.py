"""Every op and the block at SD3's shapes, forward and forward + backward, ours against eager, compilers, libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import rfkernels
from bench import environment
from bench.breakdown import breakdown
from bench.cases import HEAD_DIM, BlockOp, Case, Op, cases
from bench.measure import Samples, copies_beyond_cache, interleaved
from mmdit.cost.counting import Made, Trace, trace
from mmdit.cost.hardware import gpu

DEVICE = environment.device()
CASES = {case.name: case for case in cases(DEVICE)}
DIRECTIONS = ("forward", "both")


def gradients(op: Op, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    wanted = [*inputs, *getattr(op, "weights", [])]
    return list(torch.autograd.grad(op(*inputs), wanted, grads))


def leaves(case: Case) -> list[Tensor]:
    return [t.requires_grad_() for t in case.make()]


def agrees(case: Case, op: Op) -> str | None:
    """None, or what is wrong: a contender that computes something else, or cannot run, is not timed."""
    inputs = leaves(case)
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in case.contenders["eager"](*inputs)]
    try:
        got = gradients(op, inputs, grads)
    except Exception as error:                    # a library may refuse a shape or a GPU; said so, and left out
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:100]}"
    try:
        with rfkernels.backend("reference"):
            exact = gradients(case.contenders["ours"], inputs, grads)
    except torch.OutOfMemoryError:                # the definition holds all scores in fp32; eager does not
        exact = gradients(case.contenders["eager"], inputs, grads)
    for a, b in zip(got, exact, strict=True):
        off = float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-20))
        if not off < 0.05:
            return f"a gradient is off by {off:.1%}"
    return None


@cache
def measured(name: str, direction: str) -> tuple[dict[str, Samples], dict[str, str], dict[str, int | None]]:
    """(samples by contender, why the others were left out, kernels launched as the profiler counts them)."""
    case = CASES[name]
    torch._dynamo.reset()                         # shapes share code, and past eight of one a compiler gives up
    wrong = {n: why for n, op in case.contenders.items() if (why := agrees(case, op))}
    assert "ours" not in wrong and "eager" not in wrong, wrong
    input_bytes = sum(t.numel() * t.element_size() for t in case.make())
    sets = [leaves(case) for _ in range(copies_beyond_cache(DEVICE, input_bytes))]
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in case.contenders["eager"](*sets[0])]

    def calling(op: Op) -> Callable[[int], object]:
        if direction == "both":
            return lambda i: gradients(op, sets[i % len(sets)], grads)

        def forward(i: int) -> object:
            with torch.no_grad():
                return op(*sets[i % len(sets)])

        return forward

    calls = {n: calling(op) for n, op in case.contenders.items() if n not in wrong}
    samples = interleaved(calls, DEVICE)
    on_gpu = DEVICE.type == "cuda"
    profiled = {n: breakdown(lambda call=call: call(0))[1] for n, call in calls.items()} if on_gpu else {}
    free(case)
    return samples, wrong, profiled


def counted(case: Case, contender: str, direction: str) -> Trace:
    """What the case launches and keeps on a GPU, by shapes."""

    def make() -> Made:
        op = case.counted.get(contender, case.contenders[contender])
        inputs = [t.requires_grad_() for t in case.make()]
        return op, inputs, getattr(op, "weights", [])

    try:
        return trace(make, backward=direction == "both")
    finally:
        free(case)                                                   # its weights were fake


def free(case: Case) -> None:
    for op in (*case.contenders.values(), *case.counted.values()):
        if isinstance(op, BlockOp):
            op.free()


def record(case: Case, direction: str, contender: str) -> dict[str, Any]:
    samples, _, profiled = measured(case.name, direction)
    one = samples[contender]
    moved = case.forward_bytes + (direction == "both") * case.backward_bytes
    flops = case.forward_flops + (direction == "both") * case.backward_flops
    found: dict[str, Any] = {
        "contender": contender,
        "spread": round(one.spread, 4),
        "graph": one.graph,
        "peak_bytes": one.peak_bytes,
        "least_bytes": moved,
        "flops": flops,
    }
    if moved:
        found["GB/s"] = round(moved / one.median / 1e9, 1)
        found["of_copy"] = round(moved / one.median / environment.copy_bandwidth(), 3)
    if flops:
        found["TFLOP/s"] = round(flops / one.median / 1e12, 3)
        if known := gpu(environment.device_name()):
            found["MFU"] = round(flops / one.median / known.flops, 4)
    if contender in ("ours", "eager"):
        count = counted(case, contender, direction)
        found |= {"launches": count.launches, "moved_bytes": count.bytes, "kept_bytes": count.kept}
    if contender in profiled:
        found["launches_profiled"] = profiled[contender]
    if contender == "eager" and case.name.startswith(("joint_attention", "block")):
        inputs = case.make()
        length, batch = inputs[0].shape[1] + inputs[1].shape[1], inputs[0].shape[0]
        heads = inputs[0].shape[3] if inputs[0].ndim == 5 else inputs[0].shape[2] // HEAD_DIM
        found["sdpa"] = environment.sdpa_backend(batch, length, heads)
    if contender == "ours":
        found["ratio"] = one.over(samples["eager"])
        best = min((n for n in samples if not n.startswith("ours")), key=lambda n: samples[n].median)
        found["best_other"], found["speedup_over_best"] = best, round(samples[best].over(one), 3)
        if not case.name.startswith("block"):
            found["runs"] = explained(case, leaves(case)).splitlines()[0]
    return found


def explained(case: Case, inputs: list[Tensor]) -> str:
    op, packed = case.name.split("-")[0], rfkernels.Stream.packed
    if op == "joint_attention":
        text, image, *weights = inputs
        return rfkernels.explain(op, [packed(text, *weights[:2]), packed(image, *weights[2:])])
    if op == "patch_unembed":
        side = 2 * int(inputs[0].shape[1] ** 0.5)
        return rfkernels.explain(op, *inputs, height=side, width=side)
    return rfkernels.explain(op, *inputs)


@pytest.mark.parametrize(
    "name, direction, contender",
    [(name, d, c) for name, case in CASES.items() for d in DIRECTIONS for c in case.contenders],
)
def test_op(name: str, direction: str, contender: str, report: Callable[..., None], request: Any) -> None:
    if not environment.asked_for(name, request.config.getoption("--ops")):
        pytest.skip("not asked for")
    samples, wrong, _ = measured(name, direction)
    if contender in wrong:
        pytest.skip(f"{contender}: {wrong[contender]}")
    report(f"{name} {direction}", samples[contender].seconds, **record(CASES[name], direction, contender))
