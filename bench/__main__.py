"""python -m bench: reports and predictions; `pytest bench` measures."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import environment, report, roofline
from bench.models import STEPS
from mmdit import commands
from mmdit.cost.hardware import GPUS

PROG = "python -m bench"
RESULTS = Path(__file__).resolve().with_name("results")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def pixels(text: str) -> int:
    if (value := positive(text)) % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def report_command(given: list[str]) -> None:
    """Results as tables and pictures, and the section of docs/benchmarks.md from the newest."""
    parser = argparse.ArgumentParser(prog=f"{PROG} report", description=report_command.__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="of --benchmark-json; none: each device's newest in --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results, and for tables and pictures")
    parser.add_argument("--readme", type=Path, help="page whose section is refreshed; default: docs/benchmarks.md, if "
                        "--out is its own folder of results and no files are given")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if that section is not up to date")
    args = vars(parser.parse_args(given))
    if args["readme"] is None and args["out"].resolve() == RESULTS and not args["files"]:
        args["readme"] = RESULTS.parents[1] / "docs/benchmarks.md"
    report.main(**args)


def roofline_command(given: list[str]) -> None:
    """Time, memory and MFU of a step, predicted from counted FLOPs and bytes."""
    parser = argparse.ArgumentParser(prog=f"{PROG} roofline", description=roofline_command.__doc__)
    parser.add_argument("--gpu", default=environment.device_name(), help=f"one of {', '.join(GPUS)}, "
                        "how its name begins, or a machine with results; default: this one")  # fmt: skip
    parser.add_argument("--depth", type=positive, default=24, help="blocks; the width is 64 times that (default: 24)")
    parser.add_argument("--pixels", type=pixels, default=256, help="of an image's side (default: 256)")
    parser.add_argument("--batch", type=positive, default=32, help="samples (default: 32)")
    parser.add_argument("--step", choices=STEPS, default="training", help="(default: training)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--autocast", action="store_true", help="fp32 parameters under autocast to bf16")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measured ceilings and times")
    roofline.main(**vars(parser.parse_args(given)))


COMMANDS = {"report": report_command, "roofline": roofline_command}


def main() -> None:
    commands.dispatch(PROG, "What was measured, and what should be. `pytest bench` measures.", COMMANDS)


if __name__ == "__main__":
    main()
