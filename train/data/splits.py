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
    partial-test/0000.parquet, as Hugging Face's hub has it. Nothing is said where all have one, or none.

    Raises: DataError for one without such a word where others have one."""
    names = [_word_in(path.stem, splits) or _folder(path.parent.name.lower(), splits) for path in paths]
    known = [name for name in names if name]
    if not known or set(names) == {known[0]}:
        return [None] * len(paths)
    for path, name in zip(paths, names, strict=True):
        if name is None:
            other = paths[names.index(known[0])]
            raise DataError(
                f"{path} names no split, {other} does ({known[0]}); with --splits NAME=train, NAME=val or NAME=- a "
                "word of its name becomes one"
            )
    return [splits[name] for name in names if name]


def of_folders(paths: Sequence[str], splits: Mapped) -> list[str | None]:
    """Of pictures in folders that are named like splits, train/1.png and val/2.png. Nothing is said unless there are
    two of these, and of what lies elsewhere."""
    tops = [splits.get(path.partition("/")[0].lower()) if "/" in path else None for path in paths]
    return tops if len(set(tops) - {None}) > 1 else [None] * len(paths)


def _word_in(name: str, splits: Mapped) -> str | None:
    """The first word of a name that is a split, where no letter stands before or after: that of val2017 is val."""
    letter, words = r"[^\W\d_]", "|".join(map(re.escape, sorted(splits, key=len, reverse=True)))
    found = re.search(rf"(?<!{letter})({words})(?!{letter})", name, re.IGNORECASE)
    return found and found[1].lower()


def _folder(name: str, splits: Mapped) -> str | None:
    name = name.removeprefix("partial-")
    return name if name in splits else None
