"""What a measurement ran on. A figure without this is not a figure."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

# Dense bf16 FLOP/s by data sheet, for the share of them that a training step reaches. Unknown GPUs get none.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"


def peak_flops(name: str) -> float | None:
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


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


def environment() -> dict[str, Any]:
    packages = ("torch", "triton", "diffusers", "liger-kernel", "flash-attn", "flash-attn-4", "quack-kernels")
    return {
        "device": device_name(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cores": torch.get_num_threads(),
        **{name: found for name in packages if (found := version(name))},
    }


def importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second of a device copy, read plus written: the ceiling that bandwidths are held against."""
    from bench.measure import interleaved

    where = device()
    size = size if where.type == "cuda" else 1 << 26
    source = torch.empty(size, dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda i: target.copy_(source)}, where)["copy"].median
