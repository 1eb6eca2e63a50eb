"""pytest bench: contenders are timed together, interleaved, and shown by pytest-benchmark as one group per case."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import environment, gate, tables
from bench.cases import left_out
from bench.history import SLOWER

RESULTS = Path(__file__).with_name("results")
ROWS = pytest.StashKey[tables.Rows]()                    # of this run
NOTES = pytest.StashKey[list[str]]()                     # lines for the end of it
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
    group.addoption("--slower", type=float, default=SLOWER, help=f"how much worse fails, as a fraction ({SLOWER:.2f})")
    group.addoption("--ops", default="", help="only cases whose name contains this, or one of several: a;b")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)
    config.option.benchmark_quiet = True          # one table at the end says it shorter; -v brings pytest-benchmark's
    config.stash[ROWS], config.stash[NOTES] = {}, []
    if not torch.cuda.is_available():
        torch.set_num_threads(1)                  # two threads on a busy machine measure the other process


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["rfkernels"] = environment.environment()
    machine_info.pop("node", None)                # results are published; whose machine it was is nobody's business


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["machine_info"]["rfkernels"]["ceilings"] = environment.ceilings().record()
    output_json["notes"] = config.stash[NOTES]


@pytest.fixture
def report(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """report(group, samples, **record): shows seconds that were measured, with a record beside them."""

    def show(group: str, seconds: list[float], **record: Any) -> None:
        benchmark.group, benchmark.extra_info = group, record
        benchmark._timer, replay.coming, replay._started = replay, list(seconds), False
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)
        if "contender" in record:
            row = {"us": tables.median(seconds) * 1e6, **record}
            request.config.stash[ROWS].setdefault(group, {})[record["contender"]] = row

    return show


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """note(line): says something at the end of the run, and keeps it in the results."""
    return request.config.stash[NOTES].append


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    against = config.getoption("--against")
    now = {case: row["ours"]["ratio"] for case, row in config.stash[ROWS].items() if "ratio" in row.get("ours", {})}
    if not against or not now:
        return
    files = [Path(against)]
    if against == "newest":
        run = gate.newest(RESULTS, environment.device_name())
        if run is None:
            config.stash[VERDICT] = f"no results of {environment.device_name()} in {RESULTS}: nothing to compare with"
            return
        against, files = run, gate.runs(RESULTS)[run]
    worse = gate.regressions(gate.ratios(gate.read(files)), now, config.getoption("--slower"))
    config.stash[VERDICT] = "\n  ".join([f"against {against}: {'slower:' if worse else 'nothing slower'}", *worse])
    if worse:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    say = terminalreporter.write_line
    if rows := config.stash[ROWS]:
        terminalreporter.section("ours, and what it is held against")
        for line in tables.summary(rows):
            say(line)
        for line in config.stash[NOTES]:
            say(line)
        for case, row in rows.items() if "WORK" in os.environ else ():        # for the device runner
            say(f"verdict: {case}: " + ", ".join(f"{name} {found['us']:,.0f} us" for name, found in row.items()))
        say("")
        for what, why in left_out(environment.device()).items():
            say(f"left out: {what} ({why})")
    if verdict := config.stash.get(VERDICT, ""):
        say(verdict)
