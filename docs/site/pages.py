"""The pages of the site, run by mkdocs-gen-files: the repository's Markdown at its own paths, so that links between
pages and pictures hold as they stand; the reference, from docstrings and from the commands' own help."""

from __future__ import annotations

import contextlib
import html
import inspect
import io
import posixpath
import re
from pathlib import Path

import latex2mathml.converter
import mkdocs_gen_files

import bench.__main__
import mmdit
import mmdit.__main__
import rfkernels
import rfkernels.nn
import train.__main__

ROOT = Path(__file__).parents[2]
PLACES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/*/*.md", "rfkernels/*/README.md",
          *(f"{room}/README.md" for room in ("bench", "csrc", "mmdit", "tests")))  # fmt: skip
FORMULA = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
RENAMED = {"README.md": "index.md"}
FOUND_FIRST = ("docs/tutorials/", "docs/training/", "docs/fine-tuning/", "docs/released-weights.md", "README.md")
FOUND_LAST = ("CHANGELOG.md", "CONTRIBUTING.md", "tests/", "docs/features.md", "csrc/")


def ranked(page: str) -> str:
    """Front matter that says how early a search shows a page: guides before the reference, the reference before what
    is for who works on the project."""
    boost = 4 if page.startswith(FOUND_FIRST) else 0.2 if page.startswith(FOUND_LAST) else 1
    return f"---\nsearch:\n  boost: {boost}\n---\n\n"


def pages() -> list[str]:
    """Paths in the repository."""
    found = {path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place)}
    return sorted(path for path in found if not path.startswith("docs/site/"))


def linked(text: str, page: str, known: set[str]) -> tuple[str, set[str]]:
    """(text whose links lead to pages and pictures of the site, and to nothing else; the pictures). A link to a source
    file becomes its path."""
    pictures: set[str] = set()
    here = posixpath.dirname(RENAMED.get(page, page))

    def to(match: re.Match[str]) -> str:
        shown, label, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path in known:
            new = posixpath.relpath(RENAMED.get(path, path), here or ".")
            return f"{shown}[{label}]({new}{anchor or ''})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page} links to {target}, which is not there")
        if shown or path.endswith((".png", ".svg")):
            pictures.add(path)
            return match[0]
        return f"{label}, `{path}`" if label.strip("`") != path else f"`{path}`"

    return LINK.sub(to, text), pictures


def typeset(text: str) -> str:
    """Blocks of LaTeX as MathML, which browsers draw by themselves. Raises: ValueError for an unknown command."""

    def to(match: re.Match[str]) -> str:
        formula = latex2mathml.converter.convert(match[1].strip(), display="block").replace(r"\_", "_")
        if unknown := re.search(r"\\[a-z]+", html.unescape(formula)):
            raise ValueError(f"{unknown[0]} is not known to latex2mathml: {match[1]}")
        return f'<div class="formula">{formula}</div>'

    return FORMULA.sub(to, text)


def write_pages() -> None:
    paths = pages()
    pictures: set[str] = set()
    for page in paths:
        text, shown = linked((ROOT / page).read_text(), page, set(paths))
        pictures |= shown
        with mkdocs_gen_files.open(RENAMED.get(page, page), "w") as file:
            file.write(ranked(page) + typeset(text))
    for picture in pictures:
        with mkdocs_gen_files.open(picture, "wb") as file:
            file.write((ROOT / picture).read_bytes())


# --- reference --------------------------------------------------------------------------------------------------------


def documented(module: str, names: list[str], about: str, members: bool = True) -> str:
    """A page of a module's public names."""
    entries = [f"::: {module}.{name}" + ("" if members else "\n    options: {members: false}") for name in names]
    return f"# {module}\n\n{about}\n\n" + "\n\n".join(entries) + "\n"


def write_reference() -> None:
    callables = [name for name in rfkernels.__all__ if not inspect.ismodule(getattr(rfkernels, name))]
    nn = list(rfkernels.nn.__all__)
    own = [name for name in mmdit.__all__ if not inspect.ismodule(getattr(mmdit, name))]
    more = [f"::: {name}" for name in ("rfkernels.patch.apply.apply", "rfkernels.patch.apply.revert",
                                         "rfkernels.optim.AdamW")]
    parts = [f"::: {name}" for name in ("mmdit.presets", "mmdit.checkpoint.load", "mmdit.checkpoint.save",
                                        "mmdit.checkpoint.convert", "mmdit.adapters.attach", "mmdit.adapters.read",
                                        "mmdit.adapters.load", "mmdit.flow.by_name", "mmdit.sampling.sample.Settings",
                                        "mmdit.sampling.sample.denoise", "mmdit.sampling.references.encoded")]
    settings = [f"::: train.{name}" for name in ("config.Config", "config.Optimizer", "config.Ema", "config.Validation",
                                                 "config.Samples", "config.Preference", "config.Parallel",
                                                 "data.settings.Precompute", "engine.loop.train",
                                                 "objectives.protocol.Objective")]
    written = {
        "rfkernels": documented("rfkernels", callables, "The ops.") + "\n" + "\n\n".join(more) + "\n",
        "nn": documented("rfkernels.nn", nn, "The ops as modules."),
        "mmdit": documented("mmdit", own, "The model and sampling.") + "\n" + "\n\n".join(parts) + "\n",
        "train": "# train\n\nSettings and protocols of training.\n\n" + "\n\n".join(settings) + "\n",
        "commands": commands(),
    }
    for name, text in written.items():
        with mkdocs_gen_files.open(f"reference/{name}.md", "w") as file:
            file.write(text)


def commands() -> str:
    """Every command, with what it says itself."""
    lines = ["# Commands", "", "Each says the same with `--help`."]
    for module in (train.__main__, mmdit.__main__, bench.__main__):
        program = module.__name__.split(".")[0]
        for name, command in module.COMMANDS.items():
            lines += ["", f"## python -m {program} {name}", "", "```text", _help(command), "```"]
    return "\n".join(lines) + "\n"


def _help(command: object) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command(["--help"])                                                                        # type: ignore[operator]
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).strip()


write_pages()
write_reference()
