"""Whether ours got slower: ratios to eager of the same run, so that another clock or a hotter GPU does not count."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATE = re.compile(r"\d{4}-\d\d-\d\d")


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


def slug(device: str) -> str:
    """A device's name in the names of its files."""
    return device.lower().replace(" ", "_")


def read(files: Sequence[Path]) -> dict[str, Any]:
    """Files that pytest-benchmark wrote as one result: their cases, of a case in several the last, and what else the
    first says."""
    parts = [json.loads(file.read_text()) for file in files]
    cases = {(b["group"], b.get("extra_info", {}).get("contender")): b for part in parts for b in part["benchmarks"]}
    notes = [line for part in parts for line in part.get("notes", [])]
    return {**parts[0], "benchmarks": list(cases.values()), "notes": notes}


def runs(folder: Path) -> dict[str, list[Path]]:
    """Results of the suite in a folder by run, "DEVICE-DATE", newest first. A run's parts, DEVICE-DATE-PART.json,
    belong together, in the order they were run; what else lies there is passed over."""
    found: dict[str, list[tuple[str, Path]]] = {}
    dated = [(match, p) for p in sorted(folder.glob("*.json")) if (match := DATE.search(p.stem))]
    for match, path in sorted(dated, key=lambda pair: pair[0].group(), reverse=True):
        try:
            results = json.loads(path.read_text())
        except ValueError:
            warnings.warn(f"{path} is not JSON: a run that was cut off? It is passed over", stacklevel=2)
            continue
        if "benchmarks" in results:
            found.setdefault(path.stem[: match.end()], []).append((results.get("datetime", ""), path))
    return {run: [path for _, path in sorted(parts)] for run, parts in found.items()}


def device_of(run: str) -> str:
    return DATE.split(run)[0].removesuffix("-")


def newest(folder: Path, device: str) -> str | None:
    """The newest run of this device."""
    return next((run for run in runs(folder) if device_of(run) == slug(device)), None)
