"""What the README shows works, and what it points at is there."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_it_is_short_and_shows_a_picture_first():
    lines = README.splitlines()
    assert len(lines) <= 130
    assert any(line.startswith("![") for line in lines[:6])


def test_the_examples_of_ops_and_patch_run(capsys):
    names: dict = {}
    exec(EXAMPLES[0], names)
    assert capsys.readouterr().out.startswith("adaln: ")
    exec(EXAMPLES[1], names)
    assert "JointTransformerBlock: fused" in capsys.readouterr().out


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def commands(title):
    """The lines that begin with four spaces, without their comments."""
    lines = [line.strip() for line in section(title).splitlines() if line.startswith("    ")]
    return [line.split("  #")[0].split(" #")[0].strip() for line in lines]


def called(command, folder):
    """What a command prints. In this process, as `python -m` runs a module: importing takes longer than most commands
    do. That they start in a process of their own is tested in mmdit/test_commands.py."""
    python, m, module, *arguments = shlex.split(command)
    assert (python, m) == ("python", "-m")
    said, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *arguments])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                assert not end.code, f"{command}\n{end.code}\n{errors.getvalue()[-3000:]}"
    return said.getvalue()


def test_the_commands_of_training_run(tmp_path):
    """On ten pictures, with a budget of two steps."""
    pictures = tmp_path / "FOLDER"
    pictures.mkdir()
    for i in range(10):
        shade = np.full((40, 48, 3), 25 * i, np.uint8)
        Image.fromarray(shade).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"a grey of {i}")
    activate, *found = commands("Train")
    assert activate == "source .venv/bin/activate" and [c.split()[3] for c in found] == [
        "recipes", "precompute", "run", "sample"
    ]  # fmt: skip
    for command in found:
        if " run " in command:
            command = command.replace("--minutes 10", "--minutes None --steps 2 --batch 2")
        called(command, tmp_path)
    assert (tmp_path / "x.png").is_file() and (tmp_path / "runs/mine/model.safetensors").is_file()
    assert "2.03B parameters" in called("python -m train plan d24-256 --gpus 64", tmp_path)


def test_the_commands_of_released_weights_run(tmp_path):
    import mmdit
    from tests.mmdit.pipelines import made

    made((0, 1)).save_pretrained(tmp_path / "FOLDER")
    for name in ("sd3.5_large", "sd3.5_medium"):
        mmdit.checkpoint.convert(tmp_path / "FOLDER", tmp_path / f"{name}.safetensors", layout="sd3")
    for command in commands("Sample and convert released weights"):
        called(command + (" --size 32 32 --steps 1" if " sample " in command else ""), tmp_path)
    assert (tmp_path / "x.png").is_file() and (tmp_path / "transformer/config.json").is_file()


def test_the_example_of_released_weights_runs_on_small_ones(tmp_path, monkeypatch):
    import mmdit
    from tests.mmdit.pipelines import made

    monkeypatch.chdir(tmp_path)
    made((0, 1)).save_pretrained("stable-diffusion-3.5-medium")
    mmdit.checkpoint.convert("stable-diffusion-3.5-medium", "sd3.5_large.safetensors", layout="sd3")
    small = EXAMPLES[2].replace("(7, 8, 9)", "(1,)")                                 # of the three blocks here
    exec(small, {"mmdit": mmdit, "torch": __import__("torch")})
    assert (tmp_path / "x.png").is_file() and (tmp_path / "folder" / "config.json").is_file()


def test_the_example_of_a_block_runs():
    page = (ROOT / "docs" / "does-it-fit.md").read_text()
    found: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.S)[0], found)
    assert found["x"].shape == (2, 64, 128)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    for link in links:
        file, _, anchor = link.partition("#")
        assert (ROOT / file).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text().lower(), re.M)
            assert anchor.replace("-", " ") in headings, link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("example", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(example, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
