"""Which of a source's splits is trained on, and which validates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from train.data.records import DataError

KNOWN = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
         "test": "val"}  # fmt: skip
LEFT_OUT = "-"
Mapped = Mapping[str, str]
"""What a split's name, in lower case, stands for: "train", "val" or "-", left out."""


def mapped(given: Iterable[str]) -> Mapped:
    """KNOWN, and what is given as NAME=train, NAME=val or NAME=-. Raises: DataError."""
    found = dict(KNOWN)
    for entry in given:
        name, equals, into = entry.partition("=")
        if not equals or not name or into not in ("train", "val", LEFT_OUT):
            raise DataError(f"precompute: splits has {entry!r}; expected NAME=train, NAME=val or NAME=-")
        found[name.lower()] = into
    return found


def named(name: object, splits: Mapped, where: str) -> str:
    """"train", "val" or "-". Raises: DataError for a name that says nothing."""
    found = splits.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        known = ", ".join(splits)
        raise DataError(f"{where}: split is {name!r}; expected one of {known}, or what --splits NAME=val makes known")
    return found


def of_archives(paths: Sequence[Path], splits: Mapped) -> list[str | None]:
    """By a word in their names, or by their folders' names: train-00000-of-00002.parquet, coco-val2017.tar,
    partial-test/0000.parquet, as Hugging Face's hub has it. Nothing is said where all have one, or none, but of names
    that somebody gave.

    Raises: DataError for one without such a word where others have one that nobody gave."""
    names = [_word_in(path.stem, splits) or _folder(path.parent.name.lower(), splits) for path in paths]
    known = [name for name in names if name]
    guessed = [name for name in known if not _given(name, splits)]
    if not known or (guessed and set(names) == {known[0]}):
        return [None] * len(paths)
    for path, name in zip(paths, names, strict=True):
        if name is None and guessed:
            other = paths[names.index(guessed[0])]
            raise DataError(
                f"{path} names no split, {other} does ({guessed[0]}); with --splits NAME=train, NAME=val or NAME=- a "
                "word of its name becomes one"
            )
    return [name and splits[name] for name in names]


def of_folders(paths: Sequence[str], splits: Mapped) -> list[str | None]:
    """Of pictures in folders that are named like splits, train/1.png and val/2.png. Nothing is said unless there are
    two of these, or a name that somebody gave, and of what lies elsewhere."""
    tops = [path.partition("/")[0].lower() if "/" in path else "" for path in paths]
    found = [splits.get(top) for top in tops]
    said = len(set(found) - {None}) > 1 or any(_given(top, splits) for top in set(tops) & splits.keys())
    return found if said else [None] * len(paths)


def _given(name: str, splits: Mapped) -> bool:
    """Whether somebody said what a name stands for."""
    return KNOWN.get(name) != splits[name]


def _word_in(name: str, splits: Mapped) -> str | None:
    """The first word of a name that is a split, where no letter stands before or after: that of val2017 is val."""
    letter, words = r"[^\W\d_]", "|".join(map(re.escape, sorted(splits, key=len, reverse=True)))
    found = re.search(rf"(?<!{letter})({words})(?!{letter})", name, re.IGNORECASE)
    return found and found[1].lower()


def _folder(name: str, splits: Mapped) -> str | None:
    name = name.removeprefix("partial-")
    return name if name in splits else None
