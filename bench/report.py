"""Results as tables and pictures, and the section of docs/benchmarks.md: python -m bench report

What --benchmark-json wrote becomes FILE.md and pictures beside it. The section is made from the newest of each
device, and from all of them over time. Losses stay in.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import gate, history, pictures, tables
from bench.environment import importable

BEGIN = "<!-- bench: what follows is written by `python -m bench report`; edits are lost -->"
END = "<!-- bench: end -->"
FROM_DOCS = "../bench/results"
OVER_TIME = (
    "How many times as fast as eager PyTorch in the same run, by date and commit (+: with changes that were not "
    "committed). Gate: below this "
    f"`pytest bench --against` fails, {history.SLOWER:.0%} slower than the newest run."
)


def ceilings(results: dict[str, Any]) -> str:
    c = results["machine_info"]["rfkernels"].get("ceilings")
    if not c:
        return ""
    return (
        f"Ceilings measured in the same run: copy {c['copy'] / 1e9:.1f} GB/s, matrix products "
        f"{c['matmul'] / 1e12:.3g} TFLOP/s, attention {c['attention'] / 1e12:.3g} TFLOP/s."
    )


def ratio_to_diffusers(results: dict[str, Any]) -> str:
    found = [
        f"{1 / row['ours']['ratio_diffusers']:.2f} times as fast in the {case}"
        for case, row in tables.rows(results).items()
        if "ratio_diffusers" in row.get("ours", {})
    ]
    return f"Against diffusers with the same weights: {'; '.join(found)}." if found else ""


def behind(results: dict[str, Any]) -> str:
    """Losses, counted."""
    slower, cases = tables.behind(tables.rows(results))
    return f"Ours is slower than eager PyTorch by 1 % or more in {slower} of {cases} cases."


def page(results: dict[str, Any], stem: str) -> str:
    """The whole of one file."""
    found = tables.rows(results)
    notes = "\n".join(results.get("notes", []))
    parts = [
        f"# {tables.where(results)}",
        " ".join(filter(None, (ceilings(results), behind(results), ratio_to_diffusers(results)))),
        "Medians; in brackets how many times as fast as eager.",
        tables.full(found),
        tables.EXPLAINED,
        tables.short(found),
        "\n".join(f"![{pictures.TITLES[name]}]({stem}-{name}.png)" for name in pictures.shown(results)),
        f"```\n{notes}\n```" if notes else "",
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def section(runs: dict[str, dict[str, Any]], over_time: dict[str, history.History]) -> str:
    """Of docs/benchmarks.md: of each run the short table and its pictures, then each device's cases over runs."""
    parts = [BEGIN, tables.EXPLAINED]
    for run, results in runs.items():
        said = " ".join(filter(None, (behind(results), ratio_to_diffusers(results))))
        drawn = [f"![{pictures.TITLES[n]}]({FROM_DOCS}/{run}-{n}.png)" for n in pictures.shown(results)]
        parts += [f"### {tables.where(results)}", f"[All of it]({FROM_DOCS}/{run}.md). {said}"]
        parts += [tables.short(tables.rows(results)), *drawn]
    parts += ["## Over time", OVER_TIME]
    for device, one in over_time.items():
        parts += [f"### {device}", f"![Each case over runs]({FROM_DOCS}/{device}-history.png)", history.table(one)]
    return "\n\n".join(part.rstrip() for part in [*parts, END])


def replaced(text: str, new: str, where: Path) -> str:
    """The text with its section replaced. Raises: ValueError if it has none."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{where} has no section between '{BEGIN}' and '{END}'")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def newest_of_each(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest run of each device."""
    runs = gate.runs(folder)
    newest = {gate.device_of(run): run for run in reversed(runs)}
    return {run: gate.read(runs[run]) for run in sorted(newest.values())}


def main(files: list[Path], out: Path, readme: Path | None, check: bool) -> None:
    runs = {file.stem: gate.read([file]) for file in files} or newest_of_each(out)
    empty = [run for run, results in runs.items() if not tables.rows(results)]
    if empty or not runs:
        found = ", ".join(empty) or f"{out} without results"
        raise ValueError(f"report: found {found}; expected what pytest bench --benchmark-json wrote")
    over_time = history.histories(out)
    if check:
        if readme is None:
            raise ValueError("report: --check needs --readme where --out is not the project's own results")
        text = readme.read_text()
        if replaced(text, section(runs, over_time), readme) != text:
            sys.exit(f"error: the bench section of {readme} is not that of {out}; run python -m bench report")
        return
    for run, results in tqdm(runs.items(), desc="report", disable=None):
        (out / f"{run}.md").write_text(page(results, run))
        if importable("matplotlib"):
            pictures.draw(results, out / run)
    for device, one in over_time.items() if importable("matplotlib") and not files else ():
        paint = partial(history.draw, one, device=device)
        pictures.saved(paint, out / f"{device}-history.png", 1.4 + 0.2 * len(one.cases))
    if readme is not None:
        readme.write_text(replaced(readme.read_text(), section(runs, over_time), readme))
        print(f"refreshed {readme}")
