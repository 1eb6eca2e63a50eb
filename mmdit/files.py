"""Writing files so that a reader, after a crash at any moment, sees the whole new file or the whole old one; reading
lines."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; at the end it is on disk and takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_atomically(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def decode(content: bytes) -> str:
    """Text of UTF-8, with or without a byte order mark, or of UTF-16 with one. Raises: UnicodeDecodeError."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig")


def read_text(path: Path) -> str:
    """What `decode` reads, newlines as Unix writes them."""
    return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """Of a text that `decode` reads. Only a newline ends one, as Unix, Windows or old Macs write it: captions hold
    U+2028, U+2029, U+0085 and form feeds, where str.splitlines cuts too."""
    found = read_text(path).split("\n")
    return found if found[-1] else found[:-1]
