"""Pictures are read as viewers show them, in training, image to image and masks alike."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from mmdit import pictures


def through(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return np.asarray(pictures.shown(Image.open(file))).astype(int)


RAMP = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(8, 0)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "TIFF"))
def test_upright_whatever_the_camera_wrote(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    page = np.zeros((24, 48, 3), np.uint8)
    page[:8, :8] = 255                                                          # a corner that tells all eight apart
    file = io.BytesIO()
    Image.fromarray(page).save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB")).astype(int)
    got = np.asarray(pictures.shown(Image.open(io.BytesIO(file.getvalue())))).astype(int)
    assert got.shape == want.shape == ((24, 48, 3) if orientation < 5 else (48, 24, 3))
    assert abs(got - want).max() <= 2


@pytest.mark.parametrize("kind", ("PNG", "TIFF"))
def test_sixteen_bits_of_grey_keep_their_upper_eight(kind):
    wide = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    assert (through(Image.fromarray(wide), kind) == (wide >> 8)[..., None]).all()


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P", "PA", "RGB", "L", "1", "16-bit"))
def test_transparency_is_on_white_in_every_mode(mode):
    if mode in ("RGBA", "LA"):
        page = Image.new(mode, (8, 8), (10, 20, 30, 0) if mode == "RGBA" else (10, 0))
        page.paste((10, 20, 30, 255) if mode == "RGBA" else (10, 255), (0, 0, 4, 8))
        got = through(page, "PNG")
    elif mode == "PA":
        page = Image.new("P", (8, 8), 1).convert("PA")
        page.putpalette([200, 0, 0, 10, 20, 30])
        got = np.asarray(pictures.shown(page)).astype(int)
        assert (got[:, :4] == (10, 20, 30)).all()
        return
    elif mode == "16-bit":                                                      # written by hand: Pillow does not
        rows = b"".join(b"\0" + struct.pack(">8H", *[40000] * 4, *[7] * 4) for _ in range(8))
        chunk = lambda name, body: (  # noqa: E731
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", 7))
        file = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        got = np.asarray(pictures.shown(Image.open(io.BytesIO(file)))).astype(int)
    else:
        hidden = {"P": 1, "RGB": (0, 0, 0), "L": 0, "1": 0}[mode]
        page = Image.new(mode, (8, 8), hidden)
        if mode == "P":
            page.putpalette([200, 0, 0, 0, 0, 0])
        page.paste({"P": 0, "RGB": (9, 9, 9), "L": 9, "1": 1}[mode], (0, 0, 4, 8))
        got = through(page, "PNG", transparency=hidden)
    assert (got[:, 4:] == 255).all(), "what is not there is white"
    assert mode == "1" or (got[:, :4] < 255).any(-1).all(), "what is there stays"


def test_prints_palettes_and_animations():
    print_ = Image.fromarray(COLOURS).convert("CMYK")
    assert abs(through(print_, "TIFF") - np.asarray(print_.convert("RGB")).astype(int)).max() == 0
    assert abs(through(print_, "JPEG", quality=100).mean() - np.asarray(print_.convert("RGB")).mean()) < 4
    palette = Image.fromarray(COLOURS).quantize(16)
    assert (through(palette, "GIF") == np.asarray(palette.convert("RGB"))).all()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        got = through(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(got - (255, 0, 0)).max() < 8, kind


def test_a_partly_transparent_pixel_is_mixed():
    assert abs(through(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG") - 127).max() <= 1


@pytest.mark.parametrize("mode", ("F", "I"))
def test_numbers_without_a_range_are_refused_by_name(mode, tmp_path):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=rf"a\.tiff: .*mode {mode}, 32 bits"):
        pictures.opened(tmp_path / "a.tiff")


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png: not a readable picture"):
        pictures.opened(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        pictures.opened(tmp_path / "b.png")


def test_lab_is_converted(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(Image.fromarray(COLOURS), srgb, lab, outputMode="LAB")
    made.save(tmp_path / "a.tif")
    assert abs(np.asarray(pictures.opened(tmp_path / "a.tif")).astype(int) - COLOURS).mean() < 4


@pytest.mark.parametrize("depth, kind, row, clear", [
    (2, 0, b"\x55", struct.pack(">H", 1)), (4, 0, b"\x55", struct.pack(">H", 5)),
    (16, 2, struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC), struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)),
])  # fmt: skip
def test_the_clear_colour_of_a_png_is_white_in_every_depth(depth, kind, row, clear):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 1, 1, depth, kind, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))
    assert pictures.shown(Image.open(file)).getpixel((0, 0)) == (255, 255, 255)
