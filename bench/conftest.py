"""pytest bench: contenders are timed together, interleaved, and shown by pytest-benchmark as one group per case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import environment, gate

RESULTS = Path(__file__).with_name("results")
RATIOS = pytest.StashKey[dict[str, float]]()             # ours over eager (or over diffusers), by group, of this run
VERDICT = pytest.StashKey[str]()


class Replay:
    """A timer that tells pytest-benchmark times that were measured elsewhere: its rounds last what they lasted."""

    def __init__(self) -> None:
        self._now, self._started = 0.0, False
        self.coming: list[float] = []

    def __call__(self) -> float:
        if self._started and self.coming:
            self._now += self.coming.pop(0)
        self._started = not self._started
        return self._now


replay = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--against", metavar="JSON", help="fail if ours over eager is worse than in this file, which --benchmark-json "
        "wrote; 'newest' takes the newest of this GPU in bench/results",
    )  # fmt: skip
    group.addoption("--slower", type=float, default=0.10, help="how much worse fails, as a fraction (0.10)")
    group.addoption("--ops", default="", help="only cases whose name contains this")


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)
    config.stash[RATIOS] = {}
    if not torch.cuda.is_available():
        torch.set_num_threads(1)                  # two threads on a busy machine measure the other process


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["rfkernels"] = environment.environment()


@pytest.fixture
def report(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """report(group, samples, **record): shows seconds that were measured, with a record beside them."""

    def show(group: str, seconds: list[float], **record: Any) -> None:
        benchmark.group, benchmark.extra_info = group, record
        benchmark._timer, replay.coming, replay._started = replay, list(seconds), False
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
        if "ratio" in record:
            request.config.stash[RATIOS][group] = record["ratio"]

    return show


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    against, now = config.getoption("--against"), config.stash[RATIOS]
    if not against or not now:
        return
    before = gate.newest(RESULTS, environment.device_name()) if against == "newest" else Path(against)
    if before is None:
        config.stash[VERDICT] = f"no results of {environment.device_name()} in {RESULTS}: nothing to compare with"
        return
    worse = gate.regressions(gate.ratios(json.loads(before.read_text())), now, config.getoption("--slower"))
    config.stash[VERDICT] = "\n  ".join([f"against {before}: {'slower:' if worse else 'nothing slower'}", *worse])
    if worse:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if verdict := config.stash.get(VERDICT, ""):
        terminalreporter.write_line(verdict)
