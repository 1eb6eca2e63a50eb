import contextlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from rfkernels import build, dispatch, native
from tests.rfkernels import paths


@pytest.fixture
def on_device():
    """Where there is a GPU, tensors are made there: kernels run on CPU tensors only in the interpreter."""
    with torch.device("cuda") if torch.cuda.is_available() else contextlib.nullcontext():
        yield


@pytest.fixture
def cxx():
    """For what inductor compiles for a CPU."""
    try:
        return build.compiler()
    except build.CannotBuild as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        both = not (torch.cuda.is_available() or metafunc.definition.get_closest_marker("triton_only"))
        metafunc.parametrize("path", ("triton", "native") if both else ("triton",), indirect=True)


@pytest.fixture
def path(request):
    """Which kernels a test runs on: see paths.py."""
    if request.param == "native" and native.missing():
        pytest.skip(native.missing())
    torch._dynamo.reset()                              # the paths share code, and past eight of one a compiler gives up
    paths.take(request.param)
    yield request.param
    paths.take("triton")


@pytest.fixture(params=("portable", "avx2", "avx512"))
def instructions(request):
    """A CPU's kernels of each instruction set."""
    if reason := native.missing():
        pytest.skip(reason)
    wanted = {"avx2": "avx2", "avx512": "avx512f"}.get(request.param)
    if wanted and wanted not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {wanted}")
    assert native.instructions(request.param) == request.param
    yield request.param
    native.instructions()


@pytest.fixture
def taken(monkeypatch):
    """How often each op ran: dispatched, or taken by its entry point in the native code."""
    count, run, direct, inside = Counter(), dispatch.run, native.direct, []

    def counting(op, *args):
        count[op] += 1
        inside.append(op)
        try:
            return run(op, *args)
        finally:
            inside.pop()

    def entering(op, *args):
        made = direct(op, *args)
        if made is not None and op in dispatch.ops() and not inside:
            count[op] += 1
        return made

    monkeypatch.setattr(dispatch, "run", counting)
    monkeypatch.setattr(native, "direct", entering)
    return count
