"""Ours against ours: python -m bench.device.ways

    ops         Triton's kernels and those of csrc/cuda; the MLP's products with epilogues in cuBLASLt and without
    sampling    Triton's launcher and the native one: a step for one picture, which waits for the host
    training    the d = 24 step with each of them
    autocast    the same under autocast over fp32 weights, as training has it, with each launcher

What is faster here belongs in the GPU's launch table. Needs the native code (python -m rfkernels.build).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rfkernels
from bench import environment, models
from bench.device.runner import VERDICT
from bench.environment import pretending
from bench.measure import interleaved
from bench.test_model import sampling, training
from rfkernels import launch_tables, launcher, native

CUDA = ("adaln_bwd_cuda", "gated_adaln_bwd_cuda", "qk_norm_fwd_cuda", "qk_norm_bwd_cuda", "gelu_bwd_cuda")
EPILOGUES = ("gelu_fwd_lt", "gelu_bwd_lt", "bias_gradient_lt")
CALLS = 3                    # in a round
LIBRARY = ("joint_attention",)
"""A joint copy, then the attention that PyTorch takes."""
Listed = tuple[str, ...]
Way = tuple[Listed, str]
"""What a launch table asks for, and the launcher."""


class EverySize(dict[str, Any]):
    """An entry of a launch table that holds for every width or head dimension."""

    def __contains__(self, size: object) -> bool:
        return True

    def get(self, size: str, default: Any = None) -> Any:
        return dict(self)


@contextmanager
def listed(names: Listed, by: str = "native") -> Iterator[None]:
    """Inside, a launch table asks for these, and this launcher starts kernels. Not thread-safe."""
    table = launch_tables.table(environment.device_name())
    before = {name: table.pop(name) for name in (*CUDA, *EPILOGUES, *LIBRARY) if name in table}
    always = EverySize(library_from=0, library_from_forward=0)
    table.update({name: always if name in LIBRARY else EverySize() for name in names})
    try:
        with launcher.chosen(by):
            native.entry.forget()
            yield
    finally:
        for name in names:
            table.pop(name, None)
        table.update(before)
        native.entry.forget()


def written(folder: Path) -> None:
    """A launch table that asks for every CUDA kernel and epilogue at every width, for tests of other processes."""
    sizes: dict[str, dict[str, Any]] = {str(size): {} for size in range(1, 20000)}
    name = environment.device_name().lower().replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(dict.fromkeys((*CUDA, *EPILOGUES), sizes)))


def ops(device: torch.device) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """At the shapes of d = 24 at 256 pixels, batch 64, and of d = 38."""
    made: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
    batch, tokens = (2, 16) if pretending() else (64, 256)
    for depth in (2,) if pretending() else (24, 38):
        width = 64 * depth
        normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
        x, branch, v = normal(batch, tokens, width), normal(batch, tokens, width), normal(3, batch, width)
        heads, weights = normal(2, batch, tokens, depth, 64), normal(2, 64)
        fc = [normal(4 * width, width) / 40, normal(4 * width), normal(width, 4 * width) / 40, normal(width)]
        made[f"adaln-{width}"] = rfkernels.adaln, [x, *v[:2]]
        made[f"gated_adaln-{width}"] = rfkernels.gated_adaln, [x, branch, *v]
        made[f"qk_norm-{width}"] = rfkernels.qk_norm, [*heads, *weights]
        made[f"gelu_mlp-{width}"] = rfkernels.gelu_mlp, [x, *fc]
    return made


def both(op: Callable[..., Any], given: list[Tensor]) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in given]
    with torch.no_grad():
        outs = op(*leaves)
    grads = [torch.randn_like(t) for t in (outs if isinstance(outs, tuple) else (outs,))]
    return lambda: torch.autograd.grad(op(*leaves), leaves, grads)


def in_rounds(call: Callable[[], Any], ways: Mapping[str, Way]) -> dict[str, list[float]]:
    """Seconds of a call by wall clock, with the host, some calls a round: a graph would hide what a launcher costs."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(1 if pretending() else 7):
        for way, how in ways.items():
            with listed(*how):
                call()                                       # what this way has to ask for first
                wait()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                wait()
            found[way].append((time.perf_counter() - start) / CALLS)
    return found


def by_graphs(call: Callable[[], Any], ways: Mapping[str, Way]) -> dict[str, list[float]]:
    """Seconds of a call by replayed graphs, in turns: the GPU's time alone."""

    def within(how: Way) -> Any:
        with listed(*how):
            return call()

    calls = {way: lambda i, how=how: within(how) for way, how in ways.items()}                   # type: ignore[misc]
    found = interleaved(calls, environment.device(), 3 if pretending() else 15)
    return {way: samples.seconds for way, samples in found.items()}


def compared(name: str, call: Callable[[], Any], ways: Mapping[str, Way], graphs: bool, log: dict[str, Any]) -> None:
    """One call in several ways. Gradients that differ from the first way's by more than rounding fail the part."""
    wrong, made = {}, {}
    for way, how in ways.items():
        with listed(*how):
            made[way] = call() or ()
    first = next(iter(ways))
    for way, got in made.items():
        off = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, made[first], strict=True)]
        if not all(one < 0.02 for one in off):
            wrong[way] = f"off by {max(off):.1%}"
    seconds = (by_graphs if graphs else in_rounds)(call, ways)
    middle = {way: statistics.median(taken) for way, taken in seconds.items()}
    log[name] = {"seconds": seconds, "wrong": wrong}
    told = ", ".join(f"{way} {s * 1e6:,.1f} us ({s / middle[first]:.3f})" for way, s in middle.items())
    print(f"{VERDICT}{name}: {told}{' WRONG: ' + str(wrong) if wrong else ''}", flush=True)


def main(only: str) -> int:
    if reason := native.missing():
        print(f"{VERDICT}{reason}")
        return 1
    device = environment.device()
    log: dict[str, Any] = {}
    parts = only.split(";")
    for name, (op, given) in ops(device).items() if "ops" in parts else ():
        ways: dict[str, Way] = {"Triton": ((), "native"), "CUDA": (CUDA, "native")}
        if name.startswith("gelu"):
            ways |= {one: ((one,), "native") for one in EPILOGUES} | {"all epilogues": (EPILOGUES, "native")}
        compared(name, both(op, given), ways, True, log)
    launchers: dict[str, Way] = {"Triton's launcher": ((), "triton"), "native launcher": ((), "native")}
    kernels: dict[str, Way] = {"CUDA kernels": (CUDA, "native"), "epilogues": (EPILOGUES, "native"),
                               "library attention": (LIBRARY, "native")}  # fmt: skip
    depth, pixels, batch = (2, 64, 1) if pretending() else (24, 256, 32)
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    one, many = models.Size(depth, pixels, 1), models.Size(depth, pixels, batch)
    for part, size, run, dtype, ways in (
        ("sampling", one, sampling, half, launchers),
        ("training", many, training, half, launchers | kernels),
        ("autocast", many, training, torch.float32, launchers),
    ):
        if part in parts:
            model: Any = models.contenders(size, device, dtype, only=("ours",))["ours"]
            model = models.Autocast(model) if part == "autocast" else model
            call = partial(run, model, models.inputs(size, device, dtype))
            compared(f"{size.name(run.__name__)}{', autocast' * (part == 'autocast')}", call, ways, False, log)
    found = {"environment": environment.environment(), "measured": log}
    if "WORK" in os.environ:
        (Path(os.environ["WORK"]) / "ways.json").write_text(json.dumps(found, indent=1))
    return int(any(one["wrong"] for one in log.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.device.ways", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="ops;sampling;training;autocast", help="some of these (all)")
    parser.add_argument("--table", type=Path, help="instead: writes a launch table that asks for all of csrc, here")
    given = parser.parse_args()
    if given.table:
        written(given.table)
    else:
        raise SystemExit(main(given.only))
