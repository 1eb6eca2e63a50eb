"""pytest plugin: a test during which a kernel did something wrong fails.

    TRITON_INTERPRET=1 python -m pytest -p rfkernels.sanitize.plugin

What autograd and the ops of rfkernels give is looked at too: an element that nobody wrote is a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rfkernels import dispatch
from rfkernels.sanitize import canary
from rfkernels.sanitize.findings import watch
from rfkernels.sanitize.interpreter import install
from rfkernels.triton_support import INTERPRETED


def pytest_configure(config: pytest.Config) -> None:
    if not INTERPRETED:
        raise pytest.UsageError("the sanitizer watches Triton's interpreter: set TRITON_INTERPRET=1")
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("the sanitizer watches one process: run without -n")
    install()
    dispatch.run = _checking(dispatch.run, "forward of {}")
    torch.autograd.grad = _checking(torch.autograd.grad, "a gradient")


def _checking(function: Any, label: str) -> Any:
    def checked(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if not torch.compiler.is_compiling():
            canary.check_results(label.format(args[0] if args else ""), out)
        return out

    return checked


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = {id(f): f.count for f in watch.errors}
    with watch.running(item.nodeid):
        yield
    new = [f for f in watch.errors if f.count > before.get(id(f), 0)]
    if new:
        pytest.fail(f"sanitizer: {new[-1]}", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was launched by a fixture or at an import fails the run too."""
    if watch.errors and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("sanitizer")
    terminalreporter.write(watch.table() + "\n")
