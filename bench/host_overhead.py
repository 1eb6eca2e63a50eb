"""What a call costs the host before its kernels start: python -m bench.host_overhead

Runs anywhere. Inputs are of one token and width 64, so that a CPU's own kernels take next to no time.

    eager      PyTorch on a CPU: its launches of CUDA kernels are not in it
    stubbed    ours without launches: kernels are replaced by ones that do nothing
    triton     ours, kernels for sm_90 launched by Triton through a CUDA driver that runs nothing (bench/fake_driver)
    native     the same, launched by csrc/launch
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rfkernels
from rfkernels import Stream, dispatch, launcher, native

Call = Callable[[], object]
FORWARD, BOTH = "forward", "both"


def with_gradients(call: Callable[[], object], leaves: list[Tensor]) -> Call:
    """Forward and backward."""
    outs = call()
    grads = [torch.ones_like(t) for t in (outs if isinstance(outs, tuple) else (outs,)) if t is not None]     # type: ignore[union-attr]

    def run() -> object:
        made = call()
        tensors = [t for t in (made if isinstance(made, tuple) else (made,)) if t is not None]                 # type: ignore[union-attr]
        return torch.autograd.grad(tensors, leaves, grads)

    return run


def ops() -> dict[str, tuple[Call, list[Tensor], Call, list[Tensor]]]:
    """Of each op: rfkernels' call and what it has gradients of; the PyTorch call it is compared with and its."""
    x, branch = (torch.randn(1, 1, 64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 64, requires_grad=True)
    text, image = (torch.randn(1, 1, 3, 1, 64, requires_grad=True) for _ in range(2))
    weight = torch.ones(64, requires_grad=True)
    q, k, value = (t.transpose(1, 2) for t in torch.randn(3, 1, 2, 1, 64).requires_grad_())
    mlp = [torch.randn(s, requires_grad=True) for s in ((1, 1, 64), (128, 64), (128,), (64, 128), (64,))]
    norm = lambda t: F.layer_norm(t, (64,), eps=1e-6)  # noqa: E731
    packed = lambda t: Stream.packed(t, weight, weight)  # noqa: E731
    return {
        "adaln": (lambda: rfkernels.adaln(x, v, v), [x, v], lambda: norm(x), [x]),
        "gated_adaln": (
            lambda: rfkernels.gated_adaln(x, branch, v, v, v), [x, branch, v], lambda: norm(x + branch), [x, branch]
        ),
        "gelu_mlp": (
            lambda: rfkernels.gelu_mlp(*mlp), mlp,
            lambda: F.linear(F.gelu(F.linear(*mlp[:3]), approximate="tanh"), *mlp[3:]), mlp,
        ),
        "joint_attention": (
            lambda: rfkernels.joint_attention([packed(text), packed(image)]), [text, image, weight],
            lambda: F.scaled_dot_product_attention(q, k, value), [q, k, value],
        ),
    }  # fmt: skip


def blocks() -> tuple[Call, list[Tensor], Call, list[Tensor]]:
    """A joint block of width 64, its text and its image of one token each."""
    from bench import eager
    from mmdit import presets
    from mmdit.blocks import JointBlock

    block = JointBlock(presets.by_depth(2, heads=1), 0)
    plain, text, image = eager.Block(block), torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    modulation = torch.randn(1, 12 * 64, requires_grad=True)
    leaves = [modulation, *block.parameters()]

    def way(module: torch.nn.Module, chunk: Callable[[Tensor, int], tuple[Tensor, ...]]) -> Call:
        def run() -> object:
            chunks = chunk(modulation, 12)
            return tuple(module([text, image], [chunks[:6], chunks[6:]], [None, None]))

        return run

    ours = way(block, rfkernels.chunk_modulation)
    theirs = way(plain, lambda m, count: m.chunk(count, dim=-1))
    return ours, leaves, theirs, leaves


class Nothing:
    """A kernel that is launched like any other and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **settings: None


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside, Triton's kernels do nothing, on any machine."""
    modules = [import_module(f"rfkernels.{name}") for name in KERNELS]     # all of them first: they import each other
    kernels = [(m, n) for m in modules for n, value in vars(m).items() if hasattr(value, "arg_names")]
    replaced = [(module, kernel, getattr(module, kernel)) for module, kernel in kernels]
    for module, kernel in kernels:
        setattr(module, kernel, Nothing())
    try:
        with launcher.chosen("triton"), dispatch.as_on_a_gpu():
            yield
    finally:
        for module, kernel, value in replaced:
            setattr(module, kernel, value)


@contextmanager
def launched_by(name: str) -> Iterator[None]:
    with launcher.chosen(name), dispatch.as_on_a_gpu():
        yield


WAYS = {"stubbed": stubbed, **{name: partial(launched_by, name) for name in launcher.LAUNCHERS}}
"""How ours is measured."""
KERNELS = (
    "adaln.kernels", "mlp.kernels", "joint_attention.kernels", "joint_attention.backward_kernels",
    "joint_attention.prepare_kernels",
)  # fmt: skip


def microseconds(call: Call, repeats: int = 7, number: int = 400) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return sorted(times)[repeats // 2]


def measured(call: Call, leaves: list[Tensor]) -> dict[str, float]:
    both = with_gradients(call, leaves)
    return {FORWARD: microseconds(call), BOTH: microseconds(both)}


def table(ways: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each op and the block, of "eager" and each way, microseconds by direction."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    cases = {**ops(), "block": blocks()}
    for name, (ours, leaves, theirs, their_leaves) in cases.items():
        found[name] = {"eager": measured(theirs, their_leaves)}
        for way in ways:
            with WAYS[way]():
                found[name][way] = measured(ours, leaves)
    return found


def main() -> None:
    from bench import fake_driver

    parser = argparse.ArgumentParser(prog="python -m bench.host_overhead", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reason = native.missing()
    with tempfile.TemporaryDirectory() as folder:
        fake_driver.install(Path(folder))
        found = table([way for way in WAYS if way != "native" or not reason])
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    print(f"microseconds a call, gradients recorded, forward / forward and backward; torch {torch.__version__}, "
          f"{platform.machine()}, 1 thread")
    if reason:
        print(f"no native launcher: {reason}")
    ways = list(next(iter(found.values())))
    print(f"{'':18s}" + "".join(f"{way:>22s}" for way in ways))
    for name, by_way in found.items():
        print(f"{name:18s}" + "".join(f"{by_way[w][FORWARD]:13.1f} /{by_way[w][BOTH]:7.1f}" for w in ways))


if __name__ == "__main__":
    main()
