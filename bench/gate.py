"""Whether ours got slower: ratios to eager of the same run, so that another clock or a hotter GPU does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Time of ours over eager's, by case, of a file that pytest-benchmark wrote."""
    return {b["group"]: b["extra_info"]["ratio"] for b in results["benchmarks"] if "ratio" in b.get("extra_info", {})}


def regressions(before: dict[str, float], after: dict[str, float], slower: float) -> list[str]:
    """Cases of both runs whose ratio grew by more than `slower`, a fraction; a line each."""
    return [
        f"{case}: {before[case]:.3f} -> {after[case]:.3f} of eager's time ({after[case] / before[case] - 1:+.0%})"
        for case in sorted(before.keys() & after.keys())
        if after[case] > before[case] * (1 + slower)
    ]


def newest(folder: Path, device: str) -> Path | None:
    """The newest stored results of this device; files are named DEVICE-DATE.json."""
    name = device.lower().replace(" ", "_")
    found = sorted(folder.glob(f"{name}-*.json"))
    return next((p for p in reversed(found) if "benchmarks" in json.loads(p.read_text())), None)
