"""Archives of captioned pictures: WebDataset tars and Hugging Face's parquet."""

from __future__ import annotations

import json
import posixpath
import tarfile
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from mmdit.files import decode, naming, with_newlines
from mmdit.pictures import SUFFIXES
from train.data.folders import why_left
from train.data.records import INSTRUCTIONS, SYNTHETIC, DataError, Record, Records, printable, stamp_of, texts_of

TEXTS = ("txt", "caption", "synthetic.txt", "json")
"""What stands beside a picture of a tar, after the first dot of its name."""
Place = tuple[int, int]
"""Where a member's bytes lie, and how many."""


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def webdataset(path: Path, split: str | None) -> Records:
    """A sample's files share their name up to the first dot: 0001.jpg, 0001.txt, 0001.json, 0001.synthetic.txt. Where
    what follows is none of these, up to the last: "1.5 m.jpg", cat.v1.png."""
    found = Records()
    samples: dict[str, dict[str, Place]] = {}
    whole: dict[str, str] = {}                                            # of a sample, the name up to the first dot
    for name, place in _members(path, found):
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        first = f"{folder}/{stem}" if folder else stem
        if not _known(extension.lower()):
            text = ".synthetic.txt"
            extension = text[1:] if file.lower().endswith(text) else file.rpartition(".")[2]
            stem = file[: -len(extension) - 1] if "." in file else file
        key = f"{folder}/{stem}" if folder else stem
        if not _known(extension.lower()):
            found.passed[why_left(name) or f"no picture (.{extension.lower()})"] += 1
            continue
        if samples.setdefault(key, {}).setdefault(extension.lower(), place) != place:
            found.passed["a second file of one name"] += 1
        whole[key] = first
    with path.open("rb") as archive:
        for key, parts in samples.items():
            pictures = [extension for extension in parts if f".{extension}" in SUFFIXES]
            texts = [extension for extension in parts if extension in TEXTS]
            if not pictures:
                found.passed["a caption without a picture"] += len(texts)
                continue
            found.passed["another picture of a sample"] += len(pictures) - 1
            if not texts and whole[key] != key and whole[key] in samples:      # 0001.seg.png beside 0001.jpg
                found.passed["another picture of a sample"] += 1
                continue
            try:
                said = texts_of(_metadata(archive, parts))
            except ValueError as error:                               # UnicodeDecodeError and JSONDecodeError are both
                said = {"caption": None, "synthetic": None, "problem": f"its caption cannot be read ({error})"}
            name = f"{path.name}:{key}.{pictures[0]}"
            opener = partial(_bytes_at, path, *parts[pictures[0]])
            found.append(
                Record(printable(name), said["caption"], opener, split, said["synthetic"], said["problem"], str(path))
            )
            found.files += 1 + len(texts)
    found.passed = +found.passed                                          # what is zero is not said
    return found


def _known(extension: str) -> bool:
    return f".{extension}" in SUFFIXES or extension in TEXTS


def _members(path: Path, found: Records) -> list[tuple[str, Place]]:
    """Files of a tar, also those that are links to others of it; what else is there is passed over."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a complete, uncompressed tar archive ({error})") from error
    _check_end(path, end)
    last = {posixpath.normpath(m.name): m for m in members}               # of several of one name tar takes the last
    found.passed["an earlier file of one name"] += sum(not m.isdir() for m in members) - sum(
        not m.isdir() for m in last.values()
    )
    named: list[tuple[str, Place]] = []
    for m in last.values():
        if (to := _followed(m, last)) is not None and to.isfile():
            named.append((m.name, (to.offset_data, to.size)))
        elif m.islnk() or m.issym():
            found.passed["a link to nothing in its archive"] += 1
        elif not m.isdir():
            found.passed["no file"] += 1
    kept = []
    for name, place in named:
        if why := why_left(posixpath.normpath(name)):
            found.passed[why] += 1
        else:
            kept.append((name, place))
    return kept


def _check_end(path: Path, end: int) -> None:
    """Raises: DataError unless zeros follow a tar's last member: tarfile takes a damaged header, or the end of the
    first of two archives in one file, for the end of all."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(1 << 20)
        while rest:
            if rest.strip(b"\0"):
                raise DataError(f"{path}: its last member ends at byte {end}, but more follows: is it damaged, or two?")
            rest = file.read(1 << 20)
    if path.stat().st_size < end + 512:
        raise DataError(f"{path}: cut off after byte {end}: a tar ends with zeros")


def _followed(member: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """What a member is in the end, links to links followed; None of one that leads nowhere."""
    for _ in range(len(members)):
        if not (member.islnk() or member.issym()):
            return member
        beside = "" if member.islnk() else posixpath.dirname(member.name)  # a symbolic link starts where it stands
        target = posixpath.normpath(posixpath.join(beside, member.linkname))
        if target.startswith("/") and member.islnk():                      # as tar strips it of members
            target = target.lstrip("/")
        if target not in members:
            return None
        member = members[target]
    return None


def _metadata(archive: BinaryIO, parts: dict[str, Place]) -> dict[str, Any]:
    """Captions of a tar's sample, from its .json and its .txt. Raises: ValueError."""
    def read(name: str) -> str:
        offset, size = parts[name]
        archive.seek(offset)
        return with_newlines(decode(archive.read(size)))

    try:
        loaded = json.loads(read("json")) if "json" in parts else {}
    except RecursionError as error:
        raise ValueError(str(error)) from error
    entry: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    for name, into in (("txt", "caption"), ("caption", "caption"), ("synthetic.txt", "synthetic_caption")):
        if name in parts and (text := read(name)).strip():               # an empty one says nothing
            entry[into] = text
    return entry


RANKED, LABELS = ("jpg_0", "jpg_1"), ("label_0", "label_1")
EDITS = (("target", "source"), ("edited_image", "original_image"), ("edited_image", "source_image"),
         ("edited_image", "input_image"), ("output_image", "input_image"), ("target_img", "source_img"))  # fmt: skip
PICTURES: dict[tuple[str, ...], str] = {
    ("image",): "", ("winner", "loser"): "preference", RANKED: "preference", **dict.fromkeys(EDITS, "edit"),
}  # fmt: skip
"""Columns of pictures, and what those are (records.PAIRS): one; the better and the worse of two; Pick-a-Pic's two, with
their labels; after and before an edit, as InstructPix2Pix, UltraEdit, HQ-Edit and MagicBrush name them."""


def _table(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{path} needs the extra: pip install 'rfkernels[parquet]' ({error})") from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file that can be read ({error})") from error


def parquet(path: Path, split: str | None) -> Records:
    """The layout of Hugging Face datasets: a column "image" of encoded bytes, or of {bytes, path}, and captions."""
    found = Records()
    with _table(path) as table:
        columns = table.schema_arrow.names
        pictures = next((names for names in PICTURES if set(names) <= set(columns)), None)
        if pictures is None:
            known = " or ".join(" and ".join(names) for names in PICTURES)
            raise DataError(f"{path} has columns {', '.join(columns)}; expected {known}, and caption or text")
        pair = PICTURES[pictures]
        ranked = list(LABELS) if pictures == RANKED else []
        if missing := [name for name in ranked if name not in columns]:
            raise DataError(f"{path} has no {' and no '.join(missing)}: which of its pictures is the better one?")
        wanted = [name for name in (*INSTRUCTIONS, *SYNTHETIC, *ranked) if name in columns]
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            with naming(path):
                texts = table.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * rows
            for row, entry in enumerate(texts):
                said, order = texts_of(entry, pair), pictures
                if ranked:
                    first, second = (entry.get(label) for label in LABELS)
                    if {first, second} != {0, 1}:
                        found.passed["a tie, or a pair that nobody has judged"] += 1
                        continue
                    order = pictures if first == 1 else pictures[::-1]
                opener = partial(_bytes_in, path, group, row, order[0])
                beside = partial(_bytes_in, path, group, row, order[1]) if len(order) > 1 else None
                found.append(Record(printable(f"{path.name}:{group}-{row}"), said["caption"], opener, split,
                                    said["synthetic"], said["problem"], str(path), beside, pair=pair))  # fmt: skip
    found.files = len(found)
    return found


@lru_cache(maxsize=4)
def _row_group(path: Path, group: int, column: str, stamp: str) -> list[Any]:
    """Its images; of all files the last few, as records are read in order. stamp: the file's, which is another file's
    once it has been written anew."""
    with _table(path) as table, naming(path):
        found: list[Any] = table.read_row_group(group, columns=[column]).column(column).to_pylist()
    return found


_ONE_AT_A_TIME = threading.Lock()


def _bytes_in(path: Path, group: int, row: int, column: str) -> bytes:
    with _ONE_AT_A_TIME:                                                       # threads that decode want the same group
        images = _row_group(path, group, column, stamp_of(str(path)))
    if row >= len(images):
        raise ValueError(f"{path} has {len(images)} rows there; it has changed since it was opened")
    cell = images[row]
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(found, bytes):
        raise ValueError(f"its cell holds {'a path' if isinstance(cell, dict) else 'nothing'}, not a picture's bytes")
    return found


READERS: dict[str, Callable[[Path, str | None], Records]] = {".tar": webdataset, ".parquet": parquet}
