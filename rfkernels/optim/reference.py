"""AdamW with states of few bits, in PyTorch: the definition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STATES = ("fp32", "bf16", "int8")
BLOCK = 256
"""Elements of a row that share a scale."""
M_CODES, R_CODES = 127, 255
ROUNDED = {"exp_avg": 0, "exp_avg_sq": 1, "weight": 2}
"""What is rounded at random, each with noise of its own."""


class Settings(NamedTuple):
    """Of a step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int
    first_row: int = 0
    """Of a shard: which row of the whole parameter is its first."""


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits (lowbias32), of integers below 2^32 in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise(step: Tensor, shape: torch.Size, settings: Settings, what: str) -> Tensor:
    """24 random bits for each element of rows [R, C], in int64: a function of seed, step, purpose, row and column."""
    rows, columns = shape
    device = step.device
    key = mixed(mixed(step.long() ^ (settings.seed & 0xFFFFFFFF)) ^ ROUNDED[what])
    row = mixed(key ^ (torch.arange(rows, device=device) + settings.first_row))
    return mixed(row[:, None] ^ torch.arange(columns, device=device)) >> 8


def to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 rounded to bf16, up or down at random in proportion."""
    raised = x.contiguous().view(torch.int32).long() + (bits >> 8)
    return (raised & 0xFFFF0000).to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _blocks(x: Tensor) -> Tensor:
    """[R, C] -> [R, blocks, BLOCK], zeros behind."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def encoded(x: Tensor, codes: int, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [R, C] of magnitudes, scales [R, blocks]): x is ``scale * (code / codes)^4``, at random in proportion."""
    scale = _blocks(x.abs()).amax(2)
    share = x.abs() / scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]].clamp_min(torch.finfo(torch.float32).tiny)
    share = share.clamp(max=1.0)
    low = (share.sqrt().sqrt() * codes).floor().clamp(max=codes - 1)
    below, above = fourth(low / codes), fourth((low + 1) / codes)
    return low + (bits.float() * 2.0**-24 < (share - below) / (above - below)), scale


def fourth(x: Tensor) -> Tensor:
    square = x * x
    return square * square


def decoded(code: Tensor, scale: Tensor, codes: int) -> Tensor:
    """Of codes with a sign or without."""
    return fourth(code.float() / codes) * code.sign() * scale.repeat_interleave(BLOCK, 1)[:, : code.shape[1]]


def empty_state(parameter: Tensor, states: str) -> dict[str, Tensor]:
    """Of rows [R, C], before the first step."""
    if states == "int8":
        scale = (parameter.shape[0], -(-parameter.shape[1] // BLOCK))
        new = lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=parameter.device)  # noqa: E731
        return {
            "exp_avg": new(parameter.shape, torch.int8), "exp_avg_sq": new(parameter.shape, torch.uint8),
            "exp_avg_scale": new(scale, torch.float32), "exp_avg_sq_scale": new(scale, torch.float32),
        }  # fmt: skip
    dtype = torch.bfloat16 if states == "bf16" else torch.float32
    return {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}


def log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


@torch.no_grad()
def adamw(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor, settings: Settings,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """Updates rows [R, C] of a parameter and their state in place.

    Args: step: scalar fp32, counted from 1. grad_scale, found_inf: scalars fp32, see README.md.
    """
    s, shape = settings, parameter.shape
    if not parameter.numel():
        return
    g = gradient.float() if grad_scale is None else gradient.float() / grad_scale
    eight = state["exp_avg"].dtype == torch.int8
    if eight:
        m = decoded(state["exp_avg"], state["exp_avg_scale"], M_CODES)
        v = decoded(state["exp_avg_sq"], state["exp_avg_sq_scale"], R_CODES).square()
    else:
        m, v = state["exp_avg"].float(), state["exp_avg_sq"].float()
    m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g * g
    first, second = (-torch.expm1(step * log(beta)) for beta in (s.beta1, s.beta2))           # 1 - beta^step
    p = (1 - s.lr * s.weight_decay) * parameter.float() - s.lr * (m / first) / ((v / second).sqrt() + s.eps)
    bits = lambda what: noise(step, shape, s, what)  # noqa: E731
    made: dict[str, Tensor] = {}
    if eight:
        code, made["exp_avg_scale"] = encoded(m, M_CODES, bits("exp_avg"))
        made["exp_avg"] = (code * m.sign()).to(torch.int8)
        code, made["exp_avg_sq_scale"] = encoded(v.sqrt(), R_CODES, bits("exp_avg_sq"))
        made["exp_avg_sq"] = code.clamp(min=1).to(torch.uint8)
    elif state["exp_avg"].dtype == torch.bfloat16:
        made = {"exp_avg": to_bf16(m, bits("exp_avg")), "exp_avg_sq": to_bf16(v, bits("exp_avg_sq"))}
    else:
        made = {"exp_avg": m, "exp_avg_sq": v}
    new = to_bf16(p, bits("weight")) if parameter.dtype == torch.bfloat16 else p.to(parameter.dtype)
    for old, value in ((parameter, new), *((state[name], value) for name, value in made.items())):
        old.copy_(value if found_inf is None else torch.where(found_inf.bool(), old, value))
