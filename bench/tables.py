"""Results as rows, and rows as tables for people."""

from __future__ import annotations

import re
import statistics
from typing import Any

Rows = dict[str, dict[str, dict[str, Any]]]
"""By case, by contender: {"us": median, and the record of the run}."""

median = statistics.median


def rows(results: dict[str, Any]) -> Rows:
    """Of a file that pytest-benchmark wrote."""
    found: Rows = {}
    for b in results["benchmarks"]:
        record = b.get("extra_info", {})
        if "contender" in record:
            found.setdefault(b["group"], {})[record["contender"]] = {"us": b["stats"]["median"] * 1e6, **record}
    return found


def where(results: dict[str, Any]) -> str:
    """The line without which no figure stands."""
    machine = results["machine_info"]["rfkernels"]
    device = machine["device"] if on_a_gpu(results) else machine.get("processor") or machine["device"]
    parts = [f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "diffusers") if machine.get(name)]
    threads = [] if on_a_gpu(results) else [f"{machine.get('cores', '?')} thread"]
    return ", ".join([device, *threads, *parts, results["datetime"][:10]])


def baseline(contenders: dict[str, dict[str, Any]]) -> float | None:
    """Eager's time in microseconds."""
    return contenders["eager"]["us"] if "eager" in contenders else None


def behind(found: Rows) -> tuple[int, int]:
    """(cases in which ours is slower than eager by 1 % or more, cases)."""
    ratios = [c["ours"]["ratio"] for c in found.values() if "ratio" in c.get("ours", {})]
    return sum(ratio > 1.01 for ratio in ratios), len(ratios)


def on_a_gpu(results: dict[str, Any]) -> bool:
    return not results["machine_info"]["rfkernels"]["device"].startswith("cpu-")


def duration(us: float) -> str:
    return f"{us:.1f} us" if us < 1e3 else f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:.0f} ms"


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def host_times(notes: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """What `bench.host_overhead` printed into a run's notes: of each op, by way, microseconds of a call, forward and
    forward and backward."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    start = next((i for i, line in enumerate(notes) if line.startswith("microseconds a call")), len(notes))
    ways: list[str] = []
    for line in notes[start + 1 :]:
        pairs = re.findall(r"([\d.]+) / +([\d.]+)", line)
        if pairs and len(pairs) == len(ways):
            found[line.split()[0]] = {w: (float(f), float(b)) for w, (f, b) in zip(ways, pairs, strict=True)}
        elif found:
            break
        elif not line.startswith("no native"):
            ways = line.split()
    return found


COLUMNS = ("case", "ours", "eager", "x eager", "best other", "x best", "launches", "kept")


EXPLAINED = (
    "x: times as fast, medians of paired rounds. Launches and bytes kept for the backward: ours / eager as on a GPU, "
    "counted by shapes, an operator of PyTorch as one launch."
)


def cells(case: str, contenders: dict[str, dict[str, Any]]) -> list[str] | None:
    """A row of the short table, or None where ours or eager is missing. Speed-ups are medians of paired ratios."""
    mine, plain = contenders.get("ours"), contenders.get("eager")
    if not mine or not plain or "ratio" not in mine:
        return None
    best = mine["best_other"]
    other = f"{best} {duration(contenders[best]['us'])}" if best in contenders else best
    pair = lambda key, show: f"{show(mine[key])} / {show(plain[key])}" if mine.get(key) else ""  # noqa: E731
    return [
        case, duration(mine["us"]), duration(plain["us"]), f"{1 / mine['ratio']:.2f}",
        other, f"{mine['speedup_over_best']:.2f}", pair("launches", str), pair("kept_bytes", size),
    ]  # fmt: skip


def aligned(table: list[list[str]]) -> str:
    """Rows of equally many cells in lines, columns of equal width."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def summary(found: Rows) -> list[str]:
    """The short table in lines of equal width."""
    table = [list(COLUMNS), *(row for case, c in found.items() if (row := cells(case, c)))]
    return [*aligned(table).split("\n"), EXPLAINED]


def markdown(head: tuple[str, ...] | list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def short(found: Rows) -> str:
    """The short table in Markdown."""
    return markdown(COLUMNS, [row for case, c in found.items() if (row := cells(case, c))])


def full(found: Rows) -> str:
    """Every contender's time and speed-up over eager; losses stay in."""
    names = list(dict.fromkeys(n for contenders in found.values() for n in contenders))
    body = []
    for case, contenders in found.items():
        base, mine = baseline(contenders), contenders.get("ours", {})
        times = [
            "" if n not in contenders else duration(us := contenders[n]["us"]) + (f" ({base / us:.2f})" if base else "")
            for n in names
        ]
        copied = f"{mine['of_copy']:.0%}" if "of_copy" in mine else ""
        mfu = f"{mine['MFU']:.1%}" if "MFU" in mine else ""
        runs = mine.get("runs", "").partition(": ")[2].split(" (")[0]
        body.append([case, *times, str(mine.get("GB/s", "")), copied, str(mine.get("TFLOP/s", "")), mfu, runs])
    return markdown(["case", *names, "GB/s", "of copy", "TFLOP/s", "MFU", "runs"], body)
