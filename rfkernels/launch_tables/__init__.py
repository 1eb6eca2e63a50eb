"""Launch settings: measured ones per GPU as JSON beside this file, a heuristic where nothing was measured. Nothing is
tuned at run time, so a user's first step is as fast as the second.

A table in the folder RFKERNELS_LAUNCH_TABLES goes before.

    {"adaln_fwd": {"1536": {"lanes": 32, "warps": 4}}}          file name: the GPU's name, lower case, "_" for spaces
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

VECTOR = 8                                  # elements of a 16-byte access in bf16 and fp16
# The most channels a thread may hold, so that what stays in registers fits in about 200 of 255; see `inspect`.
MAX_LANES = 1024             # threads of a program
CHANNELS_PER_THREAD = {"adaln_fwd": 96, "gated_adaln_fwd": 96, "adaln_bwd": 18, "gated_adaln_bwd": 14,
                       "gated_residual_fwd": 96, "gated_residual_bwd": 24,
                       "gated_residual_fwd_mixed": 24, "gated_adaln_bwd_mixed": 8}  # fmt: skip
# Channels of a backward's program up to which so many stages fit beside another program, six fp32 tensors in each, in
# the 99 KiB of sm_86 and 89.
CHANNELS_OF_STAGES = {3: 2048, 2: 4096}


@dataclass(frozen=True)
class RowLaunch:
    """How a row-wise kernel covers [tokens, channels]."""

    lanes: int
    """Threads that share a row, a power of two; each holds every lanes-th vector of 8 channels."""
    warps: int
    """Of the program."""
    programs: int = 2
    """Of a backward, for each multiprocessor: each walks over some tokens of a sample and leaves one sum of them."""
    stages: int = 1
    """Of a backward: rows whose loads are in flight, in shared memory; 1: none before it is needed."""

    @property
    def chunk(self) -> int:
        """Channels in one step of a row's threads."""
        return VECTOR * self.lanes

    @property
    def rows(self) -> int:
        """Tokens in a program at a time."""
        return max(1, 32 * self.warps // self.lanes)

    def chunks(self, channels: int) -> int:
        return -(-channels // self.chunk)


def row_launch(kernel: str, channels: int, device: str | None = None) -> RowLaunch:
    """Settings of a row-wise kernel at this width: the table of the GPU named `device` if it has them, the heuristic
    otherwise: as few threads per row as registers allow, halved while that makes the chunks exact; in a backward as
    many rows in flight as shared memory holds."""
    measured = table(device).get(kernel, {}).get(str(channels)) if device else None
    if measured:
        return RowLaunch(**measured)
    lanes = 8
    while lanes < 32 and lanes * VECTOR < channels:
        lanes *= 2
    while channels > lanes * CHANNELS_PER_THREAD[kernel] and lanes < MAX_LANES:
        lanes *= 2
    if channels % (VECTOR * lanes):
        for fewer in (lanes // 2, lanes // 4):       # 1152 = 9 * 128: exact with 16 lanes, not with 32
            exact = fewer >= 8 and channels % (VECTOR * fewer) == 0
            if exact and channels <= fewer * CHANNELS_PER_THREAD[kernel]:
                lanes = fewer
                break
    found = RowLaunch(lanes, max(4, lanes // 32))
    if "bwd" not in kernel:
        return found
    held = found.rows * found.chunk * found.chunks(channels)
    stages = next((stages for stages, most in CHANNELS_OF_STAGES.items() if held <= most), 1)
    return replace(found, stages=stages)


@lru_cache
def table(device: str) -> dict[str, Any]:
    name = device.lower().replace(" ", "_").replace("/", "_") + ".json"
    folders = [Path(folder) for folder in (os.environ.get("RFKERNELS_LAUNCH_TABLES"),) if folder]
    path = next((f / name for f in folders if (f / name).is_file()), Path(__file__).with_name(name))
    return json.loads(path.read_text()) if path.is_file() else {}


@dataclass(frozen=True)
class TileLaunch:
    """How an elementwise kernel with sums over rows covers [rows, channels]."""

    rows: int
    """In a program at a time."""
    chunk: int
    """Channels of a program, a multiple of 8."""
    warps: int


def tile_launch(kernel: str, channels: int, device: str | None = None) -> TileLaunch:
    """Settings of such a kernel: the table of the GPU named `device` if it has them, otherwise 8 elements a thread."""
    measured = table(device).get(kernel, {}).get(str(channels)) if device else None
    return TileLaunch(**measured) if measured else TileLaunch(rows=4, chunk=256, warps=4)


@dataclass(frozen=True)
class PatchLaunch:
    """Tiles of a kernel between a latent's patches and tokens."""

    block_m: int
    """Tokens in a tile."""
    block_n: int
    """Channels of the tokens in a tile."""
    block_k: int
    """Elements of a patch in a tile."""
    warps: int
    stages: int


# By kernel: free of spills on sm_80, sm_90 and sm_100 (see `inspect`); K = 64 of the released models is one tile.
PATCH = {
    "patches_to_tokens": PatchLaunch(64, 128, 64, 4, 2),
    "tokens_to_patches": PatchLaunch(64, 64, 64, 4, 3),
    "patch_weight_bwd": PatchLaunch(64, 128, 64, 4, 2),
}
PATCH_FP32 = PatchLaunch(32, 64, 64, 4, 1)               # three tensor-core products each; not tuned


def patch_launch(kernel: str, channels: int, itemsize: int, device: str | None = None) -> PatchLaunch:
    """Settings of such a kernel for tokens of this many channels; the table of the GPU named `device` goes first."""
    measured = table(device).get(kernel, {}).get(f"{channels}/{itemsize}") if device else None
    return PatchLaunch(**measured) if measured else PATCH[kernel] if itemsize == 2 else PATCH_FP32


@dataclass(frozen=True)
class AttentionLaunch:
    """Tiles of an attention kernel."""

    block_m: int
    """Queries in a tile."""
    block_n: int
    """Keys in a tile."""
    warps: int
    stages: int
    """Tiles of the inner loop in flight."""
    registers: int = 0
    """Most a thread may use, so that more programs share a multiprocessor; 0: what the compiler takes."""


# By kernel, compute capability from which it holds, and head dimension up to which: the fastest inner loop, by
# instructions per score, among the tiles that `inspect` finds free of spills with Triton 3.6, 3.8 and 3.9.
ATTENTION = {
    "attention_fwd": {
        80: {64: AttentionLaunch(64, 64, 4, 2), 128: AttentionLaunch(128, 32, 8, 3)},
        86: {64: AttentionLaunch(64, 64, 4, 2), 128: AttentionLaunch(64, 32, 8, 2)},
        90: {64: AttentionLaunch(64, 64, 4, 2, registers=168), 128: AttentionLaunch(64, 64, 8, 2)},
        100: {64: AttentionLaunch(64, 64, 4, 2, registers=168), 128: AttentionLaunch(128, 64, 8, 2)},
    },
    "attention_bwd_q": {
        80: {64: AttentionLaunch(64, 32, 4, 2), 128: AttentionLaunch(32, 32, 8, 2)},
        90: {64: AttentionLaunch(64, 64, 4, 3), 128: AttentionLaunch(64, 32, 8, 2)},
        100: {64: AttentionLaunch(64, 64, 4, 2), 128: AttentionLaunch(64, 64, 8, 2)},
    },
    "attention_bwd_kv": {
        80: {64: AttentionLaunch(64, 32, 4, 2), 128: AttentionLaunch(32, 32, 8, 2)},
        90: {64: AttentionLaunch(64, 64, 4, 2), 128: AttentionLaunch(32, 64, 8, 2)},
        100: {64: AttentionLaunch(64, 64, 4, 2), 128: AttentionLaunch(64, 64, 8, 2)},
    },
}
ATTENTION_FP32 = AttentionLaunch(32, 32, 4, 1)          # three tensor-core products each; not tuned, and it spills


def attention_launch(kernel: str, dim: int, itemsize: int, arch: int, device: str | None = None) -> AttentionLaunch:
    """Settings of an attention kernel at this head dimension, bytes per element and compute capability (90: sm_90): the
    table of the GPU named `device` if it has them, otherwise those of the nearest older architecture. sm_86, 89 and
    120 have the matrix instructions of sm_80 and 99 KiB of shared memory, for up to four streams' queries."""
    measured = table(device).get(kernel, {}).get(f"{dim}/{itemsize}") if device else None
    if measured:
        return AttentionLaunch(**measured)
    if itemsize > 2:
        return ATTENTION_FP32
    known = max((a for a in ATTENTION[kernel] if a <= (89 if arch >= 120 else arch)), default=80)
    return ATTENTION[kernel][known][64 if dim <= 64 else 128]
