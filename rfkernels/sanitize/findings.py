"""What was found, what was looked at, and how that reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITY = {
    "out-of-bounds": ERROR, "outside-view": ERROR, "misaligned": ERROR, "wild-pointer": ERROR,
    "race-write-write": ERROR, "race-same-bits": ERROR, "race-read-write": ERROR, "race-write-read": ERROR,
    "lanes-collide": ERROR, "lanes-collide-same-bits": WARNING,
    "own-read-after-write": WARNING, "own-write-after-read": NOTE, "own-write-after-write": WARNING,
    "unwritten-read": ERROR, "unwritten-output": ERROR,
    "hint": ERROR, "assumption": ERROR,
    "overflow-address": ERROR, "overflow-mask": ERROR, "overflow-control": ERROR,
    "grid": ERROR,
}  # fmt: skip
"""By kind. Within one program Triton orders nothing between its threads, but the data may: not an error by itself."""


@dataclass
class Finding:
    """One fault, at one place."""

    kind: str
    kernel: str
    where: str
    """Lines of the kernel's source, innermost first."""
    argument: str
    detail: str
    context: str
    """What was being run: a test, a case."""
    count: int = 1

    @property
    def severity(self) -> str:
        return SEVERITY[self.kind]

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        parts = (self.kernel, self.argument, f"at {self.where}" if self.where else "")
        place = " ".join(part for part in parts if part)
        ran = f" [{self.context}]" if self.context else ""
        return f"{self.severity}: {self.kind}: {place}: {self.detail}{times}{ran}"


@dataclass
class Settings:
    """What is looked for."""

    memory: bool = True
    races: bool = True
    unwritten: bool = True
    hints: bool = True
    overflow: bool = True
    programs: Callable[[tuple[int, ...]], Iterable[tuple[int, int, int]]] | None = None
    """(grid) -> the programs to run; None: all."""
    sparse: bool = False
    """Large torch.empty come from pages that cost nothing until they are touched: for tensors beyond this machine."""


@dataclass
class Statistics:
    """What was looked at, by kernel."""

    launches: Counter[str] = field(default_factory=Counter)
    programs: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    atomics: Counter[str] = field(default_factory=Counter)
    integers: Counter[str] = field(default_factory=Counter)
    """Results of arithmetic in at most 32 bits that were computed again in 64."""


@dataclass
class Writer:
    """The launch that wrote a storage last."""

    kernel: str
    argument: str
    by: Any
    """The program that wrote each granule, counted from 1; 0: none."""
    granule: int
    programs: dict[int, tuple[int, int, int]]

    def before(self, byte: int) -> str:
        """Which program wrote what lies before a byte, in words."""
        earlier = self.by[: byte // self.granule]
        wrote = earlier[earlier != 0]
        number = int(wrote[-1]) if wrote.size else int(self.by[self.by != 0][0])
        return f"program {self.programs[number]} wrote what lies {'before' if wrote.size else 'after'} the first"


class Watch:
    """All of it. There is one, `watch`."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.launch: Any = None
        """The launch that is running, see accesses.Launch."""
        self.sites: dict[int, str] = {}
        """Where storages were allocated, by address."""
        self.writers: dict[int, Writer] = {}
        """Of the storages written last, by address."""
        self.installed = False
        self._context = ""
        self.reset()

    def reset(self) -> None:
        """Forgets what was found and counted."""
        self.statistics = Statistics()
        self._findings: dict[tuple[str, ...], Finding] = {}

    @property
    def findings(self) -> list[Finding]:
        return list(self._findings.values())

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == ERROR]

    def report(self, kind: str, kernel: str, where: str, argument: str, detail: str) -> None:
        key = (kind, kernel, where, argument)
        if key in self._findings:
            self._findings[key].count += 1
        else:
            self._findings[key] = Finding(kind, kernel, where, argument, detail, self._context)

    @contextmanager
    def running(self, context: str) -> Iterator[None]:
        """Says with each finding inside what was being run."""
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before

    def table(self) -> str:
        """What was looked at and found, as text."""
        s = self.statistics
        columns = {"launches": s.launches, "programs": s.programs, "loaded": s.loads, "stored": s.stores,
                   "atomic": s.atomics, "32-bit results": s.integers}  # fmt: skip
        lines = [f"{'kernel':24s}" + "".join(f"{name:>15s}" for name in columns)]
        for kernel in sorted(s.launches):
            lines.append(f"{kernel:24s}" + "".join(f"{counts[kernel]:15,}" for counts in columns.values()))
        lines.append(f"{'all':24s}" + "".join(f"{sum(counts.values()):15,}" for counts in columns.values()))
        order = (ERROR, WARNING, NOTE)
        found = sorted(self.findings, key=lambda f: order.index(f.severity))
        counted = ", ".join(f"{sum(f.severity == s for f in found)} {s}s" for s in order)
        return "\n".join([*lines, counted, *map(str, found)])


watch = Watch()
