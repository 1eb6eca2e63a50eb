"""Every command that a page shows is one: its name, its flags and their values are understood. What those of the README
and the fine-tuning page do is tested beside them; here nothing is done."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro

import bench.__main__
import mmdit.__main__
import train.__main__
from train.study.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/**/*.md", "*/README.md", "*/*/README.md")
PAGES = sorted({page for place in PLACES for page in ROOT.glob(place) if page.name != "CHANGELOG.md"})
COMMAND = r"(torchrun .*-m --|python -m) (train|mmdit|bench) "
COMMANDS = {"train": train.__main__.COMMANDS, "mmdit": mmdit.__main__.COMMANDS, "bench": bench.__main__.COMMANDS}


def commands(page):
    """Its lines of commands, whole."""
    text = re.sub(r"\\\n\s+", " ", page.read_text())
    lines = (line.strip() for line in text.splitlines() if line.startswith("    "))
    return [re.split(r"\s+#", line)[0] for line in lines if re.match(COMMAND, line)]


FOUND = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture
def idle(monkeypatch):
    """Commands read their arguments and do nothing."""
    parse = tyro.cli

    def cli(function, *args, **more):
        if inspect.isfunction(function):
            function = functools.wraps(function)(lambda *_, **__: None)
        return parse(function, *args, **more)

    class Made:
        shards, step, stopped_by = {}, 0, None

    monkeypatch.setattr(tyro, "cli", cli)
    for name in ("fill", "train"):
        monkeypatch.setattr(train.__main__, name, lambda config: Made)
    monkeypatch.setattr(train.__main__, "planned", lambda *_: "")
    monkeypatch.setattr("train.evaluate.run.evaluate", lambda wanted: {})
    monkeypatch.setattr("train.study.run.run", lambda *_: [])
    monkeypatch.setitem(VARIANTS, "backbones", lambda wanted: {})                  # which reads its caches


def test_pages_show_commands():
    assert len(FOUND) > 30 and {command.split("-m")[-1].split()[0] for _, command in FOUND} >= {"train", "mmdit"}


@pytest.mark.parametrize("page, command", FOUND, ids=lambda value: getattr(value, "stem", value)[:60])
def test_a_command_of_a_page_is_understood(page, command, idle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    package = next(word for word in words if word in COMMANDS)
    name, *rest = words[words.index(package) + 1 :]
    assert name in COMMANDS[package], command
    if package == "bench":
        return
    try:
        COMMANDS[package][name](rest)
    except SystemExit as ended:
        assert not ended.code, f"{page}: {command}"


def test_make_targets_of_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^    make ([a-z-]+)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page}: make {target}"
