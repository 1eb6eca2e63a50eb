"""Which implementation of an op runs, and why.

Each op registers its implementations in order of preference. An implementation states, for given inputs, why it cannot
run (or None). The first that can is taken; `backend(...)` or the variable RFKERNELS_BACKEND forces one, and a forced
implementation that cannot run is an error, never a silent fallback. `explain` tells the choice and the reasons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rfkernels.checks import told_copies

BACKENDS = ("reference", "library", "native", "triton")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `run` and `refuses` take the op's checked positional arguments."""

    backend: str
    what: str
    """One line for `explain`: what runs."""
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args: None
    """Why it cannot run on these arguments, or None if it can."""
    slower: Callable[..., str | None] | None = None
    """Why a later one is better on these arguments although this one can run, or None; not asked if this is forced."""

    def passed_over(self, forced: str | None, *args: Any) -> str | None:
        """Why it is not taken, or None."""
        reason = self.refuses(*args)
        if reason is None and self.slower is not None and forced is None:
            reason = self.slower(*args)
        return reason


_registry: dict[str, tuple[Implementation, ...]] = {}
_checked: dict[str, Callable[..., tuple[Any, ...] | None]] = {}
_pretended: set[str] = set()


def _from_environment() -> str | None:
    name = os.environ.get("RFKERNELS_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"RFKERNELS_BACKEND is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_forced: dict[str | None, str] = {None: name} if (name := _from_environment()) else {}      # by op; None: every op


def register(op: str, check: Callable[..., tuple[Any, ...] | None], *implementations: Implementation) -> None:
    """Registers an op. `check` takes the public function's arguments, raises on bad ones, returns them positionally;
    None if layers among them have to be called instead."""
    _registry[op] = implementations
    _checked[op] = check


def ops() -> tuple[str, ...]:
    return tuple(_registry)


def implementations(op: str) -> tuple[Implementation, ...]:
    return _registry[op]


@contextmanager
def as_on_a_gpu(*only: str) -> Iterator[None]:
    """Inside, every op (or those named) takes its most preferred implementation wherever its tensors are: for counting
    what would run by shapes alone (fake tensors), or with kernels replaced. On real CPU tensors kernels cannot run."""

    def willing(first: Implementation) -> Implementation:
        def asked(*args: Any) -> None:
            first.refuses(*args)               # asked, for what asking costs; the answer is for this machine

        return replace(first, refuses=asked, slower=None)

    before, pretended = dict(_registry), set(only or _registry) - _pretended
    for op in only or before:
        _registry[op] = (willing(before[op][0]), *before[op])
    _pretended.update(pretended)
    announce()
    try:
        yield
    finally:
        _registry.update(before)
        _pretended.difference_update(pretended)
        announce()


def pretended(op: str) -> bool:
    """Whether `as_on_a_gpu` holds for an op."""
    return op in _pretended


@contextmanager
def backend(name: str, *only: str) -> Iterator[None]:
    """Forces one backend for every op called inside, or for those named in `only`: "reference",
    "library", "native" or "triton".

    Raises: ValueError for an unknown name; RuntimeError from an op that has no such implementation or whose
    implementation cannot run on the inputs. Not thread-safe: it sets a process-wide switch.

    >>> with rfkernels.backend("reference", "adaln"):
    ...     y = rfkernels.adaln(torch.randn(2, 16, 64), torch.zeros(2, 64))
    >>> y.shape
    torch.Size([2, 16, 64])
    """
    global _forced
    unknown = [op for op in only if op not in _registry]
    if unknown:
        raise ValueError(f"backend: only has {', '.join(map(repr, unknown))}; expected ops: {', '.join(_registry)}")
    if name not in BACKENDS:
        raise ValueError(f"backend: name is {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    before, _forced = _forced, {**_forced, **dict.fromkeys(only, name)} if only else {None: name}
    announce()
    try:
        yield
    finally:
        _forced = before
        announce()


ENTERED = (
    "adaln", "gated_adaln", "gated_residual", "qk_norm", "gelu_mlp", "joint_attention", "rectified_flow",
    "weighted_mse", "patch_embed", "patch_unembed",
)  # fmt: skip
"""Ops that have an entry point in the native code."""


def announce() -> None:
    """Tells the native code which ops it is to run on what; the others it leaves to `run`."""
    from rfkernels import launcher, native

    if torch.compiler.is_compiling() or native.entry is None:     # compiled regions never enter it
        return
    for op in ENTERED:
        forced, own = forced_backend(op), any(i.backend == "native" for i in _registry[op])
        kernels = "triton" if launcher.native() and forced in (None, "triton") else None
        here = "native" if own and forced in (None, "native") else None
        native.entry.choose(op, kernels if op in _pretended else here, kernels)


def forced() -> frozenset[tuple[str | None, str]]:
    """What is forced: (op, backend), the op None for every op."""
    return frozenset(_forced.items())


def forced_backend(op: str) -> str | None:
    return _forced.get(op) or _forced.get(None) if _forced else None


def choose(op: str, *args: Any) -> Implementation:
    """The implementation that runs `op` on these checked arguments."""
    forced, refusals = forced_backend(op), []
    for implementation in _registry[op]:
        if forced is not None and implementation.backend != forced:
            continue
        refusal = implementation.passed_over(forced, *args)
        if refusal is None:
            return implementation
        refusals.append(refusal)
    raise RuntimeError(
        f"{op}: backend {forced!r} was forced but "
        + ("; ".join(refusals) if refusals else f"this op has only {[i.backend for i in _registry[op]]}")
    )


def run(op: str, *args: Any) -> Any:
    return choose(op, *args).run(*args)


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> str:
    """Which implementation `op(*args, **kwargs)` would run, and why the others would not.

    Args:
        op: a public function of rfkernels, or its name. The other arguments are that function's own.
    Returns: a line for the choice, one for each tensor that is copied first, one for each implementation passed over.
    Raises: ValueError if op is unknown, and whatever the op itself raises on bad arguments.

    >>> rfkernels.explain("adaln", torch.randn(2, 16, 64), torch.zeros(2, 64)).startswith("adaln: ")
    True
    """
    from rfkernels import native

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _registry:
        raise ValueError(f"explain: unknown op {name!r}; expected one of {', '.join(_registry)}")
    with told_copies() as copies:
        checked = _checked[name](*args, **kwargs)
    if checked is None:
        return f"{name}: its layers are called as they are: one of them is more than its weights"
    taken = choose(name, *checked)
    forced = forced_backend(name)
    how = f"forced to {forced!r}" if forced else "first that can run"
    lines = [f"{name}: {taken.backend} ({how}): {taken.what}", *(f"  {line}" for line in copies)]
    for other in _registry[name]:
        if other is taken:
            continue
        reason = other.passed_over(forced, *checked) or (f"not {forced!r}" if forced else "less preferred")
        lines.append(f"  not {other.backend}: {reason}")
    lines.append(f"  {native.described()}")
    return "\n".join(lines)
