"""How a live module gets another forward, and its own back: its class is exchanged for a subclass of the same name.

Nothing is stored in the instance, so state dicts, parameters, submodules and hooks stay as they are, `isinstance` and
lists of class names (`_no_split_modules`) still hold, and taking the class back restores the module exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Options:
    """What `apply` was asked to replace."""

    adaln: bool = True
    attention: bool = True
    qk_norm: bool = True
    mlp: bool = True


class Fused:
    """Marks the classes that modules are exchanged for: (mixin with the forward, the module's own class)."""

    options: Options


@cache
def fused_class(mixin: type, own: type, options: Options) -> type:
    """The subclass of `own` whose forward is the mixin's."""
    names = {"options": options, "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (mixin, own), names)


def own_class(module: nn.Module) -> type:
    """The class that a module had before it was exchanged."""
    own: type = type(module).__bases__[1] if isinstance(module, Fused) else type(module)
    return own


def captured(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where hooks keep the forward that they wrap: (object, attribute)."""
    if "_old_forward" in module.__dict__:                                   # accelerate
        yield module, "_old_forward"
    registry = module.__dict__.get("_diffusers_hook")                       # diffusers: offloading, caching
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def exchange(module: nn.Module, new: type) -> None:
    """Gives a module another class of the same layout; forwards that hooks captured become the new one's."""
    old: Any = type(module)
    module.__class__ = new
    for holder, name in captured(module):
        bound = getattr(holder, name)
        if getattr(bound, "__self__", None) is module and bound.__func__ is old.forward:
            setattr(holder, name, MethodType(new.forward, module))           # type: ignore[attr-defined]
