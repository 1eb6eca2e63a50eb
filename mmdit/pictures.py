"""Reading pictures as viewers show them, whatever wrote them: the one way in for training, image to image and masks."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""Of files that are taken for pictures, in lower case."""
WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
SAID_IN_INFO = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Formats whose `info` has one of ORIENTATIONS where they say how a picture is turned: asking further takes as long as
decoding a small one."""
ORIENTATIONS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1")
MOST_PIXELS = 1 << 28         # of a picture on its way: one of 65,500 x 1 would need 17 GB to cover a square
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0        # of a TIFF; Pillow heeds it in 8 bits alone
NO_RANGE = ("I", "F")                      # numbers without a largest one: no picture until somebody says how bright


def opened(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, as `shown`. Raises: ValueError that names the file; FileNotFoundError."""
    from PIL import Image

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    try:
        with Image.open(path) as image:
            return shown(image)
    except Exception as error:                           # Pillow raises OSError, SyntaxError, ValueError, struct.error
        raise ValueError(f"{path}: not a readable picture ({type(error).__name__}: {error})") from error


def shown(image: Image.Image) -> Image.Image:
    """As RGB: upright (EXIF orientation), of an animation its first picture, transparency on white, 16 bits of grey cut
    to the upper 8.

    Raises: ValueError for a picture whose numbers have no largest one (32-bit integers, floats).
    """
    from PIL import Image, ImageOps

    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    tiles = getattr(image, "tile", None)
    raw = str(tiles[0][3]) if tiles else ""                               # before loading, which forgets it
    image.load()
    if image.format not in SAID_IN_INFO or any(name in image.info for name in ORIENTATIONS):
        with suppress(SyntaxError, ValueError, struct.error):          # an EXIF block that says nothing: as it lies
            image = ImageOps.exif_transpose(image)
    if image.mode in NO_RANGE:
        raise ValueError(f"mode {image.mode}, 32 bits a pixel; save it with 8 or 16 bits")
    if image.mode in WIDE_GREY:
        hidden = image.info.get("transparency")
        wide = np.asarray(image).astype(np.uint16)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            wide = 65535 - wide
        grey = (wide >> 8).astype(np.uint8)
        if isinstance(hidden, int):
            grey = np.where(wide == hidden, 255, grey).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    colour = image.format == "PNG" and image.mode != "P" and not isinstance(image.info.get("transparency", b""), bytes)
    if colour and ";" in raw:
        image.info["transparency"] = _rescaled(image.info["transparency"], raw)
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")


def _rescaled(colour: int | tuple[int, ...], raw: str) -> int | tuple[int, ...]:
    """The colour of a PNG that is transparent, in 8 bits: Pillow brings the samples to those, and leaves this as the
    file has it. raw: Pillow's name of the file's samples: "L;2", "RGB;16B"."""
    bits = int("".join(filter(str.isdigit, raw.partition(";")[2])) or 8)
    values = np.atleast_1d(colour).tolist()
    scaled = [value >> 8 if bits == 16 else value * 255 // ((1 << bits) - 1) for value in values]
    return scaled[0] if isinstance(colour, int) else tuple(scaled)


def fit_into(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resized to cover height x width, then centre-cropped; uint8 [height, width, 3].

    Raises: ValueError for a picture so long and narrow that memory would not hold it."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size[0] * size[1] > MOST_PIXELS:
        came = f"{image.width} x {image.height} pixels, which cover {width} x {height} as {size[0]} x {size[1]}"
        raise ValueError(f"{came}: too long and narrow")
    if size != image.size:
        from PIL import Image

        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
