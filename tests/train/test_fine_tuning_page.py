"""Every command of docs/fine-tuning runs, on a small model with random weights."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from PIL import Image

from mmdit import checkpoint
from mmdit.config import MMDiTConfig
from tests.test_readme import called

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fine-tuning" / "README.md").read_text()
TINY = "--steps 2 --batch 2 --parallel.accumulate 1 --validation.samples 2 --samples.count 1 --samples.steps 1"


def commands():
    return [line.strip() for line in PAGE.splitlines() if line.startswith("    python -m")]


def model_flags(config):
    """That make a recipe's model another one."""
    flags = []
    for field in dataclasses.fields(MMDiTConfig):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--model.{'' if value else 'no-'}{name}")
        elif isinstance(value, tuple):
            flags.append(f"--model.{name} {' '.join(map(str, value))}")
        else:
            flags.append(f"--model.{name} {value}")
    return " ".join(flags)


def test_the_commands_of_the_page_run(tmp_path):
    from tests.mmdit.pipelines import made

    base = tmp_path / "models" / "stable-diffusion-3.5-medium"
    made((0, 1)).save_pretrained(base)
    for folder in ("pictures", "pairs", "edits"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        for path in (f"pictures/{i}.png", *(f"{folder}/{i}-{k}.png" for folder in ("pairs", "edits") for k in "ab")):
            Image.fromarray(np.full((40, 40, 3), 60 * i, np.uint8)).save(tmp_path / path)
        (tmp_path / f"pictures/{i}.txt").write_text("a photo of sks mug")
    for first, folder in (("winner", "pairs"), ("source", "edits")):
        line = re.search(rf'^    (\{{"{first}".*\}})$', PAGE, re.M)[1]
        lines = [line.replace('"0-', f'"{i}-') for i in range(4)]
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
    Image.fromarray(np.full((40, 40, 3), 60, np.uint8)).save(tmp_path / "photo.png")
    flags = model_flags(checkpoint.open_checkpoint(base).config)
    kinds = []
    for command in commands():
        kinds.append(" ".join(command.split()[2:4]))
        command = command.replace("1024 1024", "32 32").replace("512 512", "32 32").replace("--device cuda", "")
        if " train run " in command:
            channels = " --model.reference-channels 16" if "run edit-" in command else ""
            command += f" {TINY} {flags}{channels} --device cpu"
        if " train plan " in command:
            command += f" {flags}"
        if " mmdit sample " in command:
            command += " --size 32 32 --steps 1"
        called(command, tmp_path)
    assert {"train run", "train plan", "mmdit lora", "mmdit sample", "mmdit convert", "train precompute"} == set(kinds)
    assert (tmp_path / "mug.png").is_file() and (tmp_path / "mine.safetensors").is_file()
    assert (tmp_path / "lora-diffusers" / "pytorch_lora_weights.safetensors").is_file()
