"""Launch of AdamW's kernel, on all parameters at once: a step of hundreds of launches would wait for the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rfkernels.optim.reference import BLOCK, Settings, log
from rfkernels.triton_support import kernels_of, on

BLOCKS, TILES, WARPS = 8, 4, 8
"""Of a program: blocks of a tile, eight elements a thread; tiles; warps."""
_kernels = kernels_of(f"{__package__}.kernels")


class Update(NamedTuple):
    """What a step does to one parameter: the arguments of `reference.adamw`."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    step: Tensor
    settings: Settings


class Row(NamedTuple):
    """A parameter in the kernel's table, where a vector is one row."""

    parameter: int
    gradient: int
    exp_avg: int
    exp_avg_sq: int
    exp_avg_scale: int
    exp_avg_sq_scale: int
    step: int
    """Addresses, up to here."""
    columns: int
    blocks: int
    first_row: int
    seed: int


class Kind(NamedTuple):
    """What parameters of one launch have in common."""

    weight: torch.dtype
    gradient: torch.dtype
    states: tuple[torch.dtype, torch.dtype]
    vector: bool
    aligned: bool
    """Accesses of 16 bytes are possible."""
    hyperparameters: tuple[float, float, float, float, float]
    """lr, beta1, beta2, eps, weight_decay."""


Member = tuple[Row, Update]


def adamw(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor, settings: Settings,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """As `reference.adamw`; all tensors contiguous, on one device."""
    adamw_all([Update(parameter, gradient, state, step, settings)], grad_scale, found_inf)


@torch.no_grad()
def adamw_all(updates: Sequence[Update], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """`reference.adamw` of each; all tensors contiguous, on one device."""
    kinds: dict[Kind, list[Member]] = defaultdict(list)
    for update in updates:
        if update.parameter.numel():
            row = _row(update)
            kinds[_kind(update, row)].append((row, update))
    for kind, members in kinds.items():
        _launch(kind, members, grad_scale, found_inf)


def _row(update: Update) -> Row:
    p, g, state, step, settings = update
    rows, columns = (1, p.shape[0]) if _is_vector(update) else p.shape
    arrays = p, g, state["exp_avg"], state["exp_avg_sq"]
    scales = [state[name].data_ptr() if name in state else 0 for name in ("exp_avg_scale", "exp_avg_sq_scale")]
    blocks = rows * -(-columns // BLOCK)
    addresses = [array.data_ptr() for array in arrays]
    rest = step.data_ptr(), columns, blocks, settings.first_row, settings.seed & 0x7FFFFFFF
    return Row._make([*addresses, *scales, *rest])


def _is_vector(update: Update) -> bool:
    return update.parameter.shape[1] == 1 and "exp_avg_scale" not in update.state


def _kind(update: Update, row: Row) -> Kind:
    p, g, state, _, s = update
    aligned = not (row.columns % 16 or any(address % 16 for address in row[:4]))
    return Kind(
        p.dtype, g.dtype, (state["exp_avg"].dtype, state["exp_avg_sq"].dtype), _is_vector(update), aligned,
        (s.lr, s.beta1, s.beta2, s.eps, s.weight_decay),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _programs(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[programs, 2]: which parameter, and its first block."""
    each = BLOCKS * TILES
    pairs = [(i, first) for i, count in enumerate(counts) for first in range(0, count, each)]
    return torch.tensor(pairs, dtype=torch.int32, device=device)


def _launch(kind: Kind, members: Sequence[Member], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    import triton.language as tl

    rows, updates = zip(*members, strict=True)
    device = updates[0].parameter.device
    lr, beta1, beta2, eps, weight_decay = kind.hyperparameters
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    # Whose addresses these are, for those who watch what a kernel touches.
    table.behind = [t for u in updates for t in (u.parameter, u.gradient, *u.state.values(), u.step)]   # type: ignore[attr-defined]
    programs = _programs(tuple(row.blocks for row in rows), device)
    named = lambda dtype: getattr(tl, str(dtype).removeprefix("torch."))  # noqa: E731
    first, second = map(named, kind.states)
    with on(device):
        _kernels().adamw_step[(len(programs),)](
            table, programs, table if grad_scale is None else grad_scale, table if found_inf is None else found_inf,
            lr, beta1, beta2, 1 - beta1, 1 - beta2, log(beta1), log(beta2), eps, 1 - lr * weight_decay,
            WEIGHT=named(kind.weight), GRADIENT=named(kind.gradient), FIRST=first, SECOND=second, VECTOR=kind.vector,
            ALIGNED=kind.aligned, SCALED=grad_scale is not None, CHECKED=found_inf is not None,
            FIELDS=len(Row._fields), TILES=TILES, BLOCKS=BLOCKS, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
