"""Where captioned images come from: a folder, WebDataset tars, Hugging Face parquet, or one of the built-in sets."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from mmdit import keyed
from mmdit.pictures import SUFFIXES
from train.data import edits, folders, openmoji, scenes, shapes
from train.data.archives import READERS
from train.data.records import DataError, Record, Records, printable
from train.data.splits import LEFT_OUT, mapped, of_archives

EDITS = 400                  # to train on, for each of `copies`


def open_source(name: str, *, copies: int = 12, splits: Iterable[str] = ()) -> Records:
    """The records of a source, in a fixed order.

    Args:
        name: "shapes", "scenes", "new-colour", "shapes-edits", "scenes-edits" or "openmoji"; a folder of images (with
            sidecar .txt files, and .synthetic.txt for captions that a model wrote, or a metadata.jsonl or .csv with
            file_name, caption or text, synthetic_caption and split, also one in each of its folders, which are splits
            then); or WebDataset .tar or Hugging Face .parquet files: one, a folder of them, a glob, or a range such as
            "set-{00000..00099}.tar". Of a folder without captioned pictures, archives below it: a clone of a hub's data
            set. Pairs of pictures: metadata.jsonl with winner and loser, or with target, source and instruction, in
            place of file_name; parquet with those columns, Pick-a-Pic's or those of InstructPix2Pix.
        copies: for "shapes", drawings per training caption; for "scenes" 64 times as many of each kind; of edits 400
            times as many.
        splits: what else a split's name may be, NAME=train, NAME=val or NAME=-, left out; see `splits.KNOWN`.
    Raises: DataError if there is nothing there.
    """
    if name in DRAWN:
        return Records(DRAWN[name](copies))
    if name == "openmoji":
        return Records(openmoji.records())
    known, found = mapped(splits), Records()
    archives: list[Path] = []
    paths = _paths(name, found.passed)
    for path in paths:
        if not path.is_dir():
            archives.append(path)
            continue
        below = folders.read(path, known)
        captioned = any(record.caption or record.synthetic or record.problem for record in below)
        if not captioned and (inside := _archives_below(path)):              # a picture may illustrate its README
            below = Records()
            _count_beside(path, set(inside), below.passed)
            archives += [path / file for file in inside]
        found.join(below if len(paths) == 1 else _of(path, paths, below))
    archives = _without_indices(list(dict.fromkeys(archives)), found.passed)
    names = Counter(path.name for path in archives)
    for path, split in zip(archives, of_archives(archives, known), strict=True):
        if split == LEFT_OUT:
            found.passed["an archive of a split that is left out"] += 1
        else:
            records = _reader(path)(path, split)
            found.join(records if names[path.name] == 1 else _of(path.parent, archives, records))
    if not found:
        why = f"; passed over {found.told().partition('; passed over ')[2]}" if found.passed else ""
        raise DataError(f"source {name!r} holds no images ({', '.join(sorted(SUFFIXES))}){why}")
    return found


def _of(folder: Path, among: Sequence[Path], records: Records) -> Records:
    """With keys that say in which of several folders they lie, since those of others may be the same."""
    prefix = printable(os.path.relpath(folder, os.path.commonpath([os.path.abspath(path) for path in among])))
    return Records((replace(r, key=f"{prefix}/{r.key}") for r in records), records.files, records.passed)


def _without_indices(archives: list[Path], passed: Counter[str]) -> list[Path]:
    """img2dataset writes 00000.parquet beside 00000.tar, which says of each picture where it came from."""
    tars = {path.with_suffix("") for path in archives if folders.suffix_of(path.name) == ".tar"}
    kept = [path for path in archives if folders.suffix_of(path.name) == ".tar" or path.with_suffix("") not in tars]
    if others := len(archives) - len(kept):
        passed["a table beside a tar of its name"] += others
    return kept


def _paths(name: str, passed: Counter[str]) -> list[Path]:
    """A folder of images, or the archives that a name stands for."""
    path, span = Path(name), re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if path.is_dir():
        return _of_folder(path, passed)
    if span:
        first, last = span.groups()
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        found = [Path(name[: span.start()] + number + name[span.end() :]) for number in numbers]
    else:
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        inside = {p for p in found if p.is_dir()}                       # what lies below one of these is read with it
        found = [p for p in found if not inside.intersection(p.parents)]
    missing = [p for p in found if not p.exists()]
    if missing or not found:
        raise DataError(
            f"source {str(missing[0]) if missing else name!r} does not exist; expected a folder, .tar or .parquet "
            "files, 'shapes', 'scenes' or 'openmoji'"
        )
    return found


def _of_folder(folder: Path, passed: Counter[str]) -> list[Path]:
    """Its archives, or itself where it has none, or lists its pictures."""
    archives = sorted(p for p in folder.iterdir() if _is_archive(p) and not p.name.startswith("._"))
    if not archives or folders.list_of(folder):
        return [folder]
    _count_beside(folder, {path.name for path in archives}, passed)
    return archives


def _is_archive(path: Path) -> bool:
    return folders.suffix_of(path.name) in READERS and not path.is_dir()


def _archives_below(folder: Path) -> list[str]:
    """Of a folder without pictures: a clone of a hub's data set."""
    files = folders.files_below(folder, Counter())
    return [path for path in files if folders.suffix_of(path) in READERS and folders.why_left(path) is None]


def _count_beside(folder: Path, archives: set[str], passed: Counter[str]) -> None:
    """What lies in a folder besides its archives is passed over."""
    for path in folders.files_below(folder, passed):
        if path not in archives:
            suffix = folders.suffix_of(path)
            kind = "a picture beside archives" if suffix in SUFFIXES else f"no archive ({suffix or 'no suffix'})"
            kind = "an archive in a folder below archives" if suffix in READERS else kind
            passed[folders.why_left(path) or kind] += 1


def _reader(path: Path) -> Callable[[Path, str | None], Records]:
    suffix = folders.suffix_of(path.name)
    if suffix not in READERS:
        raise DataError(f"source {str(path)!r} is neither a folder nor a .tar or .parquet")
    return READERS[suffix]


def _shapes(copies: int) -> Iterator[Record]:
    yield from _drawn(*shapes.split(), copies, 4)


def _new_colour(copies: int) -> Iterator[Record]:
    """Twenty pictures, whatever is asked."""
    yield from _drawn(*shapes.in_new_colour(), 1, 1)


def _drawn(train: list[shapes.Shape], held_out: list[shapes.Shape], copies: int, others: int) -> Iterator[Record]:
    for name, wanted, count in (("train", train, copies), ("val", held_out, others)):
        for copy in range(count):
            for i, what in enumerate(wanted):

                def image(what: shapes.Shape = what, key: tuple[int, int] = (i, copy), name: str = name) -> Image.Image:
                    return Image.fromarray(shapes.draw(what, keyed.generator(0, f"shapes {name}", *key)))

                yield Record(f"shapes/{name}/{i}-{copy}", what.caption, image, name)


def _scenes(copies: int) -> Iterator[Record]:
    for tag in scenes.TAGS:
        train, asked = scenes.split(tag)
        for name, prompts, count in (("train", train, 64 * copies), ("val", asked, scenes.MOST)):
            for i in range(count):
                prompt = prompts[i % len(prompts)]

                def image(prompt: scenes.Prompt = prompt, i: int = i, name: str = name) -> Image.Image:
                    return Image.fromarray(scenes.draw(prompt, keyed.generator(0, f"scenes {prompt['tag']} {name}", i)))

                yield Record(f"scenes/{name}/{tag}-{i}", prompt["prompt"], image, name)


def _edits(world: str, copies: int) -> Iterator[Record]:
    for i in range(EDITS * copies):
        task = edits.TASKS[i % len(edits.TASKS)]
        edit = edits.make(world, task, False, keyed.generator(0, f"edits {world}", i))
        yield _edit(f"{world}-edits/train/{i}", edit, "train")
    for i, edit in enumerate(edits.held_out(world)):
        yield _edit(f"{world}-edits/val/{i}", edit, "val")


def _edit(key: str, edit: edits.Edit, split: str) -> Record:
    after, before = (lambda: Image.fromarray(edit.target())), (lambda: Image.fromarray(edit.source()))
    return Record(key, edit.instruction, after, split, beside=before, pair="edit")


DRAWN: dict[str, Callable[[int], Iterator[Record]]] = {
    "shapes": _shapes, "scenes": _scenes, "new-colour": _new_colour, "shapes-edits": partial(_edits, "shapes"),
    "scenes-edits": partial(_edits, "scenes"),
}  # fmt: skip
