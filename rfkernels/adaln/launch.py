"""Launches of the adaLN kernels: outputs, grids, strides. Which implementation runs is decided in op.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rfkernels.adaln.chunks import gradient_of
from rfkernels.adaln.reference import promoted
from rfkernels.launch_tables import RowLaunch, row_launch
from rfkernels.triton_support import MAX_GRID, device_name, kernels_of, multiprocessors, on

SECOND_STAGE: dict[str, Any] = {"ROWS": 32, "CHUNK": 32, "num_warps": 2, "enable_fp_fusion": True}


_kernels = kernels_of(f"{__package__}.kernels")
NONE, SUMMED, STORED = range(3)          # what becomes of a vector's gradient


def _vector(v: Tensor | None) -> tuple[int, ...]:
    """Batch and token stride of a modulation vector."""
    if v is None:
        return 0, 0
    strides = v.stride()
    return (0, 0) if len(strides) == 1 else (strides[0], 0) if len(strides) == 2 else strides[:2]


def _way(v: Tensor | None) -> int:
    return NONE if v is None else STORED if v.ndim == 3 else SUMMED


def _rows(t: Tensor) -> tuple[int, ...]:
    """Batch and token stride."""
    return t.stride()[:2]


def _unit(t: Tensor) -> Tensor:
    """A gradient may come expanded or transposed; the kernels need unit-stride channels."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _statistics(x: Tensor) -> Tensor:
    """mean and rstd, [2, B, S] fp32: one tensor, because each costs the host two microseconds to allocate and save."""
    return torch.empty((2, *x.shape[:2]), dtype=torch.float32, device=x.device)


def _settings(kernel: str, x: Tensor) -> tuple[RowLaunch, dict[str, Any]]:
    """(settings, as compile-time arguments)."""
    return _settings_at(kernel, x.shape[2], x.device)


@lru_cache(maxsize=4096)
def _settings_at(kernel: str, channels: int, device: torch.device) -> tuple[RowLaunch, dict[str, Any]]:
    launch = row_launch(kernel, channels, device_name(device))
    constants = {"C": channels, "ROWS": launch.rows, "CHUNK": launch.chunk, "CHUNKS": launch.chunks(channels)}
    if "bwd" in kernel:
        constants["STAGES"] = launch.stages
    return launch, {**constants, "num_warps": launch.warps, "enable_fp_fusion": True}


def _mixed(kernel: str, stream: Tensor, branch: Tensor) -> str:
    """Whose settings: two dtypes are loaded in two widths of vectors, which takes more registers for each channel."""
    return kernel if stream.dtype == branch.dtype else f"{kernel}_mixed"


def adaln(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, plus_one: bool, norm: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, statistics = _empty(x, dtype), _statistics(x)
    batch, length, _ = x.shape
    launch, settings = _settings("adaln_fwd", x)
    if y.numel():
        with on(x.device):
            _kernels().adaln_fwd[(batch * -(-length // launch.rows),)](
                x, shift, scale, y, statistics, length, eps,
                *_rows(x), *_vector(shift), *_vector(scale), RMS=norm == "rms", ONE=float(plus_one), **settings,
            )  # fmt: skip
    return y, statistics


def gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, plus_one: bool,
    norm: str, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h, y = _empty(residual, promoted(residual, branch, gate)), _empty(residual, dtype)
    statistics = _statistics(residual)
    batch, length, _ = residual.shape
    launch, settings = _settings("gated_adaln_fwd", residual)
    if y.numel():
        with on(residual.device):
            _kernels().gated_adaln_fwd[(batch * -(-length // launch.rows),)](
                residual, branch, gate, shift, scale, h, y, statistics, length, eps,
                *_rows(residual), *_rows(branch), *_vector(gate), *_vector(shift), *_vector(scale),
                RMS=norm == "rms", ONE=float(plus_one), **settings,
            )  # fmt: skip
    return h, y, statistics


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    h = _empty(residual, promoted(residual, branch, gate))
    batch, length, _ = residual.shape
    launch, settings = _settings(_mixed("gated_residual_fwd", residual, branch), residual)
    if h.numel():
        with on(residual.device):
            _kernels().gated_residual_fwd[(batch * -(-length // launch.rows),)](
                residual, branch, gate, h, length, *_rows(residual), *_rows(branch), *_vector(gate), **settings
            )
    return h


class Sums:
    """Gradients of modulation vectors, None of one that is not given. Those that tokens share go through partials
    [V, B * splits, C] and a second stage that adds them in a fixed order; the first stage writes per-token ones."""

    def __init__(self, x: Tensor, launch: RowLaunch, vectors: Sequence[Tensor | None], in_chunks: bool) -> None:
        batch, length, channels = x.shape
        self._like = x
        wanted = launch.programs * multiprocessors(x.device) // batch      # rounded down: one more is one wave more
        splits = max(1, min(wanted, -(-length // launch.rows)))
        self.span = -(-length // splits)
        self.span = -(-self.span // launch.rows) * launch.rows
        self.splits = -(-length // self.span)
        self.grads = [v if v is None else gradient_of(v) if in_chunks else _empty(v) for v in vectors]
        self._shared = [g for g in self.grads if g is not None and g.ndim < 3]
        shape = (len(self._shared), batch * self.splits, channels)
        self._partials = torch.empty(shape, dtype=torch.float32, device=x.device)

    def targets(self) -> list[Tensor | None]:
        """Where the first stage writes, one per vector."""
        partials = iter(self._partials)
        return [next(partials) if g is not None and g.ndim < 3 else g for g in self.grads]

    def finish(self) -> list[Tensor]:
        """One per vector, [0] of one that is not given."""
        if self._shared:
            count, total, channels = self._partials.shape
            padded = [*self._shared, *[self._shared[0]] * (4 - count)]
            sizes = [total if g.ndim == 1 else self.splits for g in padded]
            strides = [0 if g.ndim == 1 else g.stride(0) for g in padded]
            groups = total // min(sizes[:count])
            _kernels().sum_partials[(groups, -(-channels // SECOND_STAGE["CHUNK"]), count)](
                self._partials, *padded, total, *sizes, *strides, C=channels, **SECOND_STAGE
            )  # fmt: skip
        return [self._like.new_empty(0) if g is None else g for g in self.grads]


def column_sums(partials: Tensor, *outs: Tensor) -> None:
    """Fills each of up to four outs, C elements, with the sums over the rows of its part of partials [outs, rows, C]
    fp32, in a fixed order."""
    count, rows, channels = partials.shape
    if channels > SECOND_STAGE["CHUNK"] * MAX_GRID:
        for part, out in zip(partials, outs, strict=True):
            out.copy_(part.sum(0).view_as(out))
        return
    padded = [*outs, *[outs[0]] * (4 - count)]
    _kernels().sum_partials[(1, -(-channels // SECOND_STAGE["CHUNK"]), count)](
        partials, *padded, rows, rows, rows, rows, rows, 0, 0, 0, 0, C=channels, **SECOND_STAGE
    )  # fmt: skip


def _nothing(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)


def adaln_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, statistics: Tensor, plus_one: bool, norm: str,
    eps: float, in_chunks: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, shift, scale, [0] of what is not given; with in_chunks, of vectors from chunk_modulation as parts
    of one tensor."""
    if not x.numel():
        return _nothing(x, x, shift, scale)
    dx, dy = _empty(x), _unit(dy)
    launch, settings = _settings("adaln_bwd", x)
    sums = Sums(x, launch, (shift, scale), in_chunks)
    with on(x.device):
        _kernels().adaln_bwd[(x.shape[0], sums.splits)](
            dy, None, x, None, None, scale, statistics, dx, None, *sums.targets(), None, None,
            x.shape[1], sums.span, *_rows(dy), 0, 0, *_rows(x), 0, 0, 0, 0, *_vector(scale),
            RMS=norm == "rms", GATED=False, SHIFT=_way(shift), SCALE=_way(scale), GATE=NONE, BIAS=False,
            ONE=float(plus_one), **settings,
        )  # fmt: skip
        dshift, dscale = sums.finish()
    return dx, dshift, dscale


def gated_adaln_backward(
    dh: Tensor, dy: Tensor, h: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    statistics: Tensor, plus_one: bool, norm: str, eps: float, dtype: torch.dtype, bias: bool, in_chunks: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of residual (of that dtype), branch, gate, shift, scale, and the sum of the branch's over all tokens,
    [C]; [0] of what is not given or, of the sum, not `bias`. in_chunks as for adaln_backward."""
    if not h.numel():
        nothing = branch.new_zeros(branch.shape[2] if bias else 0)
        return h.new_zeros(h.shape, dtype=dtype), *_nothing(branch, branch, gate, shift, scale), nothing
    dresidual, dbranch, dh, dy = _empty(h, dtype), _empty(branch), _unit(dh), _unit(dy)
    launch, settings = _settings(_mixed("gated_adaln_bwd", h, branch), h)
    sums = Sums(branch, launch, (shift, scale, gate, branch[0, 0] if bias else None), in_chunks)
    with on(h.device):
        _kernels().adaln_bwd[(h.shape[0], sums.splits)](
            dy, dh, h, branch, gate, scale, statistics, dresidual, dbranch, *sums.targets(),
            h.shape[1], sums.span, *_rows(dy), *_rows(dh), *_rows(h), *_rows(branch), *_vector(gate), *_vector(scale),
            RMS=norm == "rms", GATED=True, SHIFT=_way(shift), SCALE=_way(scale), GATE=_way(gate), BIAS=bias,
            ONE=float(plus_one), **settings,
        )  # fmt: skip
        dshift, dscale, dgate, dbias = sums.finish()
    return dresidual, dbranch, dgate, dshift, dscale, dbias


def gated_residual_backward(
    dh: Tensor, branch: Tensor, gate: Tensor, in_chunks: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gate; in_chunks as for adaln_backward."""
    if not branch.numel():
        return torch.zeros_like(branch), torch.zeros_like(gate)
    dbranch, dh = _empty(branch), _unit(dh)
    launch, settings = _settings("gated_residual_bwd", branch)
    sums = Sums(branch, launch, (gate,), in_chunks)
    with on(branch.device):
        _kernels().gated_residual_bwd[(branch.shape[0], sums.splits)](
            dh, branch, gate, dbranch, *sums.targets(), branch.shape[1], sums.span,
            *_rows(dh), *_rows(branch), *_vector(gate), GATE=_way(gate), **settings,
        )  # fmt: skip
        (dgate,) = sums.finish()
    return dbranch, dgate
