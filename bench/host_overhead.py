"""What a call costs on the host before its kernel starts: python -m bench.host_overhead

Runs anywhere. The Triton path is timed up to its launch: the launcher is replaced by one that hands out ready-made
outputs, so checks, dispatch, autograd and registration count, and Triton's own launch does not.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rfkernels
from rfkernels.adaln import operators
from rfkernels.registration import Operator


def microseconds(call: Callable[[], object], repeats: int = 7, number: int = 2000) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return sorted(times)[repeats // 2]


def without_kernels(outputs: tuple[torch.Tensor, ...], gradients: tuple[torch.Tensor, ...]) -> Operator:
    """The adaln operator around a launcher that launches nothing."""
    return operators._adaln_operator("adaln_host", lambda *a: outputs, lambda *a: gradients)


def main() -> None:
    torch.set_num_threads(1)
    x, v = torch.randn(1, 1, 64, requires_grad=True), torch.randn(1, 64, requires_grad=True)
    statistic = torch.empty(1, 1)
    y = torch.empty_like(x).detach()
    host = without_kernels((y, statistic, statistic.clone()), (y.clone(), v.detach(), v.detach()))
    dispatched = rfkernels.dispatch.implementations("adaln")
    stand_in = rfkernels.dispatch.Implementation("triton", "", lambda *a: host(*a)[0])
    rfkernels.dispatch._registry["adaln"] = (stand_in, *dispatched)

    layer_norm = lambda: F.layer_norm(x, (64,), eps=1e-6)  # noqa: E731
    through_library = lambda: host.forward(x, v, v, "layer", 1e-6)  # noqa: E731
    rows = {
        "F.layer_norm (with its CPU kernel)": layer_norm,
        "rfkernels.adaln, up to the launch": lambda: rfkernels.adaln(x, v, v),
        "the same through torch.library": through_library,
    }
    print(f"microseconds a call, recording gradients; torch {torch.__version__}, {platform.machine()}, 1 thread")
    base = microseconds(layer_norm)
    for name, call in rows.items():
        took = microseconds(call)
        print(f"  {name:36s} {took:6.1f}   ({took - base:+.1f} against F.layer_norm)")


if __name__ == "__main__":
    main()
