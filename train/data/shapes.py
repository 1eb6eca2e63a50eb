"""Captioned shapes: a procedural dataset and a rule-based scorer, GenEval in miniature.

480 captions (2 sizes x 8 colours x 6 shapes x 5 positions), 64 of them held out of training. The scorer reads an image
back by matching it against renderings and says size, colour, shape and position.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass

import numpy as np

from mmdit import keyed

SIDE = 32
BACKGROUND = np.array([235.0, 235.0, 235.0])
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 175),
    "orange": (245, 130, 25),
    "cyan": (50, 200, 215),
    "black": (25, 25, 25),
}
NEW_COLOUR = {"pink": (250, 120, 185)}           # in no caption of the data set; to be learned from a few pictures
READ = COLOURS | NEW_COLOUR
POSITIONS = {                                   # centre in pixels, (x, y)
    "at the top left": (9.5, 9.5),
    "at the top right": (22.5, 9.5),
    "at the bottom left": (9.5, 22.5),
    "at the bottom right": (22.5, 22.5),
    "in the center": (16.0, 16.0),
}
SIZES = {"small": 4.25, "large": 7.75}          # half the side of the bounding box, in pixels
JITTER = 1.0                                    # of the centre, in pixels
SIZE_JITTER = 0.5
HELD_OUT = 64


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 (y down) belong to a shape; each shape touches all four sides."""
    r2 = x**2 + y**2
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return r2 <= 1
    if shape == "square":
        return np.maximum(ax, ay) <= 1
    if shape == "triangle":
        return (ay <= 1) & (2 * ax <= 1 + y)
    if shape == "diamond":
        return ax + ay <= 1
    if shape == "cross":
        return (np.maximum(ax, ay) <= 1) & (np.minimum(ax, ay) <= 0.33)
    return (r2 <= 1) & (r2 >= 0.55**2)          # ring


SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")


@dataclass(frozen=True)
class Shape:
    """What a caption says."""

    size: str
    colour: str
    shape: str
    position: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.position}"


def coverage(shape: str, x: float, y: float, half: float, samples: int = 4) -> np.ndarray:
    """[SIDE, SIDE] in [0, 1]: how much of each pixel a shape covers."""
    at, half = (np.arange(SIDE * samples) + 0.5) / samples, max(half, 1e-6)       # a search for the best fit may try 0
    fine = _inside(shape, (at[None, :] - x) / half, (at[:, None] - y) / half)
    return fine.reshape(SIDE, samples, SIDE, samples).mean((1, 3))


def draw(what: Shape, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]; rng jitters place and size."""
    x, y = np.array(POSITIONS[what.position]) + rng.uniform(-JITTER, JITTER, 2)
    half = SIZES[what.size] + rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    return _rendered(what.shape, what.colour, x, y, half)


def _rendered(shape: str, colour: str, x: float, y: float, half: float) -> np.ndarray:
    alpha = coverage(shape, x, y, half)[..., None]
    return np.rint(BACKGROUND + alpha * (np.array(READ[colour]) - BACKGROUND)).astype(np.uint8)


def everything() -> list[Shape]:
    return [Shape(*parts) for parts in itertools.product(SIZES, COLOURS, SHAPES, POSITIONS)]


def split() -> tuple[list[Shape], list[Shape]]:
    """(train, held out): fixed, 416 and 64 captions."""
    shapes = everything()
    order = keyed.generator(0, "held-out shapes").permutation(len(shapes))
    return [shapes[i] for i in order[HELD_OUT:]], [shapes[i] for i in order[:HELD_OUT]]


def in_new_colour() -> tuple[list[Shape], list[Shape]]:
    """(20 to learn from, 40 held out): the combinations of a colour that no other caption has."""
    shapes = [Shape(*parts) for parts in itertools.product(SIZES, NEW_COLOUR, SHAPES, POSITIONS)]
    order = keyed.generator(0, "new colour").permutation(len(shapes))
    return [shapes[i] for i in order[:20]], [shapes[i] for i in order[20:]]


@dataclass(frozen=True)
class Found:
    """A shape in an image: its centre and half the side of its bounding box, in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    half: float


PERIMETERS = {                                  # of a shape, over half the side of its bounding box
    "circle": 2 * np.pi,
    "square": 8.0,
    "triangle": 2 + 2 * 5**0.5,
    "diamond": 4 * 2**0.5,
    "cross": 8.0,
    "ring": 2 * np.pi * 1.55,
}


def seen(image: np.ndarray) -> np.ndarray:
    """Which pixels [SIDE, SIDE] are not background."""
    return np.abs(image.astype(float) - BACKGROUND).max(-1) > 70


def find(image: np.ndarray) -> Found | None:
    """The shape that an image [SIDE, SIDE, 3] shows, by the best-matching rendering; None if it shows nothing."""
    colour = _colour(image)
    if colour is None:
        return None
    alpha = _alpha(image, colour)
    rows, columns = (np.flatnonzero((alpha > 0.5).sum(axis) >= 2) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return None
    x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    half = max(columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1) / 2
    candidates = itertools.product(SHAPES, (-0.5, 0, 0.5), (-0.5, 0, 0.5), (-0.5, -0.25, 0, 0.25, 0.5, 0.75))
    shape, dx, dy, grow = min(
        candidates, key=lambda c: float(((coverage(c[0], x + c[1], y + c[2], half + c[3], 2) - alpha) ** 2).sum())
    )
    return Found(colour, shape, x + dx, y + dy, half + grow)


def _colour(image: np.ndarray) -> str | None:
    there = seen(image)
    if there.sum() < 8:
        return None
    middle = np.median(image[there], axis=0)
    return min(READ, key=lambda name: float(np.abs(np.array(READ[name]) - middle).sum()))


def _alpha(image: np.ndarray, colour: str) -> np.ndarray:
    """How much of each pixel has this colour rather than that of the background, in [0, 1]."""
    direction = np.array(READ[colour]) - BACKGROUND
    return np.clip((image.astype(float) - BACKGROUND) @ direction / (direction @ direction), 0, 1)


def edges(image: np.ndarray, found: Found) -> tuple[float, float]:
    """(edge error, IoU) of the shape in an image [SIDE, SIDE, 3] against the rendering of it that fits best.

    Edge error: by how many pixels its outline is off, on average: the area between the two over the perimeter.
    """
    alpha, (at, least) = _alpha(image, found.colour), _fitted(image, found)
    drawn = coverage(found.shape, *at)
    both, either = np.minimum(drawn, alpha).sum(), max(np.maximum(drawn, alpha).sum(), 1e-9)
    return least / (PERIMETERS[found.shape] * max(at[2], 0.5)), float(both / either)


def redrawn(image: np.ndarray, found: Found) -> np.ndarray:
    """The rendering that fits the shape in an image best: the same picture with clean edges, uint8 [SIDE, SIDE, 3]."""
    at, _ = _fitted(image, found)
    return _rendered(found.shape, found.colour, *at)


def _fitted(image: np.ndarray, found: Found) -> tuple[np.ndarray, float]:
    """((x, y, half) of the rendering that fits best, how much of all pixels is different)."""
    alpha, at = _alpha(image, found.colour), np.array([found.x, found.y, found.half])

    def difference(at: np.ndarray) -> float:
        return float(np.abs(coverage(found.shape, *at) - alpha).sum())

    least, step = difference(at), 0.25
    while step > 0.03:
        tried = min((at + step * move for move in (*np.eye(3), *-np.eye(3))), key=difference)
        if (now := difference(tried)) < least:
            at, least = tried, now
        else:
            step /= 2
    return at, least


def read(image: np.ndarray) -> Shape | None:
    """What an image [SIDE, SIDE, 3] shows, in the words of a caption; None if it shows nothing."""
    found = find(image)
    return None if found is None else in_words(found)


def in_words(found: Found) -> Shape:
    position = min(POSITIONS, key=lambda p: (POSITIONS[p][0] - found.x) ** 2 + (POSITIONS[p][1] - found.y) ** 2)
    size = min(SIZES, key=lambda s: abs(SIZES[s] - found.half))
    return Shape(size, found.colour, found.shape, position)


def score(images: np.ndarray, wanted: list[Shape]) -> dict[str, float]:
    """Share of images [N, SIDE, SIDE, 3] in which each attribute, and all four, are as wanted; of those that show a
    shape, the mean edge error in pixels and IoU (see `edges`), NaN if none does."""
    found = [find(image) for image in images]
    right = np.array([
        [False] * 4 if f is None else [a == b for a, b in zip(astuple(in_words(f)), astuple(w), strict=True)]
        for f, w in zip(found, wanted, strict=True)
    ])
    names = ("size", "colour", "shape", "position")
    outlines = [edges(image, f) for image, f in zip(images, found, strict=True) if f is not None]
    edge, iou = np.mean(outlines, axis=0).tolist() if outlines else (np.nan, np.nan)
    attributes = {name: float(right[:, i].mean()) for i, name in enumerate(names)}
    return {**attributes, "all": float(right.all(1).mean()), "edge": edge, "iou": iou}
