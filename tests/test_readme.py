"""What the README shows works, and what it points at is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_of_the_ops_runs(capsys):
    exec(EXAMPLES[0], {})
    assert capsys.readouterr().out.startswith("adaln: ")


def test_the_example_of_released_weights_runs_on_small_ones(tmp_path, monkeypatch):
    import mmdit
    from tests.mmdit.pipelines import made

    monkeypatch.chdir(tmp_path)
    made((0, 1)).save_pretrained("stable-diffusion-3.5-medium")
    mmdit.checkpoint.convert("stable-diffusion-3.5-medium", "sd3.5_large.safetensors", layout="sd3")
    small = EXAMPLES[1].replace("(7, 8, 9)", "(1,)")                                 # of the three blocks here
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
