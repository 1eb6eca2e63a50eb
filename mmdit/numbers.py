"""Numbers that people give: what cannot be meant is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, (bool, str)) and math.isfinite(value)


def between(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises: ValueError unless it is a finite number from least to most."""
    if not _is_number(value) or not least <= value <= most:                                     # type: ignore[operator]
        wanted = "a finite number" + (f" of at least {least:g}" if math.isfinite(least) else "")
        if math.isfinite(most):
            wanted = f"a number from {least:g} to {most:g}"
        raise ValueError(f"{name} is {value!r}; expected {wanted}")


def above(name: str, value: object, least: float) -> None:
    """Raises: ValueError unless it is a finite number above least."""
    if not _is_number(value) or not value > least:                                              # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; expected a number above {least:g}")


def whole(name: str, value: object, least: int) -> None:
    """Raises: ValueError unless it is an integer of at least least."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:             # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def interval(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises: ValueError unless it is two finite numbers from least to most, the smaller first."""
    good = hasattr(value, "__len__") and not isinstance(value, (str, Mapping)) and len(value) == 2
    if not good or not all(map(_is_number, value)) or not least <= value[0] <= value[1] <= most:   # type: ignore[index, call-overload]
        within = f" from {least:g} to {most:g}" if math.isfinite(most) else ""
        raise ValueError(f"{name} is {value!r}; expected two finite numbers{within}, the smaller first")
