"""python -m bench report | roofline"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import environment, report, roofline
from bench.models import STEPS
from mmdit.hardware import GPUS

RESULTS = Path(__file__).resolve().with_name("results")


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def pixels(text: str) -> int:
    if (value := positive(text)) % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What was measured, and what should be.")
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("report", help="results as tables and pictures; the README's section from the newest")
    told.add_argument("files", type=Path, nargs="*", help="of --benchmark-json; none: each device's newest in --out")
    told.add_argument("--out", type=Path, default=RESULTS, help="folder of results, and for tables and pictures")
    told.add_argument("--readme", type=Path, help="whose section is refreshed; default: the project's, if --out is its "
                      "own folder of results and no files are given")  # fmt: skip
    told.add_argument("--check", action="store_true", help="write nothing; exit 1 if that section is not up to date")
    predicted = commands.add_parser("roofline", help="time, memory and MFU of a step from counted FLOPs and bytes")
    predicted.add_argument("--gpu", default=environment.device_name(), help=f"one of {', '.join(GPUS)}, "
                           "how its name begins, or a machine with results; default: this one")  # fmt: skip
    predicted.add_argument("--depth", type=positive, default=24, help="blocks; the width is 64 times that")
    predicted.add_argument("--pixels", type=pixels, default=256, help="of an image's side")
    predicted.add_argument("--batch", type=positive, default=32)
    predicted.add_argument("--step", choices=STEPS, default="training")
    predicted.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    predicted.add_argument("--autocast", action="store_true", help="fp32 parameters under autocast to bf16")
    predicted.add_argument("--results", type=Path, default=RESULTS, help="folder of measured ceilings and times")
    return parser


def main() -> None:
    args = vars(arguments().parse_args())
    own = args["command"] == "report" and args["out"].resolve() == RESULTS and not args["files"]
    if own and args["readme"] is None:
        args["readme"] = RESULTS.parents[1] / "README.md"
    command = {"report": report.main, "roofline": roofline.main}[args.pop("command")]
    try:
        command(**args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
