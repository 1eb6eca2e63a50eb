"""The tutorials: their Python runs as it stands, and so do, with small budgets, the commands about own images."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_readme import called

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def test_there_are_tutorials_with_code():
    assert len(PAGES) >= 5 and len(WITH_CODE) >= 3


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    if "import diffusers" in page.read_text() or "from diffusers" in page.read_text():
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    exec(compile(code, str(page), "exec"), {"__name__": "tutorial"})


def test_the_commands_about_own_images_run(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        Image.fromarray(np.full((40, 48, 3), 20 * i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"a red circle, number {i}")
    lines = (FOLDER / "own-images.md").read_text().splitlines()
    for command in (line.strip() for line in lines if line.startswith("    python -m")):
        if "--help" in command:
            continue
        if " run " in command:
            command = command.replace("--minutes 10", "--minutes None --steps 2 --batch 2 --samples.steps 1")
        if " evaluate " in command:
            command += " --images 2"
        called(command.replace("--sizes", "--val-share 0.3 --sizes"), tmp_path)
    assert (tmp_path / "x.png").is_file() and (tmp_path / "runs" / "mine" / "report.html").is_file()
