"""Where captioned images come from: a folder, WebDataset tars, Hugging Face parquet, or one of the built-in sets."""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mmdit import keyed
from mmdit.files import read_lines
from train.data import scenes, shapes

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One captioned image, not yet read."""

    key: str
    """Names the record in messages: a path, or a member of an archive."""
    caption: str | None
    """None: it has none."""
    open: Callable[[], Image.Image]
    split: str | None = None
    """"train" or "val", if the source says."""
    synthetic: str | None = None
    """A second caption, written by a model."""
    problem: str | None = None
    """What is wrong with its captions, if they cannot be read."""

    def image(self) -> Image.Image:
        """The image as RGB, transparency on white. Raises: DataError if it cannot be decoded."""
        try:
            with self.open() as image:
                if image.mode not in ("RGBA", "LA", "P"):
                    return image.convert("RGB")
                opaque = image.convert("RGBA")
        except Exception as error:                       # Pillow raises OSError, SyntaxError, ValueError, struct.error
            raise DataError(f"{self.key}: not a readable image ({type(error).__name__}: {error})") from error
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")


CAPTIONS, SYNTHETIC = ("caption", "text"), ("synthetic_caption", "synthetic")
"""Names under which metadata holds a caption, and one that a model wrote; the first that is there counts."""


def open_source(name: str, *, copies: int = 12) -> list[Record]:
    """The records of a source, in a fixed order.

    Args:
        name: "shapes", "scenes", "openmoji", a folder of images (with sidecar .txt files and .synthetic.txt for
            captions that a model wrote, or a metadata.jsonl with file_name, caption or text, synthetic_caption), or
            WebDataset .tar or Hugging Face .parquet files: one, a folder of them, a glob, or a range such as
            "set-{00000..00099}.tar".
        copies: for "shapes", drawings per training caption; for "scenes" 64 times as many of each kind.
    Raises: DataError if there is nothing there.
    """
    if name in DRAWN:
        return list(DRAWN[name](copies))
    if name == "openmoji":
        from train.data import openmoji

        return list(openmoji.records())
    records = [record for path in _paths(name) for record in _reader(path)(path)]
    if not records:
        raise DataError(f"source {name!r} holds no images ({', '.join(sorted(IMAGES))})")
    return records


def _paths(name: str) -> list[Path]:
    """A folder of images, or the archives that a name stands for."""
    path, span = Path(name), re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if path.is_dir():
        archives = sorted(p for p in path.iterdir() if p.suffix in READERS)
        return [path] if (path / "metadata.jsonl").is_file() or not archives else archives
    if span:
        first, last = span.groups()
        numbers = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        found = [Path(name[: span.start()] + number + name[span.end() :]) for number in numbers]
    else:
        found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(name))]
    missing = [p for p in found if not p.exists()]
    if missing or not found:
        raise DataError(
            f"source {str(missing[0]) if missing else name!r} does not exist; expected a folder, .tar or .parquet "
            "files, 'shapes', 'scenes' or 'openmoji'"
        )
    return found


def _reader(path: Path) -> Callable[[Path], Iterator[Record]]:
    if path.is_dir():
        return _jsonl if (path / "metadata.jsonl").is_file() else _sidecars
    if path.suffix not in READERS:
        raise DataError(f"source {str(path)!r} is neither a folder nor a .tar or .parquet")
    return READERS[path.suffix]


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first text that is there and not empty."""
    return next((text.strip() for name in names if isinstance(text := entry.get(name), str) and text.strip()), None)


def _sidecars(folder: Path) -> Iterator[Record]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES):
        files = (path.with_suffix(".txt"), path.with_suffix(".synthetic.txt"))
        try:
            texts = [file.read_text(encoding="utf-8-sig").strip() or None if file.is_file() else None for file in files]
            problem = None
        except (OSError, UnicodeDecodeError) as error:
            texts, problem = [None, None], f"its caption cannot be read ({error})"
        yield Record(str(path.relative_to(folder)), texts[0], partial(Image.open, path), None, texts[1], problem)


def _jsonl(folder: Path) -> Iterator[Record]:
    for number, line in enumerate(read_lines(folder / "metadata.jsonl"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = folder / entry["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{folder / 'metadata.jsonl'}, line {number}: expected JSON with file_name") from error
        caption, synthetic = _first(entry, CAPTIONS), _first(entry, SYNTHETIC)
        yield Record(entry["file_name"], caption, partial(Image.open, path), entry.get("split"), synthetic)


def _image_at(path: Path, offset: int, size: int) -> Image.Image:
    with path.open("rb") as file:
        file.seek(offset)
        return Image.open(io.BytesIO(file.read(size)))


def _webdataset(path: Path) -> Iterator[Record]:
    """A sample's files share their name up to the first dot: 0001.jpg, 0001.txt, 0001.json, 0001.synthetic.txt."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a complete, uncompressed tar archive ({error})") from error
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = (offset, size)
    with path.open("rb") as archive:
        for key, parts in samples.items():
            images = [extension for extension in parts if f".{extension}" in IMAGES]
            if images:
                try:
                    entry, problem = _metadata(archive, parts), None
                except ValueError as error:                           # UnicodeDecodeError and JSONDecodeError are both
                    entry, problem = {}, f"its caption cannot be read ({error})"
                opener = partial(_image_at, path, *parts[images[0]])
                name = f"{path.name}:{key}.{images[0]}"
                yield Record(name, _first(entry, CAPTIONS), opener, None, _first(entry, SYNTHETIC), problem)


def _metadata(archive: BinaryIO, parts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Captions of a tar's sample, from its .json and its .txt. Raises: ValueError."""
    def read(name: str) -> str:
        offset, size = parts[name]
        archive.seek(offset)
        return archive.read(size).decode("utf-8")

    loaded = json.loads(read("json")) if "json" in parts else {}
    entry: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    for name, into in (("txt", "caption"), ("caption", "caption"), ("synthetic.txt", "synthetic_caption")):
        if name in parts:
            entry[into] = read(name)
    return entry


def _table(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f"{path} needs the extra: pip install 'rfkernels[parquet]' ({error})") from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file that can be read ({error})") from error


def _parquet(path: Path) -> Iterator[Record]:
    """The layout of Hugging Face datasets: a column "image" of encoded bytes, or of {bytes, path}, and captions."""
    with _table(path) as table:
        columns = table.schema_arrow.names
        if "image" not in columns:
            raise DataError(f"{path} has columns {', '.join(columns)}; expected image and caption or text")
        wanted = [name for name in (*CAPTIONS, *SYNTHETIC) if name in columns]
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            texts = table.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * rows
            for row, entry in enumerate(texts):
                opener = partial(_image_in, path, group, row)
                yield Record(f"{path.name}:{group}-{row}", _first(entry, CAPTIONS), opener, None,
                             _first(entry, SYNTHETIC))  # fmt: skip


@lru_cache(maxsize=2)
def _row_group(path: Path, group: int) -> list[Any]:
    """Its images; of all files the last two, as records are read in order."""
    with _table(path) as table:
        found: list[Any] = table.read_row_group(group, columns=["image"]).column("image").to_pylist()
    return found


_ONE_AT_A_TIME = threading.Lock()


def _image_in(path: Path, group: int, row: int) -> Image.Image:
    with _ONE_AT_A_TIME:                                                       # threads that decode want the same group
        cell = _row_group(path, group)[row]
    return Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {".tar": _webdataset, ".parquet": _parquet}


def _shapes(copies: int) -> Iterator[Record]:
    train, held_out = shapes.split()
    for name, wanted, count in (("train", train, copies), ("val", held_out, 4)):
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


DRAWN: dict[str, Callable[[int], Iterator[Record]]] = {"shapes": _shapes, "scenes": _scenes}


def fit_into(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resized to cover height x width, then centre-cropped; uint8 [height, width, 3]."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
