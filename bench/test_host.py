"""What needs no GPU to be known: the host's share of a call, and what a block keeps for its backward."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import tables
from bench.host_overhead import calls, without_kernels
from bench.measure import interleaved
from bench.saved_bytes import block_bytes, ways
from rfkernels.inspect.__main__ import read_table, table_path

pytest.importorskip("triton", reason="Triton is not installed: its launchers cannot be timed")


@pytest.mark.parametrize("op", calls())
def test_host_overhead(op: str, report: Callable[..., None], note: Callable[[str], None]) -> None:
    """Of a call up to its launch, on the CPU even where there is a GPU."""
    with without_kernels():
        ours, theirs = calls()[op]
        contenders = {"ours": lambda i: ours(), "PyTorch": lambda i: theirs()}
        samples = interleaved(contenders, torch.device("cpu"))
    above = samples["ours"].median - samples["PyTorch"].median
    report(f"host overhead of {op}, up to the launch", samples["ours"].seconds, above_us=round(above * 1e6, 1))
    took, base = samples["ours"].median * 1e6, samples["PyTorch"].median * 1e6
    note(f"host time of {op} up to its launch: {took:.1f} us; a PyTorch call of its kind {base:.1f} us")


@pytest.mark.parametrize("way", [w for w in ways() if "Triton" not in w])
def test_saved_bytes(way: str, note: Callable[[str], None]) -> None:
    """Bytes that a joint block keeps on this machine. Its Triton rows: TRITON_INTERPRET=1 bench.saved_bytes."""
    kept = block_bytes(ways()[way])
    assert kept > 0
    note(f"bytes a block keeps per token and channel, bf16, {way}: {kept:.1f}")


def test_compiled_kernels(note: Callable[[str], None]) -> None:
    """What the compiler makes of the kernels for an H100, which need not be here; fails as `--check` does."""
    command = [sys.executable, "-m", "rfkernels.inspect", "--check", "--targets", "sm_90"]
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=without)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for line in compiled_kernels(read_table(table_path()), "sm_90"):
        note(line)


def compiled_kernels(table: dict[str, dict[str, Any]], target: str) -> list[str]:
    """A line for every kernel, over the widths or head dimensions that it is compiled for."""
    reports: dict[str, list[dict[str, Any]]] = {}
    for report in table.values():
        if report["target"] == target:
            reports.setdefault(report["kernel"], []).append(report)
    head = ["compiled for an H100", "settings", "registers", "spills", "residency", "products", "moved / least"]
    rows = []
    for kernel, found in reports.items():
        span = lambda key, show="{}", found=found: ranged([r[key] for r in found], show)  # noqa: E731
        products = ranged([r["counts"]["wgmma"] for r in found], "{} wgmma") if found[0]["counts"]["mma"] else ""
        cells = [span("registers"), span("spills"), span("occupancy", "{:.0%}"), products, span("moved", "{:.2f}")]
        rows.append([kernel, str(len(found)), *cells])
    lines = tables.aligned([head, *rows]).split("\n")
    return ["", *lines, "all of it: python -m rfkernels.inspect --targets sm_90"]


def ranged(values: list[float], show: str) -> str:
    low, high = show.format(min(values)), show.format(max(values))
    return low if low == high else f"{low} to {high}"
