"""What a call costs on the host before its kernel starts: python -m bench.host_overhead

Runs anywhere. The Triton path is timed up to its launch: the kernel is replaced by one that does nothing, so checks,
dispatch, autograd, registration, allocations and the launcher's own Python count, and Triton's launch does not.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import dispatch
from rfkernels.adaln import kernels, operators
from rfkernels.triton_support import refuses_triton


def microseconds(call: Callable[[], object], repeats: int = 7, number: int = 2000) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return sorted(times)[repeats // 2]


class Nothing:
    """A kernel that is launched like any other and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **settings: None


def main() -> None:
    torch.set_num_threads(1)
    x, v = torch.randn(1, 1, 64, requires_grad=True), torch.randn(1, 64, requires_grad=True)
    kernels.adaln_fwd = Nothing()

    def asked(*args: object) -> None:
        refuses_triton(*args)                  # asked as on a GPU; the answer is for this machine and not heeded

    stand_in = dispatch.Implementation("triton", "", operators.triton_adaln, asked)
    dispatch._registry["adaln"] = (stand_in, *dispatch.implementations("adaln"))

    layer_norm = lambda: F.layer_norm(x, (64,), eps=1e-6)  # noqa: E731
    through_library = lambda: torch.ops.rfkernels.adaln.default(x, v, v, "layer", 1e-6)  # noqa: E731
    rows = {
        "F.layer_norm (with its CPU kernel)": layer_norm,
        "rfkernels.adaln, up to the launch": lambda: rfkernels.adaln(x, v, v),
        "its operator through torch.library": through_library,
    }
    print(f"microseconds a call, recording gradients; torch {torch.__version__}, {platform.machine()}, 1 thread")
    base = microseconds(layer_norm)
    for name, call in rows.items():
        took = microseconds(call)
        print(f"  {name:36s} {took:6.1f}   ({took - base:+.1f} against F.layer_norm)")


if __name__ == "__main__":
    main()
