"""One training step and one sampling step by kernel: python -m bench.profile

On a GPU at d = 24, 256 pixels, batch 32; on a CPU at d = 6. With --ops, of the ops whose names hold one of these
instead, forward and backward, in every way that the bench knows. With --kernels, for Nsight Compute: one call of each
op between cudaProfilerStart and Stop, and nothing printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch.autograd import DeviceType

from bench import environment, models
from bench.cases import cases
from bench.test_model import DTYPE, sampling, training
from bench.test_ops import gradients, leaves

STEPS_IN_A_ROW = 3


def busy(call: Callable[[], object]) -> str:
    """Milliseconds of a step in which the GPU computes, of those that it lasts: of several in a row, while nobody
    watches the host, which that slows."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS_IN_A_ROW):
            call()
        torch.cuda.synchronize()
    kernels = [e.time_range for e in profiled.events() if e.device_type == DeviceType.CUDA]
    if not kernels:
        return "the profiler saw no kernel"
    computing, lasted = covered([(k.start, k.end) for k in kernels])
    each = 1e3 * STEPS_IN_A_ROW                                          # of microseconds
    return f"the GPU computes in {computing / each:.1f} of {lasted / each:.1f} ms, {len(kernels)} launches in all"


def covered(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(time in which at least one of the spans runs, time from the first start to the last end)."""
    ordered = sorted(spans)
    first = reached = ordered[0][0]
    inside = 0.0
    for start, end in ordered:
        inside += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return inside, reached - first


def steps(wanted_steps: str) -> None:
    device = environment.device()
    size = (models.GPU if device.type == "cuda" else models.CPU)[0]
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(environment.environment())
    runs: list[tuple[torch.dtype, tuple[str, ...]]] = [(DTYPE, ("ours", "eager"))]
    if device.type == "cuda":
        runs.append((torch.float32, ("ours",)))                          # under autocast, as training has it
    for dtype, wanted in runs:
        autocasting = dtype != DTYPE
        ways = models.contenders(size, device, dtype, only=wanted)
        inputs = models.inputs(size, device, dtype)
        for (step, run), way in product((("training", training), ("sampling", sampling)), wanted):
            if not environment.asked_for(step, wanted_steps):
                continue
            call = partial(run, models.Autocast(ways[way]) if autocasting else ways[way], inputs)
            call()
            print(f"\n{size.name(step)}, {way}{', autocast over fp32 weights' * autocasting}", flush=True)
            if device.type == "cuda":
                print(busy(call), flush=True)
            with torch.profiler.profile() as profiled:
                call()
            print(profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60), flush=True)


def ops(names: str) -> None:
    device = environment.device()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(environment.environment())
    for case in (case for case in cases(device) if environment.asked_for(case.name, names)):
        inputs = leaves(case)
        grads = [torch.randn_like(out) for out in case.contenders["eager"](*inputs)]
        for way, op in case.contenders.items():
            gradients(op, inputs, grads)                         # compiled before it is watched
            with torch.profiler.profile() as profiled:
                gradients(op, inputs, grads)
            print(f"\n{case.name}, {way}")
            print(profiled.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=90))


def kernels() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: --kernels is for a GPU; there is none")
    for case in cases(environment.device())[:5]:
        inputs = leaves(case)
        op = case.contenders["ours"]
        grads = [torch.randn_like(out) for out in op(*inputs)]
        gradients(op, inputs, grads)                             # compiled before it is watched
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        gradients(op, inputs, grads)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="one call of each op, for Nsight Compute")
    parser.add_argument("--ops", default="", help="cases, one;another: their kernels by every contender")
    parser.add_argument("--steps", default="training;sampling", help="which steps of the model (both)")
    given = parser.parse_args()
    kernels() if given.kernels else ops(given.ops) if given.ops else steps(given.steps)


if __name__ == "__main__":
    main()
