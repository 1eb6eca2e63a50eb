"""The page: curves, previews over steps, captions, speed, settings, and what changed when the run was resumed."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdit.files import naming, read_json, read_text, write_atomically
from train.config import Config
from train.report.curves import Points, drawn, points_of

NAME = "report.html"
CAPTIONS, STARTS = "captions.json", "starts.jsonl"
"""What a run writes for it: RUN/samples/captions.json, of its pictures, and RUN/starts.jsonl, of each start its step,
time, device, processes and settings."""
PREVIEWS = 24                # at most, spread evenly, the first and last among them
BYTES = 8_000_000            # of all previews together
LOSSLESS = 100_000           # bytes up to which a preview stays the PNG that it is
SIDES = (1280, 896, 640, 448, 320)


def write(run: Path) -> Path:
    """RUN/report.html, anew. Raises: FileNotFoundError if the folder is no run; ValueError for a damaged file of it."""
    config = Config.of_run(run)
    from jinja2 import Environment, PackageLoader

    metrics, speeds = entries(run / "metrics.jsonl"), entries(run / "speed.jsonl")
    starts = entries(run / STARTS)
    resumed = [start["step"] for start in starts if start["step"]]
    losses = {
        "training": points_of(metrics, "train/loss"),
        "validation, average": points_of(metrics, "validation/loss"),
        "validation, raw weights": points_of(metrics, "validation_raw/loss"),
    }
    by_time = {
        name.removeprefix("validation/"): points_of(metrics, name)
        for name in dict.fromkeys(name for entry in metrics for name in entry if name.startswith("validation/t="))
    }
    said = run / "samples" / CAPTIONS
    page = Environment(loader=PackageLoader("train.report", "."), autoescape=True).get_template("page.html")
    content = page.render(
        name=run.resolve().name, summary=summary(config, losses, speeds),
        plots={
            "Loss": drawn(losses, "loss", log=True, starts=resumed),
            "Validation loss by time": drawn(by_time, "loss, average", log=True, starts=resumed),
            "Other metrics of training": drawn(_others(metrics), "mean of a batch", starts=resumed),
            "Gradient norm": drawn({"gradient norm": points_of(metrics, "train/gradient_norm")}, "norm", log=True,
                                   starts=resumed),
            "Attention": drawn({name: points_of(metrics, f"attention/{name}") for name in ("max_logit", "entropy")},
                               "largest logit; entropy in nats", starts=resumed),
            "Speed": drawn({"pictures": points_of(speeds, "speed/images_per_second")}, "a second", starts=resumed),
        },
        previews=previews(run), captions=read_json(said) if said.is_file() else [],
        settings=sorted(flat(json.loads(config.to_json())).items()), starts=list(changes(starts)),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )  # fmt: skip
    write_atomically(run / NAME, content.encode())
    return run / NAME


def entries(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines about steps. A last line without its end, which a kill has cut, is passed over.

    Raises: ValueError, which names file and line, for any other that is none."""
    if not path.is_file():
        return []
    with naming(path):
        text = read_text(path)
    found = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            entry["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number} is no entry about a step, got {line[:80]!r}") from None
        found.append(entry)
    return found


def _others(metrics: list[dict[str, Any]]) -> dict[str, Points]:
    known = {"train/loss", "train/gradient_norm", "train/lr"}
    names = dict.fromkeys(n for entry in metrics for n in entry if n.startswith("train/") and n not in known)
    return {name.removeprefix("train/"): points_of(metrics, name) for name in names}


def summary(config: Config, losses: dict[str, Points], speeds: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What one asks first."""
    found = [("objective", config.objective), ("started from", str(config.initial or "initial weights"))]
    if training := losses["training"]:
        budget = f" of {config.steps:,}" if config.steps else f", budget {config.minutes:g} minutes"
        found.append(("step", f"{training[-1][0]:,}{budget}"))
        tail = [value for _, value in training[-100:]]
        found.append(("training loss", f"{sum(tail) / len(tail):.4f}, mean of the last {len(tail)} logged steps"))
    if validation := losses["validation, average"]:
        best = min(validation, key=lambda point: point[1])
        found.append(("validation loss", f"{validation[-1][1]:.4f}; lowest {best[1]:.4f} at step {best[0]:,}"))
    if speed := points_of(speeds, "speed/images_per_second"):
        last = [value for _, value in speed[-20:]]
        found.append(("speed", f"{sum(last) / len(last):,.1f} pictures a second"))
    return found


def previews(run: Path) -> list[dict[str, Any]]:
    """{"step", "source"}: pictures as data URLs, as large as BYTES allows."""
    files = sorted(f for f in (run / "samples").glob("step-*.png") if f.stem.removeprefix("step-").isdecimal())
    if len(files) > PREVIEWS:
        files = [files[round(i * (len(files) - 1) / (PREVIEWS - 1))] for i in range(PREVIEWS)]
    room = BYTES // max(1, len(files)) * 3 // 4                                # base64 takes a third more
    return [{"step": int(file.stem.removeprefix("step-")), "source": _as_url(file, room)} for file in files]


def _as_url(file: Path, room: int) -> str:
    content, kind = file.read_bytes(), "png"
    if len(content) > min(room, LOSSLESS):
        from PIL import Image

        kind = "webp"
        with naming(file), Image.open(file) as image:
            for side in SIDES:
                smaller = image.convert("RGB")
                smaller.thumbnail((side, side))
                made = io.BytesIO()
                smaller.save(made, "WEBP", quality=85)
                content = made.getvalue()
                if len(content) <= room:
                    break
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def flat(values: dict[str, Any], before: str = "") -> dict[str, str]:
    """Settings by their flags' names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = json.dumps(value) if not isinstance(value, str) else value
    return found


def changes(starts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each start: when, at which step, where, and the settings that were others than before."""
    former: dict[str, str] | None = None
    for start in starts:
        now = flat(start["config"]) | {"processes": str(start["processes"]), "device": start["device"]}
        differs = [] if former is None else [
            (name, former.get(name, "-"), now.get(name, "-"))
            for name in sorted(former.keys() | now.keys()) if former.get(name) != now.get(name)
        ]  # fmt: skip
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(start["time"]))
        yield {"step": start["step"], "when": when, "device": start["device"], "processes": start["processes"],
               "changed": differs, "first": former is None and not start["step"]}  # fmt: skip
        former = now
