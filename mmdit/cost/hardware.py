"""What GPUs can do at most, by their data sheets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mmdit.cost.counting import Kernel


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


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches on the pieces that a model is made of."""

    copy: float
    """Bytes per second of a copy, read plus written."""
    matmul: float
    """FLOP/s of a matrix product of the size of a block's."""
    attention: float
    """FLOP/s of PyTorch's attention, head dimension 64."""
    launch: float
    """Seconds that the shortest kernel takes."""
    source: str = "measured"

    def record(self) -> dict[str, Any]:
        return asdict(self)


MATMUL_SHARE, ATTENTION_SHARE, COPY_SHARE, LAUNCH = 0.70, 0.35, 0.90, 3e-6
"""Of the data sheet's FLOP/s and bandwidth, and seconds of the shortest kernel, where nothing was measured. Attention's
follows what the authors of FlashAttention-3 publish for head dimension 64 on an H100: 280 to 400 TFLOP/s of 989."""


def by_prefix(name: str) -> str:
    """The known GPU whose name begins so ("h100"), or nothing."""
    return next((part for part in GPUS if part.lower().startswith(name.lower())), "")


def assumed(known: Gpu, name: str) -> Ceilings:
    """At the shares above of a data sheet."""
    shares = f"{MATMUL_SHARE:.0%}, {ATTENTION_SHARE:.0%} and {COPY_SHARE:.0%} of the data sheet of {name}"
    rates = (known.bandwidth * COPY_SHARE, known.flops * MATMUL_SHARE, known.flops * ATTENTION_SHARE)
    return Ceilings(*rates, LAUNCH, f"assumed: {shares}")


def seconds(kernel: Kernel, ceiling: Ceilings) -> float:
    """What a kernel's FLOPs or its bytes demand, whichever is longer."""
    rate = ceiling.attention if kernel.kind == "attention" else ceiling.matmul
    return max(kernel.flops / rate, kernel.bytes / ceiling.copy, ceiling.launch * kernel.launches)
