"""The joint copy that a library's attention needs, of packed projections: one kernel there, one back, and two that add
their partial sums. Other streams: library.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfkernels.joint_attention.launch import Gradients, _alike, _block_d, _four, _sum_rows, beyond_grid, summable
from rfkernels.joint_attention.layout import Parts
from rfkernels.triton_support import kernels_of, multiprocessors

FORWARD, BACKWARD = 2048, 2048             # elements of a program at a time: 16 a thread
MOST_HEADS = 8                             # of a program: a line of 1 KiB in 16 bits with D = 64
PROGRAMS_PER_SM = 16                       # of the backward: some waves, because v has less to do than q and k
STAGES = 3                                 # of the backward: tiles whose loads are in flight
MOST_TOKENS = (1 << 31) - (1 << 16)        # of a stream in all samples, numbered in 32 bits


_kernels = kernels_of(f"{__package__}.join_kernels")
_sums = kernels_of(f"{__package__}.backward_kernels")


def takes(streams: list[Parts], layout: str) -> bool:
    """Whether all streams are whole packed projections without lengths, with both norms or none."""
    batch = streams[0].k.shape[0]
    return (
        summable(layout)
        and "l" not in layout
        and beyond_grid(streams[0].k.shape) is None
        and all(batch * s.k.shape[1] < MOST_TOKENS for s in streams)
    )


def _settings(heads: int, dim: int, elements: int) -> dict[str, Any]:
    block, together = _block_d(dim), 1
    while together < MOST_HEADS and heads % (2 * together) == 0:
        together *= 2
    tokens = max(1, elements // (together * block))
    return {"D": dim, "TOKENS": tokens, "HEADS": together, "BLOCK_D": block, "num_warps": 4, "enable_fp_fusion": True}


def _packed(streams: list[Parts]) -> tuple[Tensor, ...]:
    return tuple(s.packed for s in streams if s.packed is not None)


def _strides(packed: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """(batch, token, part, head), each a tuple over the streams."""
    return tuple(zip(*[t.stride()[:4] for t in packed], strict=True))


def _weights(streams: list[Parts]) -> tuple[tuple[Tensor | None, ...], ...]:
    return _alike([s.q_weight for s in streams]), _alike([s.k_weight for s in streams])


def forward(streams: list[Parts], joint: list[Tensor], eps: float) -> list[Tensor]:
    """Fills and returns joint: q, k, v [B, tokens of all streams, H, D], q and k normalised where there are weights."""
    packed = _packed(streams)
    batch, _, _, heads, dim = packed[0].shape
    settings = _settings(heads, dim, FORWARD)
    sizes = [t.shape[1] for t in packed]
    tiles = sum(-(-batch * s // settings["TOKENS"]) for s in sizes)
    if joint[0].numel():
        _kernels().join_fwd[(tiles, heads // settings["HEADS"], 3)](
            packed, *_weights(streams), *joint, _strides(packed), batch, sum(sizes), eps, *_four(sizes),
            NORM=streams[0].q_weight is not None, N=len(packed), **settings,
        )  # fmt: skip
    return joint


def backward(grads: list[Tensor], streams: list[Parts], eps: float) -> tuple[list[Gradients], list[Tensor]]:
    """(gradients of each stream, their sums over all tokens [3, H, D]) of those of the joint q, k, v."""
    packed, found = _packed(streams), [Gradients.empty(s) for s in streams]
    batch, _, _, heads, dim = packed[0].shape
    like, norm = packed[0], streams[0].q_weight is not None
    sums = [torch.empty((3, heads, dim), dtype=like.dtype, device=like.device) for _ in packed]
    if not any(t.numel() for t in packed):
        return found, [t.zero_() for t in sums]
    settings = _settings(heads, dim, BACKWARD)
    groups, sizes = heads // settings["HEADS"], [t.shape[1] for t in packed]
    wanted = max(1, PROGRAMS_PER_SM * multiprocessors(like.device) // (3 * groups))
    span = -(-batch * sum(sizes) // (wanted * settings["TOKENS"])) * settings["TOKENS"]
    programs = [-(-batch * s // span) for s in sizes]
    total, width = sum(programs), 3 * heads * dim
    bias_sums = torch.empty((total, width), dtype=torch.float32, device=like.device)
    weight_sums = torch.empty((2 * total * groups * norm, dim), dtype=torch.float32, device=like.device)
    filled = tuple(g.activations[0] for g in found)
    _kernels().join_bwd[(total, groups, 3)](
        *grads, packed, filled, *_weights(streams), weight_sums, bias_sums,
        *(g.stride()[:3] for g in grads), _strides(packed), _strides(filled), batch, span, eps, *_four(sizes),
        NORM=norm, N=len(packed), STAGES=STAGES, **settings,
    )  # fmt: skip
    _sums().sum_rows[(len(sums), -(-width // 64))](
        tuple(sums), bias_sums, *programs, *[0] * (8 - len(programs)), D=width, N=len(sums), ROWS=32, COLUMNS=64,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if norm:
        ordered = [s.q_weight for s in streams] + [s.k_weight for s in streams]
        made = _sum_rows(weight_sums, [w for w in ordered if w is not None], [p * groups for p in programs] * 2)
        for i, g in enumerate(found):
            g.weights = {"q": made[i], "k": made[len(found) + i]}
    return found, sums
