"""Whether Triton kernels can run here, and on what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MAX_ROWS = 2**31 - 2**16
MAX_GRID = 65535             # of a CUDA grid's second and third dimension
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors: the variable must be set before the first import."""
INTERPRETED_MULTIPROCESSORS = 3          # so that the interpreter runs the split reductions too


def kernels_of(module: str) -> Callable[[], Any]:
    """Gives a module of kernels, imported at the first launch: importing rfkernels must not need Triton. Where kernels
    are interpreted, the interpreter is mended first."""

    @lru_cache
    def kernels() -> Any:
        if INTERPRETED:
            from rfkernels.interpreter import mend

            mend()
        return import_module(module)

    return kernels


def refuses_triton(*args: Any) -> str | None:
    """Why a Triton implementation cannot run on these arguments, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    for tensor in args:
        if not isinstance(tensor, Tensor):
            continue
        if tensor.dtype not in DTYPES:
            return f"Triton kernels take fp32, bf16 and fp16, not {tensor.dtype}"
        if tensor.is_cuda:
            continue
        if tensor.device.type != "cpu" or not INTERPRETED:
            return f"tensors are on {tensor.device}; Triton kernels need a GPU"
    return None


def too_many_rows(count: int) -> str | None:
    """Why a kernel that numbers its rows in 32 bits, a block at a time, cannot take so many, or None."""
    return f"the kernels take fewer than {MAX_ROWS} rows, not {count}" if count >= MAX_ROWS else None


def interpreted(*args: Any) -> str | None:
    """Why a Triton implementation that could run should not, unless forced: it would be interpreted."""
    if INTERPRETED and any(isinstance(t, Tensor) and not t.is_cuda for t in args):
        return "tensors are on the CPU; the interpreter runs only when forced"
    return None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def device_name(device: torch.device) -> str | None:
    """Names the launch table of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@lru_cache
def _cuda_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Compute capability, 90 for sm_90; 0 on AMD. On "meta" that of the target compiled for, in the interpreter 90."""
    if device.type == "cuda":
        return 0 if torch.version.hip else _cuda_capability(device)
    if device.type != "meta":
        return 90
    from triton.runtime import driver

    arch = driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU; this makes it the tensors' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
