"""One training step and one sampling step by kernel: python -m bench.profile

On a GPU at d = 24, 256 pixels, batch 32; on a CPU at d = 6. With --ops, of the ops whose names hold one of these
instead, forward and backward, in every way that the bench knows. With --kernels, for Nsight Compute: one call of each
op between cudaProfilerStart and Stop, and nothing printed.
"""

from __future__ import annotations

import argparse

import torch

from bench import environment, models
from bench.cases import cases
from bench.test_model import DTYPE, sampling, training
from bench.test_ops import gradients, leaves


def steps() -> None:
    device = environment.device()
    size = (models.GPU if device.type == "cuda" else models.CPU)[0]
    ways = models.contenders(size, device, DTYPE, only=("ours", "eager"))
    inputs = models.inputs(size, device, DTYPE)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(environment.environment())
    for step, run in (("training", training), ("sampling", sampling)):
        for way, model in ways.items():
            run(model, inputs)
            with torch.profiler.profile() as profiled:
                run(model, inputs)
            print(f"\n{size.name(step)}, {way}")
            print(profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))


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
    given = parser.parse_args()
    kernels() if given.kernels else ops(given.ops) if given.ops else steps()


if __name__ == "__main__":
    main()
