"""python -m mmdit sample RUN "a prompt" "another" --out grid.png"""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import Positional
from tyro.extras import SubcommandApp

from mmdit.sample import Sampler, grid

app = SubcommandApp()


@app.command
def sample(
    run: Positional[Path],
    prompts: Positional[tuple[str, ...]],
    out: Path = Path("sample.png"),
    seed: int = 0,
    steps: int = 50,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    device: str | None = None,
) -> None:
    """Draw prompts with a trained model; several prompts make a grid.

    Args:
        run: Run folder, or a weights file.
        prompts: One or more prompts.
        out: PNG to write.
        seed: Image i is a function of (seed, i).
        steps: Euler steps.
        guidance: Classifier-free guidance; 1 is none.
        size: Height and width in pixels; the training size unless given.
        device: cpu, cuda, ...; a GPU if there is one.
    """
    sampler = Sampler.load(run, device)
    images = sampler(prompts, seed=seed, steps=steps, guidance=guidance, size=size, progress=True)
    scale = max(1, (256 if len(images) == 1 else 128) // images.shape[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(images, scale=scale, margin=0 if len(images) == 1 else 2).save(out)
    print(f"wrote {out}")


@app.command
def info(run: Positional[Path]) -> None:
    """Say what a run folder or weights file holds.

    Args:
        run: Run folder, or a weights file.
    """
    sampler = Sampler.load(run, "cpu")
    parameters = sum(p.numel() for p in sampler.model.parameters())
    print(f"{parameters:,} parameters, {sampler.size[0]} x {sampler.size[1]} pixels, {sampler.formulation}")
    print(sampler.model.config)


def main() -> None:
    try:
        app.cli(prog="python -m mmdit", description="Sample from trained MM-DiTs.")
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
