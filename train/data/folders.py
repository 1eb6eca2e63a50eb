"""Folders of pictures, with captions in sidecar files or in a metadata.jsonl or .csv."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmdit.files import read_lines, read_text
from mmdit.pictures import SUFFIXES
from train.data.records import DataError, Record, Records, printable, texts_of
from train.data.splits import LEFT_OUT, Mapped, named, of_folders

METADATA = ("metadata.jsonl", "metadata.csv")
LISTED = {("file_name",): "", ("winner", "loser"): "preference", ("target", "source"): "edit"}
"""What a line of it names, and what that is (records.PAIRS)."""
_KNOWN = ", or ".join(" and ".join(names) for names in LISTED)
SIDECARS = (".txt", ".synthetic.txt")


def why_left(path: str) -> str | None:
    """Why a file is none that anybody meant, or None. path: relative to the source, with "/"."""
    *folders, name = path.split("/")
    if name.startswith("._") or name == ".DS_Store" or "__MACOSX" in folders:
        return "left by macOS"
    if name in ("Thumbs.db", "desktop.ini"):
        return "left by Windows"
    if path.startswith(".") or "/." in path:
        return "hidden"
    return None


def suffix_of(path: str) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def files_below(folder: Path, passed: Counter[str]) -> list[str]:
    """Relative to it, in order; linked folders too, each folder once."""
    found, seen, whole = [], set(), len(os.path.join(folder, ""))
    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders.sort()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            passed["below a folder that was there already, by a link"] += len(names)
            continue
        seen.add((status.st_dev, status.st_ino))
        below = os.path.join(here, "")[whole:].replace(os.sep, "/")
        found += [below + name for name in names]
    return sorted(found, key=lambda path: path.split("/"))


def read(folder: Path, splits: Mapped) -> Records:
    """By its list; by those of its folders, train/metadata.jsonl, whose names are splits then; or by sidecar files."""
    if list_of(folder):
        return _listed(folder, splits)
    below = sorted(f for f in folder.iterdir() if f.is_dir() and why_left(f.name) is None and list_of(f))
    if not below:
        return _with_sidecars(folder, splits)
    found = Records()
    for part, split in zip(below, of_folders([f"{f.name}/" for f in below], splits), strict=True):
        listed = _listed(part, splits)
        if split == LEFT_OUT:
            found.passed["of a split that is left out"] += listed.files
            continue
        records = (replace(r, key=f"{printable(part.name)}/{r.key}", split=r.split or split) for r in listed)
        found.join(Records(records, listed.files, listed.passed))
    lists = tuple(f"{part.name}/" for part in below)
    outside = [path for path in files_below(folder, found.passed) if not path.startswith(lists)]
    if any(suffix_of(path) == ".txt" and why_left(path) is None for path in outside):
        raise DataError(f"{folder} has captions beside folders with lists ({list_of(below[0])}); make them two sources")
    for path in outside:
        found.passed[why_left(path) or "beside folders with lists"] += 1
    return found


def list_of(folder: Path) -> Path | None:
    """Its metadata.jsonl, or a metadata.csv that names pictures."""
    lines, table = (folder / name for name in METADATA)
    if lines.is_file():
        return lines
    return table if table.is_file() and _names_pictures(table) else None


def _names_pictures(table: Path) -> bool:
    with open(table, "rb") as file:
        header = file.readline().decode("utf-8", "ignore")
    return any(name in header for names in LISTED for name in names)


def _reason(path: str) -> str:
    return f"no picture ({suffix_of(path) or 'no suffix'})"


def _with_sidecars(folder: Path, splits: Mapped) -> Records:
    found = Records()
    pictures: list[str] = []
    texts: dict[str, str] = {}                                     # by the name in lower case after the first part
    used: set[str] = set()
    taken = 0
    for path in files_below(folder, found.passed):
        suffix = suffix_of(path)
        if why := why_left(path):
            found.passed[why] += 1
        elif suffix in SUFFIXES:
            if os.path.isfile(os.path.join(folder, path)):
                pictures.append(path)
            else:
                found.passed["a link to nothing"] += 1
        elif suffix == ".txt":
            if texts.setdefault(_sidecar(path), path) != path:
                found.passed["a second caption of one name"] += 1
        else:
            found.passed[_reason(path)] += 1
    for path, split in zip(pictures, of_folders(pictures, splits), strict=True):
        if split == LEFT_OUT:
            found.passed["of a split that is left out"] += 1
            continue
        taken += 1
        files = [texts.get(os.path.splitext(path)[0] + kind) for kind in SIDECARS]
        used.update(file for file in files if file)
        try:
            captions = [read_text(folder / file) if file else None for file in files]
            said = texts_of(dict(zip(("caption", "synthetic"), captions, strict=True)))
        except (OSError, ValueError) as error:                                   # UnicodeDecodeError is one
            said = {"caption": None, "synthetic": None, "problem": f"its caption cannot be read ({error})"}
        found.append(_record(folder, path, split, said))
    found.files = taken + len(used)
    if left := len(set(texts.values()) - used):
        found.passed["a caption without a picture"] += left
    return found


def _sidecar(path: str) -> str:
    """A caption's file by its name with the suffix in lower case."""
    end = next((kind for kind in reversed(SIDECARS) if path.lower().endswith(kind)), "")
    return path[: -len(end)] + end


def _record(
    folder: Path, path: str, split: str | None, said: dict[str, str | None], beside: str | None = None, pair: str = ""
) -> Record:
    whole, other = os.path.join(folder, path), None if beside is None else os.path.join(folder, beside)
    return Record(
        printable(path), said["caption"], partial(_content, whole), split, said["synthetic"], said["problem"], whole,
        None if other is None else partial(_content, other), other, pair,
    )  # fmt: skip


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _listed(folder: Path, splits: Mapped) -> Records:
    """By its metadata.jsonl or metadata.csv, in that order."""
    found, metadata = Records(), list_of(folder)
    assert metadata is not None
    listed: set[str] = set()
    taken: set[str] = set()
    for where, names, pair, split, said in _lines(metadata, splits):
        inside = [_inside(name, folder, where) for name in names]
        listed.update(inside)
        if split == LEFT_OUT:
            found.passed["of a split that is left out"] += 1
        else:
            taken.update(inside)
            beside = names[1] if pair else None
            found.append(_record(folder, names[0], split, said, beside, pair))
    found.files = 1 + len(taken)
    for path in files_below(folder, found.passed):
        if path not in listed and path != metadata.name:
            why = f"not listed in {metadata.name}" if suffix_of(path) in SUFFIXES else _reason(path)
            found.passed[why_left(path) or why] += 1
    return found


def _inside(name: str, folder: Path, where: str) -> str:
    """A listed path, in one spelling. Raises: DataError for one that is none, or leaves the folder."""
    inside = PurePosixPath(name)
    odd = not name or "\0" in name or not _encodable(name)
    if odd or inside.is_absolute() or PureWindowsPath(name).drive or ".." in inside.parts:
        raise DataError(f"{where}: file_name is {name!r}; expected a path below {folder}")
    return str(inside)


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _entries(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(where it stands, what reads it) of each entry of a list."""
    try:
        if path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(read_text(path)))
            for row in rows:
                yield f"{path}, line {rows.line_num}", partial(dict, ((k, v) for k, v in row.items() if v))
            return
        lines = read_lines(path)
    except ValueError as error:                                                  # UnicodeDecodeError is one
        told = f"{path} is neither UTF-8 nor UTF-16 with a byte order mark ({error}): save it as UTF-8"
        raise DataError(told) from error
    except csv.Error as error:
        raise DataError(f"{path} is no table of comma-separated values ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}, line {number}", partial(json.loads, line)


def _lines(path: Path, splits: Mapped) -> Iterator[tuple[str, list[str], str, str | None, dict[str, str | None]]]:
    """(where it stands, names of files, what those are, split, texts) of each."""
    for where, read in _entries(path):
        try:
            entry = read()
            keys, pair = next(listed for listed in LISTED.items() if listed[0][0] in entry)
            names = [entry[key] for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError, StopIteration) as error:
            kind = "columns" if path.suffix == ".csv" else "JSON"
            raise DataError(f"{where}: expected {kind} with {_KNOWN}") from error
        split = entry.get("split")
        yield where, names, pair, None if split is None else named(split, splits, where), texts_of(entry, pair)
