"""Folders of samples as GenEval and T2I-CompBench expect them, for their own scripts to judge.

    GenEval         OUT/00000/metadata.jsonl  OUT/00000/samples/00000.png ...  OUT/00000/grid.png
    T2I-CompBench   OUT/samples/a green bench and a blue bowl_000000.png ...

Interrupted, they resume at the first prompt that is not whole; a picture depends on the weights, the sampler's
settings and its place alone. What it was drawn with is kept in OUT/drawn-with.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdit.files import naming, read_lines, read_object, replacing, write_atomically
from mmdit.sampling.sample import grid

Draw = Callable[[list[str], int], np.ndarray]
"""(prompts, number of the first picture) -> uint8 [N, H, W, 3]."""


@dataclass(frozen=True)
class Task:
    """One prompt, how often it is drawn, and what is written of it."""

    prompt: str
    files: list[Path]
    metadata: tuple[Path, str] | None = None
    page: Path | None = None


def geneval(metadata: Path, out: Path, images: int = 4) -> Iterator[Task]:
    """One task for each line of GenEval's evaluation_metadata.jsonl. Raises: ValueError for a line that is none."""
    for i, line in enumerate(_lines(metadata)):
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str) or "\0" in prompt:
                raise TypeError
            prompt.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f'{metadata}, line {i + 1}: expected JSON with a "prompt"') from error
        folder = out / f"{i:05}"
        files = [folder / "samples" / f"{k:05}.png" for k in range(images)]
        yield Task(prompt, files, (folder / "metadata.jsonl", line), folder / "grid.png")


def compbench(prompts: Path, out: Path, images: int = 10) -> Iterator[Task]:
    """One task for each line of one of T2I-CompBench's lists; what follows a tab is no part of the prompt.

    Raises: ValueError for a prompt that cannot be a file's name, as its scripts want."""
    for i, line in enumerate(_lines(prompts)):
        prompt = line.split("\t")[0]
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > 230:
            raise ValueError(f"{prompts}, line {i + 1}: {prompt!r} cannot be part of a file's name")
        yield Task(prompt, [out / "samples" / f"{prompt}_{i * images + k:06}.png" for k in range(images)])


def _lines(path: Path) -> list[str]:
    with naming(path):
        found = [line.strip() for line in read_lines(path) if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def fill(tasks: list[Task], draw: Draw, out: Path, about: dict[str, object]) -> None:
    """Draws into a folder what is not there yet.

    Args: about: everything else that decides the pictures, JSON.
    Raises: ValueError if the folder holds pictures of other prompts, or drawn in another way."""
    stamp = out / "drawn-with.json"
    prompts = hashlib.sha256(json.dumps([[task.prompt, len(task.files)] for task in tasks]).encode()).hexdigest()
    own = json.loads(json.dumps({**about, "prompts": prompts}))
    if stamp.is_file() and (former := read_object(stamp)) != own:
        differs = sorted(name for name in own.keys() | former.keys() if own.get(name) != former.get(name))
        raise ValueError(f"{out} holds pictures drawn with other {', '.join(differs)}; move it away or delete it")
    write_atomically(stamp, json.dumps(own, indent=1).encode())
    first, label = 0, out.name
    for task in tqdm(tasks, desc=label, unit="prompt"):
        wanted = [*task.files, *([task.page] if task.page else [])]
        if not all(path.is_file() for path in wanted):
            images = draw([task.prompt] * len(task.files), first)
            task.files[0].parent.mkdir(parents=True, exist_ok=True)
            if task.metadata is not None:
                task.metadata[0].write_text(task.metadata[1] + "\n", encoding="utf-8")
            for path, image in zip(task.files, images, strict=True):
                _save(Image.fromarray(image), path)
            if task.page is not None:
                _save(grid(images), task.page)
        first += len(task.files)


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format="png")
