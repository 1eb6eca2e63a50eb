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
    """By how their names, or those of their folders, begin, as Hugging Face's hub has it: train-00000-of-00002.parquet,
    test/0000.parquet. Nothing is said where all have one name; what has none is trained on where others have one."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, splits))})(?=[-_.]|$)", re.IGNORECASE)
    begins = [pattern.match(path.name) or pattern.fullmatch(path.parent.name) for path in paths]
    names = [match and match[1].lower() for match in begins]
    if len({name for name in names if name}) < 2:
        return [None] * len(paths)
    return [splits[name] if name else "train" for name in names]
