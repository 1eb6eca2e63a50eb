"""Scenes of shapes, and a reader that says what a picture shows: GenEval's six categories in miniature.

A prompt is a line of GenEval's metadata (Ghosh et al. 2023): {"tag", "include": [{"class", "count", "color",
"position": [relation, index]}], "exclude": [{"class", "count"}], "prompt"}; what it does not say is drawn at random.
`correct` is GenEval's rule, with shapes found by their outlines in the detector's place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmdit import keyed
from train.data.shapes import BACKGROUND, COLOURS, SHAPES, SIDE, Found, coverage, find, seen

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
RELATIONS = ("left of", "right of", "above", "below")
LOW, MIDDLE, HIGH = 8.5, 16.0, 23.5                 # places of centres, in pixels
CORNERS = tuple(itertools.product((LOW, HIGH), repeat=2))
HALF = (4.0, 5.5)                                   # half the side of a bounding box, in pixels
JITTER = 1.0
HELD_OUT = 6                                        # of that many prompts one is, in tags that have enough of them
MOST = 32                                           # prompts of a tag that a run is asked
SPECK = 6                                           # pixels, below which nothing is an object

Prompt = dict[str, Any]


def everything(tag: str) -> list[Prompt]:
    """All prompts of a tag."""
    pairs = list(itertools.combinations(SHAPES, 2))
    one = lambda shape, **more: {"class": shape, "count": 1, **more}  # noqa: E731
    if tag == "single_object":
        return [_prompt(tag, f"a {s}", [one(s)]) for s in SHAPES]
    if tag == "two_object":
        return [_prompt(tag, f"a {a} and a {b}", [one(a), one(b)]) for a, b in pairs]
    if tag == "counting":
        return [
            _prompt(tag, f"{word} {PLURALS[s]}", [one(s) | {"count": n}], [{"class": s, "count": n + 1}])
            for n, word in NUMBERS.items()
            for s in SHAPES
        ]
    if tag == "colors":
        return [_prompt(tag, f"{_a(c)} {s}", [one(s, color=c)]) for c in COLOURS for s in SHAPES]
    if tag == "position":
        return [
            _prompt(tag, f"a {a} {relation} a {b}", [one(b), one(a, position=[relation, 0])])
            for relation in RELATIONS
            for a, b in itertools.permutations(SHAPES, 2)
        ]
    return [
        _prompt(tag, f"{_a(c)} {a} and {_a(d)} {b}", [one(a, color=c), one(b, color=d)])
        for (a, b), (c, d) in itertools.product(pairs, itertools.permutations(COLOURS, 2))
    ]


def _prompt(tag: str, text: str, include: list[dict], exclude: list[dict] | None = None) -> Prompt:
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": text}


def _a(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def split(tag: str) -> tuple[list[Prompt], list[Prompt]]:
    """(to train on, to ask), in a fixed random order. Of the tags with few prompts all are both; of the others one in
    HELD_OUT is asked and not trained on."""
    prompts = everything(tag)
    prompts = [prompts[i] for i in keyed.generator(0, f"scenes {tag}").permutation(len(prompts))]
    if len(prompts) < 30:
        return prompts, prompts
    held_out = len(prompts) // HELD_OUT
    return prompts[held_out:], prompts[:held_out][:MOST]


def asked() -> list[Prompt]:
    """What a run is asked: at most MOST prompts of each tag."""
    return [prompt for tag in TAGS for prompt in split(tag)[1]]


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(prompt: Prompt, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: a picture of which the prompt is true; rng draws what it leaves open."""
    objects = [item for item in prompt["include"] for _ in range(item["count"])]
    image = np.broadcast_to(BACKGROUND, (SIDE, SIDE, 3)).copy()
    for item, centre in zip(objects, _places(prompt, len(objects), rng), strict=True):
        x, y = np.array(centre) + rng.uniform(-JITTER, JITTER, 2)
        colour = item.get("color") or list(COLOURS)[rng.integers(len(COLOURS))]
        alpha = coverage(item["class"], x, y, rng.uniform(*HALF))[..., None]
        image += alpha * (np.array(COLOURS[colour]) - image)
    return np.rint(image).astype(np.uint8)


def _places(prompt: Prompt, count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (x, y) of the objects, in the prompt's order."""
    relation = next((item["position"][0] for item in prompt["include"] if "position" in item), None)
    if relation is None:
        places = [*CORNERS, (MIDDLE, MIDDLE)] if count == 1 else CORNERS
        return [places[i] for i in rng.permutation(len(places))[:count]]
    first = LOW if relation in ("right of", "below") else HIGH               # the other object, which is named last
    across = (LOW, MIDDLE, HIGH)[rng.integers(3)]
    along = (first, LOW + HIGH - first)
    return [(a, across) if relation.endswith("of") else (across, a) for a in along]


# --- reading ----------------------------------------------------------------------------------------------------------


def read(image: np.ndarray) -> list[Found]:
    """The shapes of a picture [SIDE, SIDE, 3], one for each connected region that is not background."""
    found = []
    for region in _regions(seen(image)):
        alone = np.where(region[..., None], image, BACKGROUND)
        if (shape := find(alone)) is not None:
            found.append(shape)
    return found


def _regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Connected parts of a mask, with the half-covered pixels around them; corners connect."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    steps = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]
    while left:
        edge = [left.pop()]
        region = set(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            region |= near
            edge += near
        if len(region) >= SPECK:
            part = np.zeros_like(mask)
            part[tuple(zip(*region, strict=True))] = True
            grown = np.pad(part, 1)
            yield np.any([grown[1 + dy :, 1 + dx :][:SIDE, :SIDE] for dy, dx in [*steps, (0, 0)]], 0) & (part | ~mask)


def correct(image: np.ndarray, prompt: Prompt) -> bool:
    """Whether a picture shows what a prompt says, by GenEval's rule: of everything to include as many are there as it
    says, all in its colour and at its place, and nothing to exclude. Of more objects than are wanted GenEval takes
    those that its detector is surest of; here the largest."""
    objects = sorted(read(image), key=lambda found: -found.half)
    chosen: list[list[Found]] = []
    for item in prompt["include"]:
        fit = [found for found in objects if found.shape == item["class"]][: item["count"]]
        if len(fit) < item["count"] or any(found.colour != item.get("color", found.colour) for found in fit):
            return False
        if "position" in item:
            relation, other = item["position"]
            if not all(stands(one, relation, target) for one in fit for target in chosen[other]):
                return False
        chosen.append(fit)
    return all(sum(o.shape == item["class"] for o in objects) < item["count"] for item in prompt.get("exclude", ()))


def stands(one: Found, relation: str, other: Found) -> bool:
    """GenEval's test of a relation: the way from the other's centre, less a tenth of both sizes, points there."""
    way = np.array([one.x - other.x, one.y - other.y])
    beyond = np.maximum(np.abs(way) - 0.1 * 2 * (one.half + other.half), 0) * np.sign(way)
    if not beyond.any():
        return False
    dx, dy = beyond / np.linalg.norm(way)
    return bool({"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}[relation])
