"""What the launchers' constants were chosen by: python -m bench.device.settings

Settings that no launch table holds, each beside others: tiles and programs of qk_norm, of GELU's backward, of the
second stage that adds partial sums, of the joint copy around a library's attention; then that path against our kernels.
Times are of replayed graphs, on inputs that may lie in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rfkernels
from bench import environment
from bench.device.runner import VERDICT
from bench.environment import pretending
from bench.measure import interleaved
from rfkernels import Stream, launch_tables
from rfkernels.adaln import launch as adaln
from rfkernels.joint_attention import join
from rfkernels.joint_attention.layout import parse
from rfkernels.mlp import launch as mlp
from rfkernels.qk_norm import launch as qk

BATCH, TOKENS, TEXT, HEADS, DIM = (2, 6, 3, 2, 16) if pretending() else (64, 256, 154, 24, 64)
WIDTH = HEADS * DIM
SHOWN = 4                    # of the fastest
Call = Callable[[], object]


def compared(name: str, calls: Mapping[str, Call]) -> None:
    """The fastest, and the first, which is what runs now."""
    rounds, found = 1 if pretending() else 7, {}
    for way, call in calls.items():
        found[way] = interleaved({way: lambda i, call=call: call()}, environment.device(), rounds)[way].median * 1e6
    now = next(iter(calls))
    best = sorted(found, key=lambda way: found[way])[:SHOWN]
    told = ", ".join(f"({way}) {found[way]:.1f}" for way in best)
    print(f"{VERDICT}{name}, us: now ({now}) {found[now]:.1f}; {told}", flush=True)


def with_constants(name: str, module: Any, call: Call, tried: list[dict[str, Any]]) -> None:
    """The call as it is beside it with each of these constants."""

    def inside(values: dict[str, Any]) -> object:
        with patch.multiple(module, **values):
            return call()

    ways = [{name: getattr(module, name) for name in tried[0]}, *tried]
    compared(name, {", ".join(map(label, values.values())): partial(inside, values) for values in ways})


def label(value: Any) -> str:
    return "/".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def main() -> None:
    device = environment.device()
    print(environment.environment())
    normal = partial(torch.randn, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    qkvs = [normal(BATCH, n, 3, HEADS, DIM) for n in (TEXT, TOKENS)]
    q, k, _ = qkvs[1].unbind(2)
    dq, dk, w = normal(*q.shape), normal(*k.shape), normal(DIM)

    elements = (1024, 2048, 4096)
    tried = [{"BACKWARD": e, "PROGRAMS_PER_SM": p} for e in elements for p in (2, 4, 8)]
    norm = partial(qk.qk_norm_backward, dq, dk, q, k, w, w, 1e-6)
    with_constants("qk_norm's backward: elements, programs", qk, norm, tried)

    gelu = partial(mlp.gelu_backward, *(normal(BATCH * TOKENS, 4 * WIDTH) for _ in range(2)), True, True)
    for tile in ((4, 256, 4), (8, 256, 4), (16, 256, 8), (8, 512, 8)):
        with patch.multiple(mlp, tile_launch=lambda *a, tile=tile: launch_tables.TileLaunch(*tile)):
            tried = [{"PROGRAMS_PER_SM": p} for p in (4, 8, 16)]
            with_constants(f"GELU's backward, tile {tile}: programs", mlp, gelu, tried)

    second_stage(device)
    packed_projections(normal, qkvs, w)


def second_stage(device: torch.device) -> None:
    tiles = [(32, 32, 2), (16, 32, 1), (16, 64, 2), (64, 32, 4), (64, 128, 8)]
    tried = [{"SECOND_STAGE": adaln.SECOND_STAGE | {"ROWS": r, "CHUNK": c, "num_warps": n}} for r, c, n in tiles]
    stage = adaln.column_sums
    for rows in (8, 44, 264):
        partials = torch.randn(4, rows, WIDTH, device=device)
        outs = torch.empty(4, WIDTH, device=device).unbind()
        with_constants(f"second stage, four sums of {rows} rows", adaln, partial(stage, partials, *outs), tried)


def packed_projections(normal: Callable[..., Tensor], qkvs: list[Tensor], w: Tensor) -> None:
    streams = parse([qkvs[0], w, w, qkvs[1], w, w], "3qk,3qk")
    joint = [normal(BATCH, TEXT + TOKENS, HEADS, DIM) for _ in range(3)]
    grads = [torch.randn_like(j) for j in joint]
    elements = (1024, 2048, 4096)
    there, back = partial(join.forward, streams, joint, 1e-6), partial(join.backward, grads, streams, 1e-6)
    with_constants("joint copy: elements", join, there, [{"FORWARD": e} for e in elements])
    tried = [{"BACKWARD": e, "STAGES": s, "PROGRAMS_PER_SM": p} for e, s, p in product(elements, (1, 3), (8, 16, 32))]
    with_constants("joint copy's backward: elements, stages, programs", join, back, tried)
    whole = torch.cat([x.flatten() for x in qkvs])
    compared("a copy of the projections", {"copy_": partial(torch.empty_like(whole).copy_, whole)})

    for batch, tokens in ((BATCH, TOKENS),) if pretending() else ((BATCH, TOKENS), (16, 1024), (4, 4096)):
        leaves = [normal(batch, n, 3, HEADS, DIM).requires_grad_() for n in (TEXT, tokens)]
        given = [normal(batch, n, HEADS, DIM) for n in (TEXT, tokens)]

        def forward(by: str, leaves: list[Tensor] = leaves) -> Any:
            with rfkernels.backend(by, "joint_attention"):
                return rfkernels.joint_attention([Stream.packed(x, w, w) for x in leaves])

        def both(by: str, leaves: list[Tensor] = leaves, given: list[Tensor] = given) -> Any:
            return torch.autograd.grad(forward(by, leaves), leaves, given)

        def alone(by: str, leaves: list[Tensor] = leaves) -> Any:
            with torch.no_grad():
                return forward(by, leaves)

        for name, run in (("forward", alone), ("forward and backward", both)):
            ways = {"kernels": partial(run, "triton"), "joint copy, SDPA": partial(run, "library")}
            compared(f"attention, {TEXT + tokens} tokens, batch {batch}, {name}", ways)


if __name__ == "__main__":
    main()
