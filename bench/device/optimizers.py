"""AdamW's step by what it stores: python -m bench.device.optimizers

Of the matrices of some blocks of the 2B model, and of a LoRA of all of its matrices, beside torch's fused AdamW.
Gigabytes are those that must move: weights and moments read and written, gradients read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from bench import environment
from bench.device.runner import VERDICT
from bench.environment import pretending
from rfkernels.optim import AdamW

WIDTH, BLOCKS, RANK = (64, 1, 2) if pretending() else (1536, 8, 16)
SHAPES = [(3, 1), (1, 1), (4, 1), (1, 4), (6, 1)] * 2                   # of WIDTH: qkv, out, fc1, fc2, modulation
MATRICES = [(rows * WIDTH, columns * WIDTH) for rows, columns in SHAPES * BLOCKS]
LORA = [shape for rows, columns in MATRICES * 3 for shape in ((RANK, columns), (rows, RANK))]
ROUNDS, STEPS = (1, 1) if pretending() else (7, 5)


def parameters(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def milliseconds(step: Callable[[], object]) -> float:
    """Of a step, by wall clock: the host's part counts."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step()
    wait()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        taken.append(1e3 * (time.perf_counter() - start) / STEPS)
    return statistics.median(taken)


def main() -> None:
    device, fp32, bf16 = environment.device(), torch.float32, torch.bfloat16
    print(environment.environment())
    ways: dict[str, tuple[torch.dtype, int, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
        "torch's, fused, fp32": (fp32, 28, lambda p: torch.optim.AdamW(p, fused=True)),
        "ours, fp32": (fp32, 28, lambda p: AdamW(p, states="fp32")),
        "ours, moments in bf16": (fp32, 20, lambda p: AdamW(p, states="bf16")),
        "ours, moments of 8 bits": (fp32, 16, lambda p: AdamW(p, states="int8")),
        "ours, bf16 weights, moments of 8 bits": (bf16, 10, lambda p: AdamW(p, states="int8")),
    }
    for of, shapes in (("matrices", MATRICES), ("a LoRA", LORA)):
        for way, (weights, moved, make) in ways.items():
            held = parameters(shapes, weights, device)
            count = sum(parameter.numel() for parameter in held)
            ms = milliseconds(make(held).step)
            told = f"{ms:.2f} ms, {count * moved / ms / 1e6:.0f} GB/s"
            print(f"{VERDICT}AdamW, {of}, {len(held)} of {count / 1e6:.0f} M, {way}: {told}", flush=True)


if __name__ == "__main__":
    main()
