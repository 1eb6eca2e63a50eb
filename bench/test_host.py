"""What needs no GPU to be known: the host's share of a call, and what a block keeps for its backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tables
from bench.saved_bytes import block_bytes, ways
from rfkernels.inspect.__main__ import read_table, table_path

pytest.importorskip("triton", reason="Triton is not installed: its launchers cannot be timed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver that runs nothing would stand for the GPU's")
def test_host_overhead(note: Callable[[str], None], tmp_path: Path) -> None:
    """Of ops and a block, in a process of its own, whose CUDA driver runs nothing."""
    command = [sys.executable, "-m", "bench.host_overhead", "--json", str(tmp_path / "found.json")]
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=without)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for line in done.stdout.splitlines():
        note(line)
    if "native" in found["block"]:
        assert found["block"]["native"]["both"] < found["block"]["eager"]["both"]


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
