"""Where captioned images come from: a folder, a WebDataset tar, or one of the built-in sets."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mmdit import keyed
from train.data import shapes

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what to do."""


@dataclass(frozen=True)
class Record:
    """One captioned image, not yet read."""

    key: str
    """Names the record in messages: a path, or a member of an archive."""
    caption: str | None
    """None: it has none."""
    open: Callable[[], Image.Image]
    split: str | None = None
    """"train" or "val", if the source says."""

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


def open_source(name: str, *, copies: int = 12) -> list[Record]:
    """The records of a source, in a fixed order.

    Args:
        name: "shapes", "openmoji", a folder (images with sidecar .txt files, or a metadata.jsonl with file_name and
            caption or text), or a .tar in WebDataset layout.
        copies: for "shapes", drawings per training caption.
    Raises: DataError if there is nothing there.
    """
    if name == "shapes":
        return list(_shapes(copies))
    if name == "openmoji":
        from train.data import openmoji

        return list(openmoji.records())
    path = Path(name)
    if not path.exists():
        raise DataError(f"source {name!r} does not exist; expected a folder, a .tar, 'shapes' or 'openmoji'")
    if path.is_dir():
        records = list(_jsonl(path) if (path / "metadata.jsonl").is_file() else _sidecars(path))
    elif path.suffix == ".tar":
        records = list(_webdataset(path))
    else:
        raise DataError(f"source {name!r} is neither a folder nor a .tar")
    if not records:
        raise DataError(f"source {name!r} holds no images ({', '.join(sorted(IMAGES))})")
    return records


def _sidecars(folder: Path) -> Iterator[Record]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else None
        yield Record(str(path.relative_to(folder)), caption or None, partial(Image.open, path))


def _jsonl(folder: Path) -> Iterator[Record]:
    for number, line in enumerate((folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = folder / entry["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{folder / 'metadata.jsonl'}, line {number}: expected JSON with file_name") from error
        caption = entry.get("caption", entry.get("text"))
        yield Record(entry["file_name"], caption or None, partial(Image.open, path), entry.get("split"))


def _webdataset(path: Path) -> Iterator[Record]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a complete, uncompressed tar archive ({error})") from error

    def read(member: tarfile.TarInfo) -> bytes:
        with path.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)

    captions: dict[str, str] = {}
    for member in members:
        stem, _, extension = member.name.rpartition(".")
        if extension in ("txt", "caption"):
            captions[stem] = read(member).decode("utf-8").strip()
        elif extension == "json":
            try:
                entry = json.loads(read(member))
            except ValueError as error:
                raise DataError(f"{path.name}:{member.name}: not valid JSON ({error})") from error
            if isinstance(entry, dict) and (text := entry.get("caption", entry.get("text"))):
                captions.setdefault(stem, text)
    for member in members:
        stem, _, extension = member.name.rpartition(".")
        if f".{extension.lower()}" in IMAGES:
            yield Record(
                f"{path.name}:{member.name}",
                captions.get(stem) or None,
                lambda member=member: Image.open(io.BytesIO(read(member))),   # type: ignore[misc]
            )


def _shapes(copies: int) -> Iterator[Record]:
    train, held_out = shapes.split()
    for name, wanted, count in (("train", train, copies), ("val", held_out, 4)):
        for copy in range(count):
            for i, what in enumerate(wanted):

                def image(what: shapes.Shape = what, key: tuple[int, int] = (i, copy), name: str = name) -> Image.Image:
                    return Image.fromarray(shapes.draw(what, keyed.generator(0, f"shapes {name}", *key)))

                yield Record(f"shapes/{name}/{i}-{copy}", what.caption, image, name)


def fit_into(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resized to cover height x width, then centre-cropped; uint8 [height, width, 3]."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
