"""A queue of parts with a deadline each and one for all: what runs, what is kept of it, and what is said at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmdit.files import write_atomically

GRACE = 8.0                  # seconds between the request to stop and the end by force
VERDICT = "verdict: "        # lines of a part's output that begin so are shown at the end
SHOWN = 3                    # of them, for each part
RECORD = "parts.json"
LEFT_BEHIND = {"cache", "checkpoints"}
MOST_BYTES = 15 << 20        # of an archive, before it is compressed


@dataclass(frozen=True)
class Part:
    """One thing to run."""

    name: str
    command: Sequence[str]
    seconds: float
    """Its deadline: it is asked to stop then (SIGINT), and leaves what it has."""
    beside: bool = False
    """Others start while it runs: it spends its time compiling, not on the GPU."""
    environment: dict[str, str] = field(default_factory=dict)
    after: str = ""
    """A part beside that has to have ended."""
    needs: str | None = None
    """A program without which the part is left out."""


@dataclass
class Outcome:
    """How a part ended."""

    name: str
    status: str
    """passed, failed, "stopped after N s", "no time left", "not run: ...", or "passed earlier"."""
    seconds: float = 0.0
    verdict: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.status.startswith(("passed", "not run"))


class Queue:
    """Runs parts in order until the time is over.

    Args:
        folder: where each part's output goes, NAME.log, and what it writes; named in its environment as WORK.
        seconds: of all parts together.
        earlier: outcomes of a call before: what passed then is not run again.
    """

    def __init__(self, folder: Path, seconds: float, earlier: dict[str, Outcome]) -> None:
        self.folder, self.earlier = folder, earlier
        self.outcomes: list[Outcome] = []
        self._end = time.monotonic() + seconds
        self._running: list[tuple[Part, subprocess.Popen, float]] = []

    def run(self, parts: Sequence[Part]) -> None:
        """All of them. One that fails does not keep the others from running."""
        try:
            for part in parts:
                self._wait(lambda part=part: all(p.name != part.after for p, *_ in self._running))   # type: ignore[misc]
                if part.beside:
                    self._start(part)
                elif self._start(part):
                    self._wait(lambda part=part: all(p is not part for p, *_ in self._running))     # type: ignore[misc]
            self._wait(lambda: not self._running)
        finally:
            for _, process, _ in self._running:
                _kill(process, signal.SIGKILL)

    def _start(self, part: Part) -> bool:
        if (before := self.earlier.get(part.name)) is not None and before.status.startswith("passed"):
            self._ended(Outcome(part.name, "passed earlier", before.seconds, before.verdict))
            return False
        if part.needs is not None and shutil.which(part.needs) is None:
            self._ended(Outcome(part.name, f"not run: there is no {part.needs}"))
            return False
        if self._end - time.monotonic() < min(10.0, part.seconds):
            self._ended(Outcome(part.name, "no time left"))
            return False
        environment = {**os.environ, **part.environment, "WORK": str(self.folder), "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{part.name}.log").open("wb") as log:
            process = subprocess.Popen(
                part.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        print(f"{part.name}: started", flush=True)
        self._running.append((part, process, time.monotonic()))
        return True

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            for entry in list(self._running):
                part, process, began = entry
                late = time.monotonic() > min(began + part.seconds, self._end)
                if process.poll() is None and not late:
                    continue
                status = {0: "passed"}.get(process.returncode, f"failed ({process.returncode})")
                if late and process.poll() is None:
                    _stop(process)
                    status = f"stopped after {time.monotonic() - began:.0f} s"
                self._running.remove(entry)
                verdict = _verdict(self.folder / f"{part.name}.log")
                self._ended(Outcome(part.name, status, time.monotonic() - began, verdict))
            time.sleep(0.05)

    def _ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        record = json.dumps([asdict(o) for o in self.outcomes], indent=1)
        write_atomically(self.folder / RECORD, record.encode())
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)

    def verdict(self) -> str:
        """What came of each part, in about thirty lines."""
        lines = []
        for outcome in self.outcomes:
            mark = "ok  " if outcome.good else "FAIL"
            lines.append(f"{mark} {outcome.name:12s} {outcome.seconds:5.0f} s  {outcome.status}")
            lines += [f"       {line[:150]}" for line in outcome.verdict[-SHOWN:]]
        return "\n".join(lines)


def _verdict(log: Path) -> list[str]:
    """Lines that a part marked as what matters; of one that marked none, its last."""
    lines = log.read_text(errors="replace").splitlines()
    marked = [line.removeprefix(VERDICT) for line in lines if line.startswith(VERDICT)]
    return marked or [line for line in lines if line.strip()][-1:]


def _started_by(pid: int) -> list[int]:
    """All processes that descend from one, those in sessions of their own too: torchrun's workers are."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):                                                # it may have ended since
            text = stat.read_text()
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(text.split()[0]))
    found, pending = [], [pid]
    while pending:
        found += (here := children.get(pending.pop(), []))
        pending += here
    return found


def _kill(process: subprocess.Popen, number: signal.Signals) -> None:
    """To a part and all that it started."""
    for pid in (*_started_by(process.pid), process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop(process: subprocess.Popen) -> None:
    started = _started_by(process.pid)
    _kill(process, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _kill(process, signal.SIGKILL)
    process.wait()
    for pid in started:                                       # whose parent ended first
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def unpack(archive: Path, folder: Path) -> dict[str, Outcome]:
    """What a call before left: its files, and how its parts ended."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    record = folder / RECORD
    return {o["name"]: Outcome(**o) for o in json.loads(record.read_text())} if record.is_file() else {}


def pack(folder: Path, archive: Path, about: dict[str, Any]) -> None:
    """A folder as one file, written beside and renamed: an archive that is there is whole. Data and checkpoints stay
    behind, and what is too large to come back from a borrowed machine, the largest files first; `about` names them."""
    files = [p for p in folder.rglob("*") if p.is_file() and not LEFT_BEHIND & set(p.relative_to(folder).parts)]
    files.sort(key=lambda p: p.stat().st_size)
    while files and sum(p.stat().st_size for p in files) > MOST_BYTES:
        about.setdefault("left_out", []).append(str(files.pop().relative_to(folder)))
    write_atomically(folder / "about.json", json.dumps(about, indent=1).encode())
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted({*files, folder / "about.json"}):
            tar.add(path, path.relative_to(folder))
    os.replace(partial, archive)
