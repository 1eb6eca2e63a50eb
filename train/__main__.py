"""python -m train: precompute data, train, plan, evaluate."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Literal

import tyro

from mmdit import commands, numbers
from mmdit.commands import DTYPES, Dtype
from train.config import Config
from train.data import costs
from train.data.blocks import check
from train.data.precompute import precompute as fill
from train.data.settings import Precompute
from train.data.shapes import SIDE
from train.data.shards import INDEX, Index
from train.engine.loop import train
from train.planning.activations import model_on_meta
from train.planning.report import report as planned
from train.recipes import RECIPES

PROG = "python -m train"


def precompute(arguments: list[str]) -> None:
    """Encode images and captions into a cache that runs read."""
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
    """Read a cache, compare checksums, take out what is damaged."""
    def main(cache: tyro.conf.Positional[Path], repair: bool = False, quarantine: bool = False) -> None:
        """Read all of a cache and compare checksums.

        Args:
            cache: Folder that precompute filled.
            repair: Move damaged shards to CACHE/quarantine, and let precompute, run again, make what they held anew.
            quarantine: Move them there, and continue without what they held.
        """
        damaged = check(cache, take_out=quarantine, make_anew=repair)
        for line in damaged:
            print(line)
        if damaged and not (repair or quarantine):
            sys.exit(
                f"error: {len(damaged)} damaged shards; --repair takes them out, precompute makes them anew; "
                "--quarantine continues without them"
            )
        left = "run precompute again" if repair else "what they held is missing from now on"
        whole = "whole" if Index.load(cache).complete else "unfinished, what there is of it is whole"
        print(f"{cache}: " + (f"{len(damaged)} shards taken out; {left}" if damaged else whole))

    tyro.cli(main, prog="python -m train verify", args=arguments)


def recipes(arguments: list[str]) -> None:
    """List the recipes: what each is for, its size and its budget."""

    def main() -> None:
        """List the recipes: what each is for, its size and its budget."""
        width = max(map(len, RECIPES))
        print(f"{'recipe':{width}s}  {'parameters':>10s}  {'pixels':>6s}  {'batch':>5s}  {'budget':>13s}  what for")
        for name, recipe in RECIPES.items():
            config = recipe()
            parameters = sum(p.numel() for p in model_on_meta(config).parameters())
            size = f"{parameters / 1e9:.1f}B" if parameters > 5e8 else f"{parameters / 1e6:.1f}M"
            budget = f"{config.minutes:g} minutes" if config.steps is None else f"{config.steps:,} steps"
            pixels, what = config.model.resolution, commands.first_line(recipe)
            print(f"{name:{width}s}  {size:>10s}  {pixels:6d}  {config.batch:5d}  {budget:>13s}  {what}")

    tyro.cli(main, prog=f"{PROG} recipes", args=arguments)


def configured(command: str, arguments: list[str]) -> Config:
    """A recipe's configuration, with flags."""
    named, *rest = arguments or ["--help"]
    if named in ("-h", "--help"):
        print(f"usage: {PROG} {command} RECIPE [flags]\n\n{run.__doc__ if command == 'run' else plan.__doc__}\n")
        print(f"`{PROG} recipes` lists the recipes, `{PROG} {command} RECIPE --help` the flags of one.")
        sys.exit()
    if named not in RECIPES:
        meant = commands.nearest(named, RECIPES).removesuffix("?")
        sys.exit(f"error: there is no recipe {named!r}{meant}; `{PROG} recipes` lists them")
    recipe, prog = RECIPES[named], f"{PROG} {command} {named}"
    return tyro.cli(Config, default=recipe(), prog=prog, args=rest, description=recipe.__doc__)


def plan(arguments: list[str]) -> None:
    """Estimate memory, communication and time of a run on GPUs that need not be here."""
    parser = argparse.ArgumentParser(prog=f"{PROG} plan", add_help=False)
    parser.add_argument("--gpus", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--gpu", default="h100", help="which, or how its name begins (default: h100)")
    parser.add_argument("--pixels", type=int, help="of an image's side (default: the recipe's)")
    own, rest = parser.parse_known_args(arguments)
    if not rest or {"-h", "--help"} & set(rest):
        print("\n".join(line for line in parser.format_help().splitlines() if line) + "\n")
    config = configured("plan", rest)
    if own.pixels is not None:
        numbers.whole("pixels", own.pixels, config.model.token_pixels)
    print(planned(config, own.gpus, own.gpu, own.pixels))


def run(arguments: list[str]) -> None:
    """Train by a recipe, or resume: one process, or many under torchrun."""
    config = configured("run", arguments)
    outcome = train(config)
    main = os.environ.get("RANK", "0") == "0"                # one of the processes that torchrun may have started
    if outcome.stopped_by is not None:
        if main:
            print(f"stopped at step {outcome.step}; the same command resumes from there")
        # SIGUSR1 is a scheduler's notice, and saving what it asks for: no failure for torchrun to mend by a restart
        sys.exit(0 if outcome.stopped_by == signal.SIGUSR1 else 128 + outcome.stopped_by)
    if main:
        print(f"{outcome.step} steps; weights, samples and loss curve in {config.run}")


def report(arguments: list[str]) -> None:
    """Make a page of a run: curves, previews over steps, settings; RUN/report.html."""
    from train import report as pages

    def main(run: tyro.conf.Positional[Path]) -> None:
        """Make a page of a run: curves, previews over steps, settings; RUN/report.html.

        A run writes it anew at each preview. It is one file and needs no network.

        Args:
            run: Run folder.
        """
        print(f"wrote {pages.write(run)}")

    tyro.cli(main, prog=f"{PROG} report", args=arguments)


def export(arguments: list[str]) -> None:
    """Write a run's weights in a layout, with a model card: what people upload."""
    from train.report.card import export as write

    def main(
        run: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        layout: Literal["native", "sd3", "diffusers", "kohya", "comfyui"] = "native",
        dtype: Dtype | None = None,
        license: str = "other",
    ) -> None:
        """Write a run's weights in a layout, with a model card: what people upload.

        Args:
            run: Run folder.
            out: New folder to write.
            layout: Of a model native, sd3 or diffusers; of an adapter native, diffusers, kohya or comfyui.
            dtype: Of the weights; as the run left them unless given.
            license: As hubs name it, for the card: apache-2.0, other, ...
        """
        print("wrote " + ", ".join(map(str, write(run, out, layout, DTYPES[dtype] if dtype else None, license))))

    tyro.cli(main, prog=f"{PROG} export", args=arguments)


def score(arguments: list[str]) -> None:
    """Draw captions of a demo's run and say how many pictures are right."""
    from train.evaluate.emoji import COUNT, score_emoji
    from train.evaluate.shapes import score_shapes

    def main(
        run: tyro.conf.Positional[Path],
        images: int = 4,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> None:
        """Draw captions of a demo's run and say how many pictures are right.

        Shapes: held-out captions, read back by rule. Edits: held-out ones, judged by rule. OpenMoji: names and
        recolourings, by the nearest of 64 pictures.

        Args:
            run: Run folder.
            images: Pictures per caption of shapes; of edits eight times as many of each task.
            steps: Euler steps; as the run draws its samples unless given.
            guidance: Classifier-free guidance; as the run draws its samples unless given.
            seed: Of the noise.
        """
        config = Config.of_run(run)
        if config.objective == "editing":
            _score_edits(run, images, seed, steps, guidance)
            return
        if config.adapter.rank and config.model.resolution == SIDE:
            _score_tuned(run, config, images, seed)
            return
        there = (config.cache / INDEX).is_file()                     # shapes are scored without their cache
        if there and Index.load(config.cache).settings["source"] == "openmoji":
            found = score_emoji(run, steps=steps, guidance=guidance, seed=seed)
            print(f"nearest of {COUNT} pictures is the one asked for (chance: {1 / COUNT:.3f})")
            print(f"  names seen in training       {found['seen']:.3f}")
            print(f"  recolourings never seen      {found['recoloured']:.3f}")
            print(f"pictures: {run / 'retrieval.png'} (left of each pair: asked for; right: by the model)")
            return
        if config.model.resolution != SIDE:
            raise ValueError(f"{run} is no run of a demo: it draws {config.model.resolution} pixels, they {SIDE}")
        result = score_shapes(run, images=images, steps=steps, guidance=guidance, seed=seed)
        print(f"held-out captions, {64 * images} pictures (chance: colour .125, position .2, size .5, shape .17)")
        units = {"edge": "pixels by which outlines are off", "iou": "of shapes with the rendering that fits best"}
        for name, value in result.items():
            print(f"  {name:9s} {value:.3f}  {units.get(name, '')}".rstrip())
        print(f"pictures: {run / 'held-out.png'} (left of each pair: drawn by rule; right: by the model)")

    tyro.cli(main, prog="python -m train score", args=arguments)


def _score_edits(run: Path, images: int, seed: int, steps: int | None, guidance: float | None) -> None:
    from train.evaluate.edits import score_edits

    found = score_edits(run, count=8 * images, seed=seed, steps=steps, guidance=guidance)
    print("share of held-out edits that show what was asked for, and in which all else is as it was")
    for name, (right, kept) in found.items():
        print(f"  {name:28s} {right:.3f}  {kept:.3f}")
    print(f"pictures: {run / 'edits.png'} (left of each pair: before; right: by the model)")


def _score_tuned(run: Path, config: Config, images: int, seed: int) -> None:
    from train.data import shapes
    from train.evaluate.tuned import score_preference, score_word

    if config.objective == "preference":
        found = score_preference(run, images=images, seed=seed)
        print(f"cleaner edges than the base's from the same noise: {found['wins']:.3f} of {found['compared']:.0%}")
        for name in ("size", "colour", "shape", "position", "all", "edge", "iou"):
            print(f"  {name:9s} {found[f'{name} before']:.3f} -> {found[f'{name} after']:.3f}")
        print(f"pictures: {run / 'preference.png'} (left of each pair: the base; right: with the adapter)")
        return
    found = score_word(run, images=images, seed=seed)
    print("pictures in which all is right, without and with the adapter")
    for name, about in (("new", f"with the new word, {', '.join(shapes.NEW_COLOUR)}"), ("old", "the demo's held-out")):
        print(f"  {about:28s} {found[f'{name} before']:.3f} -> {found[f'{name} after']:.3f}")
    print(f"pictures: {run / 'word.png'} (left of each pair: the base; right: with the adapter)")


def pairs(arguments: list[str]) -> None:
    """Draw pairs with a demo's run: its pictures, and each with clean edges, which is better."""
    from train.evaluate.tuned import make_pairs

    def main(run: tyro.conf.Positional[Path], out: Path, images: int = 2, seed: int = 1) -> None:
        """Draw pairs with a demo's run: its pictures, and each with clean edges, which is better.

        Args:
            run: Run folder of the recipe shapes.
            out: Folder to write; precompute reads it as pairs.
            images: Pictures drawn of each caption.
            seed: Of the noise.
        """
        print(f"{out}: {make_pairs(run, out, images=images, seed=seed)} pairs")

    tyro.cli(main, prog=f"{PROG} pairs", args=arguments)


def evaluate(arguments: list[str]) -> None:
    """Validation loss, CLIP score, FID and folders for GenEval of a trained run."""
    from train.evaluate.run import Evaluation
    from train.evaluate.run import evaluate as measure

    wanted = tyro.cli(Evaluation, prog="python -m train evaluate", args=arguments)
    for name, value in measure(wanted).items():
        print(f"{name:32s} {value:.4f}")


def study(arguments: list[str]) -> None:
    """Compare formulations, backbones or depths as in the paper, in small."""
    from train.study.plan import Study
    from train.study.run import run as run_study
    from train.study.variants import VARIANTS, default

    kind = arguments[0] if arguments else ""
    if kind not in VARIANTS:
        about = {name: commands.first_line(variant) for name, variant in VARIANTS.items()}
        lines = [f"  {name:14s}  {line}" for name, line in about.items()]
        more = f"{PROG} study KIND --help lists the flags of one."
        usage = "\n".join([f"usage: {PROG} study KIND ...", "", "kinds:", *lines, "", more])
        if kind in ("", "-h", "--help"):
            print(usage)
            return
        sys.exit(f"error: there is no study of {kind!r}{commands.nearest(kind, VARIANTS)}\n\n{usage}")
    wanted: Study = tyro.cli(
        Study, prog=f"python -m train study {kind}", args=arguments[1:], default=default(kind)
    )
    failed = run_study(wanted, VARIANTS[kind](wanted))
    for line in failed:
        print(f"failed: {line}")
    sys.exit(1 if failed else 0)


COMMANDS = {
    f.__name__: f
    for f in (precompute, verify, recipes, plan, run, report, export, score, pairs, evaluate, study)
}


def main() -> None:
    commands.dispatch(PROG, "Train MM-DiTs: data, training, planning, evaluation.", COMMANDS)


if __name__ == "__main__":
    main()
