"""What GPUs can do at most, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind."""

    flops: float
    """Dense bf16 FLOP/s."""
    bandwidth: float
    """Bytes per second of device memory."""
    memory: float
    """Bytes."""


GPUS = {
    "A100-SXM4-80GB": Gpu(312e12, 2.04e12, 80e9),
    "H100 80GB HBM3": Gpu(989e12, 3.35e12, 80e9),
    "H100 PCIe": Gpu(756e12, 2.0e12, 80e9),
    "H200": Gpu(989e12, 4.8e12, 141e9),
    "B200": Gpu(2250e12, 8.0e12, 180e9),
}
"""By a part of the name that the driver gives. Others have no MFU rather than a wrong one."""


def gpu(name: str) -> Gpu | None:
    return next((known for part, known in GPUS.items() if part.lower() in name.lower()), None)
