"""What needs no GPU to be known: the host's share of a call, and what a block keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.host_overhead import calls, without_kernels
from bench.measure import interleaved
from bench.saved_bytes import block_bytes, ways

pytest.importorskip("triton", reason="Triton is not installed: its launchers cannot be timed")


@pytest.mark.parametrize("op", calls())
def test_host_overhead(op: str, report: Callable[..., None]) -> None:
    """Of a call up to its launch, on the CPU even where there is a GPU."""
    with without_kernels():
        ours, theirs = calls()[op]
        contenders = {"ours": lambda i: ours(), "PyTorch": lambda i: theirs()}
        samples = interleaved(contenders, torch.device("cpu"))
    above = samples["ours"].median - samples["PyTorch"].median
    report(f"host overhead of {op}, up to the launch", samples["ours"].seconds, above_us=round(above * 1e6, 1))


@pytest.mark.parametrize("way", [w for w in ways() if "Triton" not in w])
def test_saved_bytes(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes that a joint block keeps, per token and channel. Its Triton rows: TRITON_INTERPRET=1 bench.saved_bytes."""
    kept = block_bytes(ways()[way])
    assert kept > 0
    with capsys.disabled():
        print(f"\n  bytes kept for backward, {way}: {kept:.1f}", end="")
