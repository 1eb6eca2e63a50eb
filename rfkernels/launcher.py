"""Which launcher starts Triton's kernels on a GPU: the native one (csrc/launch) where it is built, or Triton's own.

The native one serves the ops that have an entry point (`python -m rfkernels.build` makes it); RFKERNELS_LAUNCH=triton
takes Triton's everywhere. Triton compiles in both cases. The native launcher asks here once for each specialisation of
a kernel and once for each setting. On an H100 a d = 24 sampling step of one picture takes 12.8 ms with it and 35.3 ms
without, a training step of 32 pictures 124 and 143 ms (bench.device.ways, 2026-11-27).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rfkernels.launch_tables import attention_launch, row_launch, table, tile_launch
from rfkernels.triton_support import INTERPRETED, capability, device_name, multiprocessors

LAUNCHERS = ("triton", "native")
_LETTERS = {"fp32": "f", "fp64": "d", "i64": "l", "u64": "l"}
"""How an argument is handed over, by Triton's name of its type: see Compiled in csrc/launch/launch.h."""


def _from_environment() -> str:
    name = os.environ.get("RFKERNELS_LAUNCH") or "native"
    if name not in LAUNCHERS:
        raise ValueError(f"RFKERNELS_LAUNCH is {name!r}; expected one of {', '.join(LAUNCHERS)}")
    return name


_chosen = _from_environment()


def native() -> bool:
    """Whether the native launcher is to start Triton's kernels, where it is built."""
    return _chosen == "native" and not INTERPRETED and torch.version.hip is None


def described() -> str:
    """The launcher that is chosen, for `explain` where the native code is built."""
    return "the native launcher" if native() else "Triton's own launcher"


def _leaves(types: Any) -> Iterator[str]:
    for one in types:
        if isinstance(one, (tuple, list)):
            yield from _leaves(one)
        else:
            yield one


def compiled(module: str, name: str, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[int, int, int, str]:
    """A kernel for these arguments: (the driver's handle, threads, bytes of shared memory, how each argument is taken).

    Raises: RuntimeError if it needs what only Triton's launcher gives.
    """
    kernel = getattr(import_module(module), name).warmup(*args, grid=(1, 1, 1), **constants)
    kernel._init_handles()
    metadata = kernel.metadata
    beyond = {n: v for n in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl",
                             "tensordesc_meta") if (v := getattr(metadata, n, None))}  # fmt: skip
    if beyond or getattr(metadata, "num_ctas", 1) != 1:
        raise RuntimeError(f"{name} needs {beyond or 'a cluster'}, which only Triton's launcher gives")
    types = list(kernel.src.signature.values())[: len(args)]
    takes = "".join(
        "-" if t == "constexpr" else "p" if t.startswith("*") else _LETTERS.get(t, "i") for t in _leaves(types)
    )
    return kernel.function, 32 * metadata.num_warps, metadata.shared, takes


def _listed(name: str, size: int, gpu: str | None) -> bool:
    """Whether a GPU's launch table says that something is faster than what else would run, for this width or head
    dimension: {"adaln_bwd_cuda": {"1536": {}}, "gelu_bwd_lt": {"6144": {}}}."""
    return gpu is not None and str(size) in table(gpu).get(name, {})


def _find_cuda(device: torch.device) -> bool:
    """Tells the native code where the CUDA kernels for a GPU lie, if they are built. Returns whether they are."""
    from rfkernels import build, native

    path = build.cuda_binary(capability(device))
    if path is not None:
        native.entry.cuda_binary(-1 if device.index is None else device.index, str(path))
    return path is not None


def settings(name: str, size: int, like: Tensor) -> tuple[int, ...]:
    """What csrc/launch asks of the launch tables, for this many channels or heads of this size."""
    from rfkernels.joint_attention.library import measured

    device = device_name(like.device)
    if name == "multiprocessors":
        return (multiprocessors(like.device),)
    if name == "library_from":
        return measured(like.device.type, like.device.index, size)[1:]
    if name.startswith("attention"):
        arch = capability(like.device)
        a = attention_launch(name, size, like.dtype.itemsize, arch, device)
        exact = like.dtype == torch.float32 and bool(arch)                 # three tf32 products for one of fp32
        return a.block_m, a.block_n, a.warps, a.stages, a.registers, int(exact)
    if name.endswith("_lt"):
        return (int(_listed(name, size, device)),)
    if name.endswith("_cuda"):
        return (int(_listed(name, size, device) and _find_cuda(like.device)),)
    if name == "gelu_bwd":
        tile = tile_launch(name, size, device)
        return tile.rows, tile.chunk, tile.warps
    row = row_launch(name, size, device)
    return row.rows, row.chunk, row.chunks(size), row.warps, row.programs, row.stages


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Inside, the launcher of this name starts Triton's kernels. Not thread-safe: it sets a process-wide switch.

    Raises: ValueError for an unknown name; RuntimeError for the native one where it is not built.
    """
    global _chosen
    from rfkernels import dispatch
    from rfkernels import native as code

    if name not in LAUNCHERS:
        raise ValueError(f"launcher: name is {name!r}; expected one of {', '.join(LAUNCHERS)}")
    if name == "native" and (reason := code.missing()):
        raise RuntimeError(f"launcher: {reason}")
    before, _chosen = _chosen, name
    dispatch.announce()
    try:
        yield
    finally:
        _chosen = before
        dispatch.announce()
