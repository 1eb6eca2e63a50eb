"""Edits of drawn pictures: an instruction, the picture before and the one after, and a rule that says what came of it.

Ten tasks, as in the paper's appendix D: six that change an object (recolour, move, resize, replace, remove, add), three
that restore a picture (inpaint, colourise, deblur), and segmentation. Two worlds: one object of the demo (shapes), or
two objects (scenes).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from mmdit import keyed
from train.data import scenes, shapes
from train.data.shapes import BACKGROUND, COLOURS, SHAPES, SIDE, Found, Shape, coverage

TASKS = ("recolour", "move", "resize", "replace", "remove", "add", "inpaint", "colourise", "deblur", "segment")
ASKED: dict[str, tuple[str, ...]] = {
    "recolour": ("colour",), "move": ("place",), "resize": ("half",), "replace": ("shape",),
    "add": ("colour", "shape", "place", "half"), "segment": ("colour",),
}  # fmt: skip
"""What an instruction asks of the object that it names; of the tasks that are not here, see `judged`."""
PLACE, HALF = 2.0, 1.0       # how far, in pixels, a centre and half a side may be off
GREY = (128, 128, 128)       # of a part that is missing
BLUR = 2.0                   # deviation in pixels
HELD_OUT = 8                 # of the 48 objects by colour and shape, in scenes

Objects = tuple[Found, ...]


@dataclass(frozen=True)
class World:
    """What pictures an edit is drawn in."""

    places: dict[str, tuple[float, float]]
    sizes: dict[str, float]
    jitter: float
    """Of half a side, in pixels."""
    objects: int

    def place(self, at: Found) -> str:
        return min(self.places, key=lambda p: (self.places[p][0] - at.x) ** 2 + (self.places[p][1] - at.y) ** 2)

    def size(self, of: Found) -> str:
        return min(self.sizes, key=lambda name: abs(self.sizes[name] - of.half))


CORNERS = {
    f"at the {side} {where}": (x, y)
    for side, y in (("top", scenes.LOW), ("bottom", scenes.HIGH))
    for where, x in (("left", scenes.LOW), ("right", scenes.HIGH))
}
WORLDS = {
    "shapes": World(shapes.POSITIONS, shapes.SIZES, shapes.SIZE_JITTER, 1),
    "scenes": World(CORNERS, {"small": 3.75, "large": 5.75}, 0.3, 2),
}


@dataclass(frozen=True)
class Edit:
    """One of them. The object that an instruction names is the first."""

    task: str
    instruction: str
    before: Objects
    after: Objects
    hidden: tuple[int, int, int] | None = None
    """(left, top, side) of the square that is missing before."""

    def source(self) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        image = drawn(self.before)
        if self.hidden is not None:
            left, top, side = self.hidden
            image[top : top + side, left : left + side] = GREY
        if self.task == "colourise":
            return np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, 2)
        if self.task == "deblur":
            return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR)))
        return image

    def target(self) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        return drawn(self.after)


def drawn(objects: Objects) -> np.ndarray:
    image = np.broadcast_to(BACKGROUND, (SIDE, SIDE, 3)).copy()
    for one in objects:
        image += coverage(one.shape, one.x, one.y, one.half)[..., None] * (np.array(COLOURS[one.colour]) - image)
    return np.rint(image).astype(np.uint8)


# --- making them ------------------------------------------------------------------------------------------------------


def make(world: str, task: str, held_out: bool, rng: np.random.Generator) -> Edit:
    """An edit at random. The object that is edited is, before and after, one of those to train on; held out, what it
    becomes is one that no edit to train on shows."""
    there = WORLDS[world]
    while True:
        after = _objects(world, there, held_out, rng)
        edit = MAKERS[task](there, after, rng)
        shown = [objects[0] for objects in (edit.before, edit.after) if objects and task != "segment"]
        if held_out or all(not is_held_out(world, one) for one in shown):
            return edit


def _objects(world: str, there: World, held_out: bool, rng: np.random.Generator) -> Objects:
    """Of distinct shapes at distinct places, the first held out or not."""
    while True:
        places = [list(there.places)[i] for i in rng.permutation(len(there.places))]
        kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
        made = tuple(
            _object(there, _one_of(COLOURS, rng), kind, place, _one_of(there.sizes, rng), rng)
            for kind, place in zip(kinds[: there.objects], places, strict=False)
        )
        if is_held_out(world, made[0]) == held_out:
            return made


def _object(there: World, colour: str, shape: str, place: str, size: str, rng: np.random.Generator) -> Found:
    x, y = np.array(there.places[place]) + rng.uniform(-shapes.JITTER, shapes.JITTER, 2)
    half = there.sizes[size] + rng.uniform(-there.jitter, there.jitter)
    return Found(colour, shape, float(x), float(y), float(half))


def is_held_out(world: str, one: Found) -> bool:
    """Shapes: the demo's captions. Scenes: colour and shape together."""
    if world == "shapes":
        there = WORLDS[world]
        return Shape(there.size(one), one.colour, one.shape, there.place(one)) in _HELD_OUT_SHAPES
    return (one.colour, one.shape) in _HELD_OUT_KINDS


_HELD_OUT_SHAPES = frozenset(shapes.split()[1])
_KINDS = list(itertools.product(COLOURS, SHAPES))
_HELD_OUT_KINDS = {_KINDS[i] for i in keyed.generator(0, "held-out kinds").permutation(len(_KINDS))[:HELD_OUT]}


def _one_of(names: object, rng: np.random.Generator, without: tuple[str, ...] = ()) -> str:
    left = [name for name in names if name not in without]                                       # type: ignore[attr-defined]
    return str(left[rng.integers(len(left))])


def _recolour(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first, *others = after
    before = replace(first, colour=_one_of(COLOURS, rng, (first.colour,)))
    return Edit("recolour", f"make the {first.shape} {first.colour}", (before, *others), after)


def _move(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first, *others = after
    place = there.place(first)
    came = _one_of(there.places, rng, tuple(map(there.place, after)))
    (x, y), (from_x, from_y) = there.places[place], there.places[came]
    before = replace(first, x=first.x - x + from_x, y=first.y - y + from_y)
    to = place.replace("at ", "to ").replace("in ", "to ")
    return Edit("move", f"move the {first.shape} {to}", (before, *others), after)


def _resize(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first, *others = after
    size = there.size(first)
    other = _one_of(there.sizes, rng, (size,))
    before = replace(first, half=first.half - there.sizes[size] + there.sizes[other])
    return Edit("resize", f"make the {first.shape} {size}", (before, *others), after)


def _replace(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first, *others = after
    before = replace(first, shape=_one_of(SHAPES, rng, tuple(one.shape for one in after)))
    return Edit("replace", f"turn the {before.shape} into a {first.shape}", (before, *others), after)


def _remove(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    return Edit("remove", f"remove the {after[0].shape}", after, after[1:])


def _add(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first = after[0]
    said = f"add a {there.size(first)} {first.colour} {first.shape} {there.place(first)}"
    return Edit("add", said, after[1:], after)


def _inpaint(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    """A quarter of the first object is missing."""
    first, side = after[0], round(1.2 * after[0].half)
    left, top = (int(at - side * rng.integers(2)) for at in (first.x, first.y))
    return Edit("inpaint", "fill in the grey part", after, after, (max(0, left), max(0, top), side))


def _colourise(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    said = " and ".join(f"the {one.shape} {one.colour}" for one in after)
    return Edit("colourise", f"colour {said}", after, after)


def _deblur(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    return Edit("deblur", "make the picture sharp", after, after)


def _segment(there: World, after: Objects, rng: np.random.Generator) -> Edit:
    first = after[0]
    return Edit("segment", f"segment the {first.shape}", after, (replace(first, colour="black"),))


_MAKERS = (_recolour, _move, _resize, _replace, _remove, _add, _inpaint, _colourise, _deblur, _segment)
MAKERS: dict[str, Callable[[World, Objects, np.random.Generator], Edit]] = dict(zip(TASKS, _MAKERS, strict=True))


def held_out(world: str, count: int = 32) -> list[Edit]:
    """So many of each task, always the same."""
    return [
        make(world, task, True, keyed.generator(0, f"held-out edits {world} {task}", i))
        for i in range(count)
        for task in TASKS
    ]


# --- judging them -----------------------------------------------------------------------------------------------------


def judged(image: np.ndarray, edit: Edit) -> tuple[bool, bool]:
    """(whether a picture shows what was asked for, whether all else is as it was), by the shapes that it shows.

    Asked for: the attribute that the instruction names, of the object that it names; of a picture to restore all, of
    one in grey the colours. All else: every other attribute of every object. Objects too many or too few are neither.
    """
    found = scenes.read(image)
    if len(found) != len(edit.after):
        return False, False
    pairs = min(
        (list(zip(order, edit.after, strict=True)) for order in itertools.permutations(found)),
        key=lambda pairs: sum((a.x - b.x) ** 2 + (a.y - b.y) ** 2 for a, b in pairs),
    )
    agree = [_agreement(*pair) for pair in pairs]
    if edit.task in ("inpaint", "deblur", "remove"):
        whole = all(all(one.values()) for one in agree)
        return whole, whole
    asked = [("colour",)] * len(agree) if edit.task == "colourise" else [ASKED[edit.task], *[()] * (len(agree) - 1)]
    right = all(one[name] for one, names in zip(agree, asked, strict=True) for name in names)
    kept = all(one[name] for one, names in zip(agree, asked, strict=True) for name in one.keys() - set(names))
    return right, kept


def _agreement(one: Found, wanted: Found) -> dict[str, bool]:
    return {
        "colour": one.colour == wanted.colour,
        "shape": one.shape == wanted.shape,
        "place": (one.x - wanted.x) ** 2 + (one.y - wanted.y) ** 2 <= PLACE**2,
        "half": abs(one.half - wanted.half) <= HALF,
    }
