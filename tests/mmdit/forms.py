"""Pictures as cameras, scanners and web pages write them, and as a viewer shows them."""

import io

import numpy as np
from PIL import Image


def written(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def forms(height=48, width=64):
    """name -> (the bytes of a file, its suffix, what a viewer shows as uint8 [H, W, 3])"""
    rng = np.random.default_rng(4)
    colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    grey = rng.integers(0, 65536, (height, width), dtype=np.uint16)
    alpha = np.where(np.arange(width) < width // 2, 255, 0).astype(np.uint8)
    there = np.where(alpha[:, None] > 0, colour, 255).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6                                                       # to be turned by a quarter to the right
    sideways = Image.fromarray(colour).transpose(Image.Transpose.ROTATE_90)
    print_, palette = Image.fromarray(colour).convert("CMYK"), Image.fromarray(colour).quantize(64)
    frames = [palette, Image.new("P", palette.size), Image.new("P", palette.size, 3)]
    return {
        "turned": (written(sideways, "PNG", exif=turned), ".png", colour),
        "16-bit": (written(Image.fromarray(grey), "PNG"), ".png", np.dstack([(grey >> 8).astype(np.uint8)] * 3)),
        "transparent": (written(Image.fromarray(np.dstack([colour, np.broadcast_to(alpha, (height, width))])), "PNG"),
                        ".png", there),
        "print": (written(print_, "TIFF"), ".tif", np.asarray(print_.convert("RGB"))),
        "animation": (written(frames[0], "GIF", save_all=True, append_images=frames[1:]), ".gif",
                      np.asarray(palette.convert("RGB"))),
    }  # fmt: skip
