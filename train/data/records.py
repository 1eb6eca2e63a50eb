"""One captioned picture of a source, and what a source says of itself."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmdit import pictures


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what to do."""


PAIRS = {"": "single pictures", "preference": "pairs of pictures", "edit": "pictures before and after an edit"}
"""What records hold. The first of two is what is to be drawn: the better one, or the one after."""


@dataclass(frozen=True, slots=True)
class Record:
    """One captioned image, not yet read."""

    key: str
    """Names the record in messages: a path, or a member of an archive."""
    caption: str | None
    """None: it has none."""
    open: Callable[[], Image.Image | bytes]
    """The picture, or the file that holds it."""
    split: str | None = None
    """"train" or "val", if the source says."""
    synthetic: str | None = None
    """A second caption, written by a model."""
    problem: str | None = None
    """What is wrong with its captions, if they cannot be read."""
    file: str | None = None
    """Where it lies, itself or its archive."""
    beside: Callable[[], Image.Image | bytes] | None = None
    """A second picture; see `pair`."""
    beside_file: str | None = None
    pair: str = ""
    """What the second is; see PAIRS."""

    def image(self) -> Image.Image:
        """As RGB, read as `mmdit.pictures.shown` says. Raises: DataError if it cannot be decoded."""
        return self.read()[0][0]

    def read(self) -> tuple[list[Image.Image], str | None]:
        """(the image, or both; a digest of the files, None of what is drawn). Raises: DataError."""
        images, digests = [], []
        try:
            for opened in (self.open, self.beside):
                found = None if opened is None else opened()
                if isinstance(found, bytes):
                    digests.append(digest_of(found))
                    with Image.open(io.BytesIO(found)) as image:
                        images.append(pictures.shown(image))
                elif found is not None:
                    images.append(pictures.shown(found))
            return images, _joined(digests)
        except Exception as error:                       # Pillow raises OSError, SyntaxError, ValueError, struct.error
            said = (str(error).strip().splitlines() or [""])[0].partition(" <_io.BytesIO")[0]
            raise DataError(f"{self.key}: not a readable image ({type(error).__name__}: {said})") from error

    def stamp(self) -> str | None:
        """Size and times of its file, which change when somebody writes it: cheap to ask. The second is that of the
        last change of any kind, which nobody can set back."""
        files = [file for file in (self.file, self.beside_file) if file is not None]
        return " ".join(map(stamp_of, files)) or None

    def digest(self) -> str | None:
        """Of the file, None of a picture that is drawn, or that cannot be opened."""
        try:
            found = [opened() for opened in (self.open, self.beside) if opened is not None]
        except Exception:                                # the reading of it says what is wrong
            return None
        return _joined([digest_of(content) for content in found if isinstance(content, bytes)])


def stamp_of(file: str) -> str:
    """Size and times of a file."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return "gone"
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _joined(digests: list[str]) -> str | None:
    """One digest of several."""
    return digest_of("".join(digests).encode()) if len(digests) > 1 else digests[0] if digests else None


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Records(list[Record]):
    """The records of a source, and how many files they are, and what was passed over.

    files: files that were used, captions and metadata included; of archives, members that were.
    passed: how many were not, by why.
    """

    def __init__(self, records: Iterable[Record] = (), files: int = 0, passed: Counter[str] | None = None) -> None:
        super().__init__(records)
        self.files, self.passed = files, Counter(passed or ())

    def join(self, other: Records) -> None:
        self.extend(other)
        self.files += other.files
        self.passed.update(other.passed)

    def told(self) -> str:
        """One line for whoever wants to know."""
        took = f"{len(self):,} pictures"
        why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.passed.items()))
        return f"{took}; passed over {self.passed.total():,}: {why}" if self.passed else took


def printable(name: str) -> str:
    """A file's name as text, whatever its bytes were."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


CAPTIONS, SYNTHETIC = ("caption", "text"), ("synthetic_caption", "synthetic")
"""Names under which metadata holds a caption, and one that a model wrote; the first that is there counts."""
INSTRUCTIONS = ("instruction", "edit_prompt", "edit", *CAPTIONS)
"""Of an edit."""


def texts_of(entry: dict[str, Any], pair: str = "") -> dict[str, str | None]:
    """caption, synthetic and problem of a Record, from metadata. pair: what its pictures are; see PAIRS."""
    edit = pair == "edit"
    caption = _first(entry, INSTRUCTIONS if edit else CAPTIONS)
    synthetic = None if edit else _first(entry, SYNTHETIC)
    for text in (caption, synthetic):
        if "\0" in (text or ""):
            return {"caption": None, "synthetic": None, "problem": "its caption holds NUL characters"}
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            problem = f"its caption holds {half}, half of a character"
            return {"caption": None, "synthetic": None, "problem": problem}
    return {"caption": caption, "synthetic": synthetic, "problem": None}


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first text that is there and not empty."""
    return next((text.strip() for name in names if isinstance(text := entry.get(name), str) and text.strip()), None)
