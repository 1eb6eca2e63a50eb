"""Where the time of a call goes, by what the kernels are for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

KINDS = {
    "fused by a compiler": r"triton_(poi|red|per|tem)_fused|_fused_.*_kernel$",
    "attention": r"attention|flash|fmha|sdpa|key_rstd",
    "modulation": r"adaln|gated_|sum_partials|layer_norm|LayerNorm|rms_norm",
    "matrix products": r"gemm|matmul|addmm|\bmm\b|::mm|::bmm|cutlass|nvjet|cublas|wgmma|splitKreduce|conv",
    "memory": r"copy|memcpy|memset|fill|cat",
}
"""By the first pattern that a kernel's name (on a CPU an operator's) contains; else "elementwise and sums"."""


def kind(name: str) -> str:
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "elementwise and sums")


def breakdown(call: Callable[[], Any]) -> tuple[dict[str, float], int | None]:
    """(seconds by kind, kernels launched; None on a CPU) of one call, by torch.profiler."""
    on_gpu = torch.cuda.is_available()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile() as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    kernels = 0
    for event in profiled.key_averages():
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not took or (on_gpu and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        seconds[kind(event.key)] = seconds.get(kind(event.key), 0.0) + took * 1e-6
        kernels += event.count
    return seconds, kernels if on_gpu else None
