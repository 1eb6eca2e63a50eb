from collections import Counter

import pytest

from rfkernels import dispatch


@pytest.fixture
def taken(monkeypatch):
    """How often each op was dispatched."""
    count, original = Counter(), dispatch.run

    def counting(op, *args):
        count[op] += 1
        return original(op, *args)

    monkeypatch.setattr(dispatch, "run", counting)
    return count
