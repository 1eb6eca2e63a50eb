"""The native code, where it is built (`python -m rfkernels.build`): loaded when an op first asks for it.

Its entry points (csrc/ops/python.cpp) take an op's arguments as they came. They compute and record what the backward
needs, or return None: where arguments are not what the kernels read as they are, where somebody watches operators, or
where another implementation is to run. `dispatch` tells them what is to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
entry: Any = None
"""The module of entry points; None until it is loaded."""
_off: str | None = None


def missing() -> str | None:
    """Why there is none, or None; it is loaded then."""
    return _off or _load()


missing._dynamo_marked_constant = True         # type: ignore[attr-defined] # of a compiled region; see library.measured


@lru_cache
def _load() -> str | None:
    global entry
    from rfkernels import build, dispatch, launcher, registration

    if registration.NAMESPACE != "rfkernels":
        return "the native code is that of the package rfkernels, not of a copy under another name"
    if os.environ.get("RFKERNELS_NATIVE") == "0":
        return "RFKERNELS_NATIVE is 0"
    try:
        path = build.built()
        if path is None:
            return "the native code is not built (python -m rfkernels.build)"
        made = _module(path)
    except (ImportError, OSError, RuntimeError) as error:                   # RuntimeError: there is no home folder
        return f"the native code does not load: {error}"
    made.on_backward(registration.backward_by_name)
    made.on_launch(launcher.compiled, launcher.settings)
    entry = made
    dispatch.announce()
    return None


@lru_cache
def _load_before_the_first_launch() -> None:
    """Where the native launcher is chosen, it starts the first kernel too: CUDA kernels that it takes by a launch table
    round differently from Triton's, and a run's first step must not differ from the others."""
    from rfkernels import launcher

    if launcher.native():
        missing()


def direct(op: str, *args: Any) -> Any:
    """An op by its entry point; None if it does not take it."""
    if torch.compiler.is_compiling():
        return None
    if entry is None:
        _load_before_the_first_launch()
    return None if entry is None else getattr(entry, op)(*args)


def or_else(op: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """An op that has no operator of its own here: its entry point, where that takes it, or else its definition, which
    compilers, modes and transforms see. Arguments are in autocast's dtype already."""

    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            made = direct(op, *args)
        return definition(*args) if made is None else made

    return run


@contextmanager
def without() -> Iterator[None]:
    """Inside, everything runs as where nothing was built. Not thread-safe: it sets a process-wide switch."""
    global entry, _off
    before, (entry, _off) = (entry, _off), (None, "it is switched off")
    try:
        yield
    finally:
        entry, _off = before


def _module(path: Path) -> Any:
    loader = ExtensionFileLoader("rfkernels_native", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    made = module_from_spec(spec)
    loader.exec_module(made)
    return made


def instructions(name: str = "") -> str:
    """Takes the kernels of an instruction set ("avx512", "avx2", "portable"); "": the best of this CPU. Returns which.
    Only where `missing` says nothing.

    Raises: ValueError for one that was not built.
    """
    return str(entry.instructions(name))


def instructions_here() -> str:
    """The instruction set whose kernels run now."""
    return str(entry.instructions(None))


def described() -> str:
    """A line for `explain`."""
    from rfkernels import build, launcher

    if reason := missing():
        return f"native code: none: {reason}"
    reason = build.cuda_missing()
    cuda = f"no CUDA kernels: {reason}" if reason else "CUDA kernels are built"
    return f"native code: {instructions_here()} on this CPU; {launcher.described()} starts Triton's kernels; {cuda}"


def refuses(*args: Any) -> str | None:
    """Why a native implementation cannot run on these arguments, or None."""
    for tensor in args:
        if isinstance(tensor, Tensor):
            if tensor.device.type != "cpu":
                return f"tensors are on {tensor.device}; the native kernels run on a CPU"
            if tensor.dtype not in DTYPES:
                return f"the native kernels take fp32, bf16 and fp16, not {tensor.dtype}"
    return missing()
