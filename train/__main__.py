"""python -m train precompute | verify CACHE | plan RECIPE | run RECIPE | score RUN | evaluate RUN | study KIND"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import tyro
from tyro.extras import overridable_config_cli

from train import planning
from train.config import Config
from train.data import costs
from train.data.blocks import check
from train.data.precompute import precompute as fill
from train.data.settings import Precompute
from train.data.shards import Index
from train.loop import train
from train.recipes import RECIPES

USAGE = "usage: python -m train {precompute,verify,plan,run,score,evaluate,study} ... (each takes --help)"


def precompute(arguments: list[str]) -> None:
    config = tyro.cli(Precompute, prog="python -m train precompute", args=arguments)
    main = os.environ.get("RANK", "0") == "0"
    if config.report:
        if main:
            print(costs.report(config))
        return
    index = fill(config)
    if not main:
        return
    for bucket, shards in sorted(index.shards.items()):
        print(f"{config.cache}/{bucket}: {sum(s['samples'] for s in shards):,} samples in {len(shards)} shards")


def verify(arguments: list[str]) -> None:
    def main(cache: tyro.conf.Positional[Path], repair: bool = False, quarantine: bool = False) -> None:
        """Read all of a cache and compare checksums.

        Args:
            cache: Folder that precompute filled.
            repair: Move damaged shards to CACHE/quarantine, and let precompute, run again, make what they held anew.
            quarantine: Move them there, and go on without what they held.
        """
        damaged = check(cache, take_out=quarantine, make_anew=repair)
        for line in damaged:
            print(line)
        if damaged and not (repair or quarantine):
            sys.exit(
                f"error: {len(damaged)} damaged shards; --repair takes them out, precompute makes them anew; "
                "--quarantine goes on without them"
            )
        left = "run precompute again" if repair else "what they held is missing from now on"
        whole = "whole" if Index.load(cache).complete else "unfinished, what there is of it is whole"
        print(f"{cache}: " + (f"{len(damaged)} shards taken out; {left}" if damaged else whole))

    tyro.cli(main, prog="python -m train verify", args=arguments)


def recipes() -> dict[str, tuple[str, Config]]:
    return {name: ((recipe.__doc__ or "").strip(), recipe()) for name, recipe in RECIPES.items()}


def plan(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m train plan", add_help=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--pixels", type=int)
    own, rest = parser.parse_known_args(arguments)
    if not rest or {"-h", "--help"} & set(rest):
        print("usage: python -m train plan RECIPE [--gpus 8] [--gpu h100] [--pixels N] [flags of the recipe]\n")
    config: Config = overridable_config_cli(recipes(), prog="python -m train plan", args=rest)
    print(planning.report(config, own.gpus, own.gpu, own.pixels))


def run(arguments: list[str]) -> None:
    config: Config = overridable_config_cli(recipes(), prog="python -m train run", args=arguments)
    outcome = train(config)
    main = os.environ.get("RANK", "0") == "0"                # one of the processes that torchrun may have started
    if outcome.stopped_by is not None:
        if main:
            print(f"stopped at step {outcome.step}; the same command goes on from there")
        # SIGUSR1 is a scheduler's notice, and saving what it asks for: no failure for torchrun to mend by a restart
        sys.exit(0 if outcome.stopped_by == signal.SIGUSR1 else 128 + outcome.stopped_by)
    if main:
        print(f"{outcome.step} steps; weights, samples and loss curve in {config.run}")


def score(arguments: list[str]) -> None:
    from train.evaluate.shapes import score_shapes

    def main(
        run: tyro.conf.Positional[Path], images: int = 4, steps: int = 25, guidance: float = 3.0, seed: int = 0
    ) -> None:
        """Draw the held-out shape captions and say how many pictures are right.

        Args:
            run: Run folder.
            images: Pictures per caption.
            steps: Euler steps.
            guidance: Classifier-free guidance.
            seed: Of the noise.
        """
        result = score_shapes(run, images=images, steps=steps, guidance=guidance, seed=seed)
        print(f"held-out captions, {64 * images} pictures (chance: colour .125, position .2, size .5, shape .17)")
        for name, value in result.items():
            print(f"  {name:9s} {value:.3f}")
        print(f"pictures: {run / 'held-out.png'} (left of each pair: drawn by rule; right: by the model)")

    tyro.cli(main, prog="python -m train score", args=arguments)


def evaluate(arguments: list[str]) -> None:
    from train.evaluate.run import Evaluation
    from train.evaluate.run import evaluate as measure

    wanted = tyro.cli(Evaluation, prog="python -m train evaluate", args=arguments)
    for name, value in measure(wanted).items():
        print(f"{name:32s} {value:.4f}")


def study(arguments: list[str]) -> None:
    from train.study.plan import Study
    from train.study.run import run as run_study
    from train.study.variants import VARIANTS, default

    kind = arguments[0] if arguments else ""
    if kind not in VARIANTS:
        sys.exit(f"usage: python -m train study {{{','.join(VARIANTS)}}} ... (each takes --help)")
    wanted: Study = tyro.cli(
        Study, prog=f"python -m train study {kind}", args=arguments[1:], default=default(kind)
    )
    failed = run_study(wanted, VARIANTS[kind](wanted))
    for line in failed:
        print(f"failed: {line}")
    sys.exit(1 if failed else 0)


COMMANDS = {"precompute": precompute, "verify": verify, "plan": plan, "run": run, "score": score, "evaluate": evaluate,
            "study": study}  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(USAGE)
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"stopped{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
