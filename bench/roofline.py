"""What a step should take, from counted FLOPs and bytes: python -m bench roofline --gpu h100 --depth 24 --batch 32

Every kernel that the step launches (counted by shapes, nothing runs) takes as long as its FLOPs or its bytes demand,
whichever is longer, at ceilings that were measured on that machine, or, where none were, at stated shares of its data
sheet. Three ways to launch the same step, and a bound:

    eager      as a careful user writes it, one kernel an operator
    compiled   every stretch of operators between two matrix products as one kernel: the most that a compiler can fuse
    fused      rfkernels' ops
    ideal      the matrix products and the attention alone

With --autocast parameters and residual stream are fp32 and products bf16, as most training code has it. One way more:

    one dtype  rfkernels' ops with casts around them, as if they took one dtype only

What is left out: overlap of kernels, the optimizer, and communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gate, models, tables
from bench.models import Size
from mmdit.cost import counting
from mmdit.cost.counting import Trace
from mmdit.cost.hardware import GPUS, Ceilings, Gpu, assumed, by_prefix, gpu, seconds

WAYS = ("eager", "compiled", "fused", "ideal")
STATE_BYTES = 18
"""Per parameter: fp32 weight, gradient and AdamW's two moments, and a bf16 copy."""


def results_of(name: str, folder: Path) -> dict[str, Any] | None:
    """The newest results of a machine by its name, or by how a known GPU's name begins ("h100")."""
    parts = [gate.slug(part) for part in GPUS if part.lower().startswith(name.lower())]
    runs = gate.runs(folder)
    found = gate.newest(folder, name) or next((run for run in runs if any(part in run for part in parts)), None)
    return None if found is None else {**gate.read(runs[found]), "run": found}


def ceilings(name: str, folder: Path) -> tuple[Ceilings, Gpu | None]:
    """What a machine reaches, measured if results of it are in `folder`; and its data sheet, if it is known.

    Raises: ValueError for a machine of which nothing is known.
    """
    part = by_prefix(name)
    known = gpu(part or name)
    results = results_of(name, folder)
    if results is not None and (found := results["machine_info"]["rfkernels"].get("ceilings")):
        return Ceilings(**{**found, "source": f"measured, {results['run']}"}), known
    if known is None:
        raise ValueError(
            f"roofline: gpu is {name!r}; expected one of {', '.join(GPUS)} (or how its name begins), or a machine with "
            f"results in {folder}"
        )
    return assumed(known, part or name), known


@dataclass(frozen=True)
class Prediction:
    """Of one way to run a step."""

    way: str
    seconds: float
    launches: int
    bytes: int
    """Moved."""
    kept: int
    """Of activations between forward and backward. Compiled: at most; ideal: the inputs of the products."""
    by_kind: dict[str, float]
    """Seconds."""


def operands(trace: Trace) -> int:
    """Bytes of the distinct tensors, weights left out, that the forward's matrix products and attentions read."""
    found: dict[tuple[int, ...], int] = {}
    for k in trace.kernels[: trace.forward]:
        if k.kind in ("matmul", "attention"):
            found.update({key: size for key, size in k.reads.items() if key[0] not in trace.weight_storages})
    return sum(found.values())


def predict(
    size: Size, step: str, ceiling: Ceilings, dtype: torch.dtype = torch.bfloat16, autocast: bool = False
) -> dict[str, Prediction]:
    """By way.

    Args: size: of model and batch. step: "training" (forward and backward) or "sampling" (forward). dtype: of all.
        autocast: the model under autocast to bf16 instead, with fp32 parameters.
    """
    dtype = torch.float32 if autocast else dtype
    plain, ours = (models.counted(size, step, way, dtype, autocast) for way in ("eager", "ours"))
    products = [k for k in plain.kernels if k.kind in ("matmul", "attention")]
    ways = {
        "eager": (plain.kernels, plain.kept),
        "compiled": (counting.stretches(plain.kernels), plain.kept),
        "fused": (ours.kernels, ours.kept),
        "ideal": (products, operands(plain) if step == "training" else 0),
    }
    if autocast:
        one = models.counted(size, step, "ours, one dtype", dtype, autocast)
        ways["one dtype"] = one.kernels, one.kept
    found = {}
    for way, (kernels, kept) in ways.items():
        by_kind: dict[str, float] = {}
        for k in kernels:
            by_kind[k.kind] = by_kind.get(k.kind, 0.0) + seconds(k, ceiling)
        moved, launches = sum(k.bytes for k in kernels), sum(k.launches for k in kernels)
        found[way] = Prediction(way, sum(by_kind.values()), launches, moved, kept, by_kind)
    return found


MEASURED_AS = {"eager": "eager", "compiled": "compile", "fused": "ours"}


def measurements(size: Size, step: str, name: str, folder: Path) -> dict[str, float]:
    """Seconds by way, from the newest results of this machine; empty where there are none. On a CPU the fused kernels
    do not run, so nothing is compared with their prediction."""
    results = results_of(name, folder)
    if results is None:
        return {}
    contenders = tables.rows(results).get(size.name(step), {})
    ways = MEASURED_AS if tables.on_a_gpu(results) else {"eager": "eager"}
    return {way: contenders[c]["us"] / 1e6 for way, c in ways.items() if c in contenders}


def report(size: Size, step: str, name: str, folder: Path, dtype: torch.dtype, autocast: bool = False) -> str:
    """The predictions as text."""
    ceiling, sheet = ceilings(name, folder)
    found = predict(size, step, ceiling, dtype, autocast)
    measured = {} if autocast else measurements(size, step, name, folder)
    flops = size.flops(step)
    head = ["way", "predicted", "img/s", "MFU", "launches", "moved", "kept", "measured", "over predicted"]
    body = []
    for way, p in found.items():
        took = measured.get(way)
        body.append([
            way, tables.duration(p.seconds * 1e6), f"{size.batch / p.seconds:.2f}",
            f"{flops / p.seconds / sheet.flops:.1%}" if sheet else "", str(p.launches), tables.size(p.bytes),
            ("at most " if way == "compiled" else "") + tables.size(p.kept),
            tables.duration(took * 1e6) if took else "", f"{took / p.seconds:.2f}" if took else "",
        ])  # fmt: skip
    count = models.parameters(size.depth)
    kind = "autocast" if autocast else str(dtype).removeprefix("torch.")
    lines = [
        f"{size.name(step)}, {kind}, {size.tokens} image tokens and "
        f"{models.TEXT_TOKENS} of text, on {name}: {flops / 1e12:.3g} TFLOP a step",
        f"ceilings: products {ceiling.matmul / 1e12:.3g} TFLOP/s, attention {ceiling.attention / 1e12:.3g} TFLOP/s, "
        f"copy {ceiling.copy / 1e9:.0f} GB/s, shortest kernel {ceiling.launch * 1e6:.1f} us ({ceiling.source})",
        "",
        tables.aligned([head, *body]),
        "",
        "where the time goes:\n" + "\n".join(
            f"  {way}: " + ", ".join(f"{kind} {s / p.seconds:.0%}" for kind, s in sorted(p.by_kind.items()))
            for way, p in found.items()
        ),
    ]  # fmt: skip
    if step == "training":
        need = count * STATE_BYTES + found["fused"].kept
        fits = "" if sheet is None else f": {'fits' if need < sheet.memory else 'does not fit'} in "
        fits += tables.size(sheet.memory) if sheet else ""
        lines.append(
            f"memory of training on one device, unsharded, fused: {count / 1e9:.2f}B parameters x {STATE_BYTES} bytes "
            f"+ kept = {tables.size(need)}{fits}"
        )
    return "\n".join(lines)


def main(**args: Any) -> None:
    size = Size(args["depth"], args["pixels"], args["batch"])
    print(report(size, args["step"], args["gpu"], args["results"], getattr(torch, args["dtype"]), args["autocast"]))
