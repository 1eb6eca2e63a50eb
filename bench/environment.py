"""What a measurement ran on, and what that machine can do at most. A figure without this is not a figure."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from mmdit.cost.hardware import Ceilings


def pretending() -> bool:
    """Whether a script for a GPU is tried on a CPU: `bench/gpu.sh --pretend`, at sizes that show nothing but that it
    runs."""
    return os.environ.get("BENCH_PRETEND") == "1"


def excluded() -> frozenset[str]:
    """Contenders that are left out, BENCH_WITHOUT="max-autotune;ours, compiled"."""
    return frozenset(os.environ.get("BENCH_WITHOUT", "").split(";")) - {""}


def asked_for(name: str, ops: str) -> bool:
    """Whether a case's name holds one of `--ops a;b`."""
    return any(part in name for part in ops.split(";"))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str | None:
    """The CPU's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return None


def environment() -> dict[str, Any]:
    packages = ("torch", "triton", "diffusers", "liger-kernel", "flash-attn", "flash-attn-4", "quack-kernels")
    return {
        "device": device_name(),
        "processor": processor(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cores": torch.get_num_threads(),
        **{name: found for name in packages if (found := version(name))},
    }


def importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def sdpa_backend(batch: int, tokens: int, heads: int) -> str:
    """The kernel that PyTorch's attention really runs, as the profiler names it, head dimension 64."""
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, batch, heads, tokens, 64, device=where, dtype=dtype)
    by = "self_device_time_total" if where.type == "cuda" else "self_cpu_time_total"
    with torch.profiler.profile() as profiled:
        F.scaled_dot_product_attention(q, k, v)
    return str(max(profiled.key_averages(), key=lambda event: getattr(event, by)).key)[:80]


@cache
def ceilings() -> Ceilings:
    """Of this machine, measured now: copies of 256 MiB (on a CPU 64); products and attention of a d = 24 block on
    16,384 tokens in bf16, on a CPU of a d = 6 block on 820 tokens in fp32."""
    from bench.measure import interleaved

    where = device()
    on_gpu = where.type == "cuda"
    tokens, width, dtype = (16384, 1536, torch.bfloat16) if on_gpu else (820, 384, torch.float32)
    source = torch.empty(1 << (28 if on_gpu else 26), dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    x, w = (torch.randn(s, device=where, dtype=dtype) for s in ((tokens, width), (4 * width, width)))
    batch, length, heads = tokens // 410, 410, width // 64
    q, k, v = torch.randn(3, batch, heads, length, 64, device=where, dtype=dtype)
    small = torch.ones(1, device=where)
    calls: dict[str, Callable[[int], object]] = {
        "copy": lambda i: target.copy_(source),
        "matmul": lambda i: F.linear(x, w),
        "attention": lambda i: F.scaled_dot_product_attention(q, k, v),
        "launch": lambda i: small + small,
    }
    took = {name: samples.median for name, samples in interleaved(calls, where).items()}
    return Ceilings(
        copy=2 * source.numel() / took["copy"],
        matmul=2 * tokens * width * 4 * width / took["matmul"],
        attention=4 * batch * heads * length**2 * 64 / took["attention"],
        launch=took["launch"],
    )


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, read plus written: the ceiling that bandwidths are compared with."""
    return ceilings().copy
