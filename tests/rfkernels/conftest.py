import contextlib
from collections import Counter

import pytest
import torch

from rfkernels import dispatch


@pytest.fixture
def on_device():
    """Where there is a GPU, tensors are made there: kernels run on CPU tensors only in the interpreter."""
    with torch.device("cuda") if torch.cuda.is_available() else contextlib.nullcontext():
        yield


@pytest.fixture
def taken(monkeypatch):
    """How often each op was dispatched."""
    count, original = Counter(), dispatch.run

    def counting(op, *args):
        count[op] += 1
        return original(op, *args)

    monkeypatch.setattr(dispatch, "run", counting)
    return count
