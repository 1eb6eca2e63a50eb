"""A results file as a Markdown table and a picture: python -m bench.report bench/results/FILE.json --out docs

What --benchmark-json wrote becomes FILE.md and FILE.png: for every case the time of each contender and how many times
faster than eager it is. Losses stay in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, dict[str, Any]]]
"""By case, by contender: {"us": median, "spread": ..., and the record of the run}."""


def rows(results: dict[str, Any]) -> Rows:
    found: Rows = {}
    for b in results["benchmarks"]:
        record = b.get("extra_info", {})
        if "contender" in record:
            found.setdefault(b["group"], {})[record["contender"]] = {"us": b["stats"]["median"] * 1e6, **record}
    return found


def where(results: dict[str, Any]) -> str:
    """The line without which no figure stands."""
    machine = results["machine_info"]["rfkernels"]
    parts = [f"{name} {machine[name]}" for name in ("driver", "torch", "triton") if machine.get(name)]
    return ", ".join([machine["device"], *parts, results["datetime"][:10]])


def markdown(results: dict[str, Any]) -> str:
    found = rows(results)
    names = list(dict.fromkeys(n for contenders in found.values() for n in contenders))
    lines = [f"Medians in microseconds (times as fast as the baseline); {where(results)}.", ""]
    lines += ["| case | " + " | ".join(names) + " | GB/s | of copy | runs |", "|---" * (len(names) + 4) + "|"]
    for case, contenders in found.items():
        base = baseline(contenders)
        cells = [f"{c['us']:.1f} ({base / c['us']:.2f})" if (c := contenders.get(n)) else "" for n in names]
        ours = contenders.get("ours", {})
        copied = f"{ours['of_copy']:.0%}" if "of_copy" in ours else ""
        runs = ours.get("runs", "").partition(": ")[2].split(" (")[0]
        lines.append(f"| {case} | {' | '.join(cells)} | {ours.get('GB/s', '')} | {copied} | {runs} |")
    return "\n".join(lines) + "\n"


def baseline(contenders: dict[str, dict[str, Any]]) -> float:
    """Eager's time, or that of the model compared with."""
    return next(c["us"] for n, c in contenders.items() if n in ("eager", "diffusers"))


def picture(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = rows(results)
    names = list(dict.fromkeys(n for contenders in found.values() for n in contenders))
    height = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(names) * len(found)), layout="constrained")
    for j, name in enumerate(names):
        at = [i + j * height for i, c in enumerate(found.values()) if name in c]
        speed = [baseline(c) / c[name]["us"] for c in found.values() if name in c]
        axes.barh(at, speed, height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(found))], list(found), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as the baseline (eager PyTorch, or diffusers)")
    behind = sum(baseline(c) < c["ours"]["us"] for c in found.values() if "ours" in c)
    axes.set_title(f"ours is behind the baseline in {behind} of {len(found)} cases\n{where(results)}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(file: Path, out: Path) -> None:
    results = json.loads(file.read_text())
    if not rows(results):
        raise SystemExit(f"error: {file} has no cases of this suite; expected what pytest bench --benchmark-json wrote")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{file.stem}.md").write_text(markdown(results))
    picture(results, out / f"{file.stem}.png")
    print(f"wrote {out / file.stem}.md and .png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the table and the picture")
    main(**vars(parser.parse_args()))
