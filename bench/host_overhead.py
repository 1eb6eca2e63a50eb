"""What a call costs on the host before its kernel starts: python -m bench.host_overhead

Runs anywhere. The Triton path is timed up to its launch: the kernels are replaced by ones that do nothing, so checks,
dispatch, autograd, registration, allocations and the launchers' own Python count, and Triton's launch does not.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import Stream, dispatch
from rfkernels.adaln import kernels as adaln_kernels
from rfkernels.joint_attention import kernels as attention_kernels

Calls = dict[str, tuple[Callable[[], object], Callable[[], object]]]


class Nothing:
    """A kernel that is launched like any other and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **settings: None


REPLACED: tuple[tuple[ModuleType, str], ...] = (
    (adaln_kernels, "adaln_fwd"),
    (attention_kernels, "key_rstd"),
    (attention_kernels, "attention_fwd"),
)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, the Triton implementations run on any machine, up to their launches."""
    kernels = [(module, name, getattr(module, name)) for module, name in REPLACED]
    for module, name, _ in kernels:
        setattr(module, name, Nothing())
    try:
        with dispatch.as_on_a_gpu("adaln", "joint_attention"):
            yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def calls() -> Calls:
    """Of each op: (rfkernels' call, the PyTorch call it is held against), recording gradients, inputs of one token."""
    x, v = torch.randn(1, 1, 64, requires_grad=True), torch.randn(1, 64, requires_grad=True)
    text, image = (torch.randn(1, 1, 3, 1, 64, requires_grad=True) for _ in range(2))
    weight = torch.ones(64, requires_grad=True)
    q, k, value = (t.transpose(1, 2) for t in torch.randn(3, 1, 2, 1, 64).requires_grad_())
    packed = lambda t: Stream.packed(t, weight, weight)  # noqa: E731
    return {
        "adaln": (lambda: rfkernels.adaln(x, v, v), lambda: F.layer_norm(x, (64,), eps=1e-6)),
        "joint_attention": (
            lambda: rfkernels.joint_attention([packed(text), packed(image)]),
            lambda: F.scaled_dot_product_attention(q, k, value),
        ),
    }


def microseconds(call: Callable[[], object], repeats: int = 7, number: int = 2000) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return sorted(times)[repeats // 2]


def main() -> None:
    torch.set_num_threads(1)
    print(f"microseconds a call, recording gradients; torch {torch.__version__}, {platform.machine()}, 1 thread")
    print(f"{'op':18s} {'up to the launch':>17s} {'PyTorch, with its CPU kernel':>30s} {'above':>7s}")
    with without_kernels():
        for name, (ours, theirs) in calls().items():
            took, base = microseconds(ours), microseconds(theirs)
            print(f"{name:18s} {took:17.1f} {base:30.1f} {took - base:+7.1f}")


if __name__ == "__main__":
    main()
