"""Writing files so that a reader, after a crash at any moment, sees the whole new file or the whole old one; reading
text; a folder for one process alone."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what reads or writes a file: whatever a library raises becomes one line that names it."""
    try:
        yield
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
        plain = isinstance(error, (OSError, ValueError, ImportError))
        if plain and str(path) in said and "\n" not in str(error).strip():
            raise
        kind = next((k for k in (FileNotFoundError, OSError, ImportError) if isinstance(error, k)), ValueError)
        raise kind(f"{path}: {said if plain else f'{type(error).__name__}: {said}'}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; at the end it is on disk and takes the place of `path`. What fails, as on a full disk,
    leaves nothing behind. Raises: OSError that names the file."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        ours = isinstance(error, OSError) and error.filename in (None, str(partial), str(path), str(path.parent))
        if not ours:                                                      # what is read meanwhile names itself
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror or error}") from error         # type: ignore[attr-defined]


def write_atomically(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def copied(source: str, folder: Path, part: Any) -> None:
    """The folder that a part came from, as it is; what came out of a file is written."""
    if not source or Path(source).is_file():
        part.save_pretrained(folder)
    elif Path(source).resolve() != folder.resolve():
        shutil.copytree(source, folder, dirs_exist_ok=True)


class InUse(ValueError):
    """Another process works in the folder."""


@contextmanager
def claimed(folder: Path, lock: str = "lock") -> Iterator[None]:
    """The folder is this process's for as long as it is open: the kernel lets go of it however the process ends, so a
    file that stays behind means nothing. Where a file system knows no locks, it is as if there were none.

    Raises: InUse, with who has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / lock).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InUse(f"{folder} is in use by {file.read().strip() or 'another process'}") from error
        except OSError:
            pass
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def sampled_digest(files: Iterable[Path]) -> str:
    """Of large files, in a time that does not grow with their sizes: names, sizes, the first MB and a thousandth of the
    rest, evenly spread."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for start in range(1 << 20, size, 1 << 22):
                file.seek(start)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Raises: ValueError that names the file; FileNotFoundError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:            # UnicodeDecodeError and JSONDecodeError are both
        raise ValueError(f"{path} is no JSON that can be read ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """JSON of named values. Raises: ValueError that names the file; FileNotFoundError."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds JSON of the kind {type(found).__name__}; expected an object")
    return found


def decode(content: bytes) -> str:
    """Text of UTF-8, with or without a byte order mark, or of UTF-16 or UTF-32 with one.

    Raises: UnicodeDecodeError; ValueError for NUL, which no text has: it is that of another encoding."""
    wide = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
            (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    text = content.decode(next((name for mark, name in wide if content.startswith(mark)), "utf-8-sig"))
    if "\0" in text:
        raise ValueError("it holds NUL characters: UTF-16 or UTF-32 without a byte order mark?")
    return text


def read_text(path: Path) -> str:
    """What `decode` reads, newlines as Unix writes them."""
    return with_newlines(decode(path.read_bytes()))


def with_newlines(text: str) -> str:
    """Newlines of Windows and old Macs as Unix writes them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """Of a text that `decode` reads. Only a newline ends one, as Unix, Windows or old Macs write it: captions hold
    U+2028, U+2029, U+0085 and form feeds, where str.splitlines cuts too."""
    found = read_text(path).split("\n")
    return found if found[-1] else found[:-1]
