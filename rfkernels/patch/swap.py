"""How a live module or attention processor gets another forward, and its own back: its class is exchanged for a
subclass of the same name.

Nothing is stored in the instance, so state dicts, parameters, submodules and hooks stay as they are, so does what was
asked of a processor (a backend, context parallelism), `isinstance` and lists of class names (`_no_split_modules`) still
hold, another one can be made from its class without arguments, and taking the class back restores it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
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
    """Marks the classes that modules and processors are exchanged for: (mixin, the object's own class)."""

    options: Options
    made_of: tuple[type, type, Options]
    """What `fused_class` was given."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by what it is made of: its class has the name of its own and cannot be found by it."""
        return anew, self.made_of, super().__reduce_ex__(2)[2]


def anew(mixin: type, own: type, options: Options) -> Any:
    """An object of a fused class, still without its state."""
    made: Any = fused_class(mixin, own, options)
    return made.__new__(made)


@cache
def fused_class(mixin: type, own: type, options: Options) -> type:
    """The subclass of `own` that does what the mixin says."""
    names = {"options": options, "made_of": (mixin, own, options), "__module__": own.__module__}
    names |= {"__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made = type(own.__name__, (mixin, own), names)
    _register(made, own)
    return made


def _register(made: type, own: type) -> None:
    """Diffusers' hooks (caches, layer skipping) look up a block and a processor by its exact class."""
    try:
        from diffusers.hooks import _helpers as helpers
    except ImportError:                                                     # a release without them
        return
    for registry in (helpers.TransformerBlockRegistry, helpers.AttentionProcessorRegistry):
        try:
            registry.register(made, copy(registry.get(own)))                # type: ignore[arg-type]
        except ValueError:                                                  # it knows nothing of the own class either
            continue


def _is_own(kind: type) -> bool:
    """Whether a class is the object's own: neither ours, nor what fully_shard puts in front."""
    return not issubclass(kind, Fused) and all(base.__name__ != "FSDPModule" for base in kind.__mro__)


def own_class(thing: object) -> type:
    """The class that a module or processor had before anybody exchanged it."""
    return next(kind for kind in type(thing).__mro__ if _is_own(kind))


def _inner(thing: object) -> type:
    """What is exchanged: a fused class, or the own one; fully_shard's class in front stays."""
    return next(kind for kind in type(thing).__mro__ if "made_of" in kind.__dict__ or _is_own(kind))


@cache
def _rebuilt(kind: type, old: type, new: type) -> type:
    """A class with another one below it."""
    if kind is old:
        return new
    bases = tuple(_rebuilt(base, old, new) for base in kind.__bases__)
    if bases == kind.__bases__:
        return kind
    names = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, names)


def captured(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where hooks keep the forward that they wrap: (object, attribute)."""
    if "_old_forward" in module.__dict__:                                   # accelerate
        yield module, "_old_forward"
    registry = module.__dict__.get("_diffusers_hook")                       # diffusers: offloading, caching
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def exchange(thing: Any, new: Any) -> None:
    """Gives a module or processor another class of the same layout; forwards that hooks captured become the new
    class's."""
    old: Any = type(thing)
    now: Any = _rebuilt(old, _inner(thing), new)
    thing.__class__ = now
    if not isinstance(thing, nn.Module):
        return
    given: Any = thing.__dict__.get("forward")     # accelerate and diffusers leave one when they take a hook away
    if getattr(given, "__self__", None) is thing and given.__func__ is old.forward:
        del thing.__dict__["forward"]
    for holder, name in captured(thing):
        bound = getattr(holder, name)
        if getattr(bound, "__self__", None) is thing and bound.__func__ is old.forward:
            setattr(holder, name, MethodType(now.forward, thing))
