"""apply, revert and report."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rfkernels.patch import modules, processors
from rfkernels.patch.swap import Fused, Options, exchange, fused_class, own_class

NORMALIZATION, ATTENTION = "diffusers.models.normalization", "diffusers.models.attention"
TRANSFORMERS = "diffusers.models.transformers.transformer_"


@dataclass(frozen=True)
class Known:
    """A class of diffusers and what stands for it."""

    where: str
    """Module and name."""
    mixin: type
    option: str
    """Of `apply`: which one asks for it."""
    norms: tuple[str, ...] = ()
    """Submodules that have to be layer norms without weight."""

    def own(self) -> Any:
        """The class, or None where this diffusers has none of the name."""
        path, _, name = self.where.rpartition(".")
        try:
            return getattr(importlib.import_module(path), name, None)
        except ImportError:
            return None


BLOCK_NORMS, QWEN_NORMS = ("norm2", "norm2_context"), ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
MODULES = (
    Known(f"{NORMALIZATION}.AdaLayerNormZero", modules.AdaLayerNormZero, "adaln", ("norm",)),
    Known(f"{NORMALIZATION}.SD35AdaLayerNormZeroX", modules.AdaLayerNormZeroX, "adaln", ("norm",)),
    Known(f"{NORMALIZATION}.AdaLayerNormZeroSingle", modules.AdaLayerNormZeroSingle, "adaln", ("norm",)),
    Known(f"{NORMALIZATION}.AdaLayerNormContinuous", modules.AdaLayerNormContinuous, "adaln", ("norm",)),
    Known(f"{ATTENTION}.JointTransformerBlock", modules.JointTransformerBlock, "adaln", BLOCK_NORMS),
    Known(f"{TRANSFORMERS}sd3.SD3SingleTransformerBlock", modules.SD3SingleTransformerBlock, "adaln", ("norm2",)),
    Known(f"{TRANSFORMERS}flux.FluxTransformerBlock", modules.FluxTransformerBlock, "adaln", BLOCK_NORMS),
    Known(f"{TRANSFORMERS}flux.FluxSingleTransformerBlock", modules.FluxSingleTransformerBlock, "adaln"),
    Known(f"{TRANSFORMERS}qwenimage.QwenImageTransformerBlock", modules.QwenImageTransformerBlock, "adaln", QWEN_NORMS),
    Known(f"{ATTENTION}.FeedForward", modules.FeedForward, "mlp"),
)
PROCESSORS = (
    Known("diffusers.models.attention_processor.JointAttnProcessor2_0", processors.JointAttnProcessor2_0, "attention"),
    Known(f"{TRANSFORMERS}flux.FluxAttnProcessor", processors.FluxAttnProcessor, "attention"),
    Known(
        f"{TRANSFORMERS}qwenimage.QwenDoubleStreamAttnProcessor2_0", processors.QwenDoubleStreamAttnProcessor2_0,
        "attention",
    ),
)  # fmt: skip


@dataclass
class Report:
    """What was replaced and what was left, and why."""

    replaced: dict[str, int] = field(default_factory=dict)
    """Modules by class."""
    left: dict[tuple[str, str], int] = field(default_factory=dict)
    """Modules by (class, why)."""
    notes: dict[str, str] = field(default_factory=dict)
    """By class, when its own code runs although it was replaced."""

    def count(self, name: str, why: str | None) -> None:
        """One more module, replaced or left."""
        if why is None:
            self.replaced[name] = self.replaced.get(name, 0) + 1
        else:
            self.left[name, why] = self.left.get((name, why), 0) + 1

    def __str__(self) -> str:
        lines = [
            f"{count:4d} {name}: fused{', ' + self.notes[name] if name in self.notes else ''}"
            for name, count in sorted(self.replaced.items())
        ]
        lines += [f"{count:4d} {name}: left, {why}" for (name, why), count in sorted(self.left.items())]
        return "\n".join(lines)


def _parameters(call: Any) -> list[str]:
    return list(inspect.signature(call).parameters)


def _fits_version(known: Known, own: Any, call: str) -> str | None:
    """Why a class of this diffusers is not the one that is known here, or None: its arguments have to be the same, and
    nobody may have put another function in its place."""
    function = getattr(own, call)
    have, want = _parameters(function), _parameters(getattr(known.mixin, call))
    if have == want:
        where = getattr(function, "__module__", "nowhere")
        wrapped = where != own.__module__ or hasattr(function, "__wrapped__")
        return f"its {call} was replaced or wrapped by somebody ({where})" if wrapped else None
    import diffusers

    return f"diffusers {diffusers.__version__} has {call}({', '.join(have)}), known is ({', '.join(want)})"


def _refuses(module: nn.Module, known: Known) -> str | None:
    for name in known.norms:
        norm = getattr(module, name, None)
        if norm is not None and (why := modules.plain_norm(norm)):
            return why
    if known.mixin is modules.FeedForward:
        return modules.other_mlp(module.net)
    if getattr(module, "zero_cond_t", False):
        return "it modulates tokens in two ways (zero_cond_t)"
    return None


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, Known]]:
    """Those that are known, and those of classes made from them."""
    own = {cls: known for known in MODULES if (cls := known.own()) is not None}
    for module in model.modules():
        kind = own_class(module)
        if known := next((known for cls, known in own.items() if issubclass(kind, cls)), None):
            yield module, known


def _runs_its_own(thing: Any, known: Known | None) -> str | None:
    """Why an exchanged module or processor runs its own code at present, or calls its norm, or None."""
    if isinstance(thing, processors.Processor):
        return "another attention was asked for" if thing.elsewhere() else None
    if known is not None and known.mixin is modules.FeedForward:
        why = modules.other_mlp(thing.net)
        called = why is None and modules.layers_called(thing.net)
        return "its layers are adapted, hooked or no plain weights, or dropout acts" if called else why
    for norm in (getattr(thing, name, None) for name in known.norms) if known is not None else ():
        if norm is not None and not modules.stands_for(norm):
            return modules.plain_norm(norm) or "its norm has hooks"
    return None


def _norms(attention: Any) -> Iterator[Any]:
    """Of its queries and keys, those that qk_norm can compute: over one head."""
    heads, inner = getattr(attention, "heads", None), getattr(attention, "inner_dim", None)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = getattr(attention, name, None)
        found = processors.weight_and_eps(norm)
        if found is not None and (not heads or not inner or found[0].numel() == inner // heads):
            yield norm


def _attentions(model: nn.Module) -> Iterator[tuple[Any, Known | None]]:
    own = {cls: known for known in PROCESSORS if (cls := known.own()) is not None}
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None:
            yield module, own.get(own_class(processor))


def apply(
    model: nn.Module, *, adaln: bool = True, attention: bool = True, qk_norm: bool = True, mlp: bool = True
) -> Report:
    """Makes a live model of diffusers use the fused ops, forward and backward.

    Its parameters, their names, its submodules and its hooks stay; `revert` restores it exactly. Applied again, the new
    options hold.

    Args:
        model: SD3Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel, an SD3ControlNetModel, or
            anything that holds one, before or after `fully_shard`.
        adaln: modulated norms, and gates with residuals.
        attention: joint attention without concatenation.
        qk_norm: the norm of q and k: inside the attention, or on its own where attention is left; without it their
            modules run as before.
        mlp: the two linears around GELU. Adapters and hooks on them are respected: such an MLP runs as before.
    Returns: what was replaced and what was left, and why; printed, it is a table.
    Raises: ValueError if there is nothing in the model that is known; TypeError if it is not a module.

    >>> from diffusers import SD3Transformer2DModel
    >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    >>> model = SD3Transformer2DModel(num_layers=2, **sizes)
    >>> print(apply(model))                                              # doctest: +NORMALIZE_WHITESPACE
    2 AdaLayerNormContinuous: fused
    3 AdaLayerNormZero: fused
    3 FeedForward: fused
    2 JointAttnProcessor2_0: fused
    2 JointTransformerBlock: fused
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch.apply: model is {type(model).__name__}; expected a module: pipeline.transformer")
    options = Options(adaln=adaln, attention=attention, qk_norm=qk_norm, mlp=mlp)
    revert(model)
    found = Report()

    for module, known in list(_modules(model)):
        own: Any = own_class(module)
        why = None if getattr(options, known.option) else f"{known.option}=False"
        why = why or (None if own is known.own() else f"it is made from {known.own().__name__}")
        why = why or _fits_version(known, own, "forward") or _refuses(module, known)
        if why is None:
            exchange(module, fused_class(known.mixin, own, options))
        found.count(own.__name__, why or _runs_its_own(module, known))
    for module, processor in list(_attentions(model)):
        own = own_class(module.processor)
        why = None if options.attention else "attention=False"
        why = why or (_fits_version(processor, own, "__call__") if processor else "not one that is known")
        if why is None:
            assert processor is not None
            exchange(module.processor, fused_class(processor.mixin, own, options))
            _note(found, module.processor)
        found.count(own.__name__, why or _runs_its_own(module.processor, None))
        if options.qk_norm and (why or module.processor.own_with):            # its own calls them
            for norm in _norms(module):
                if why:
                    found.count(own_class(norm).__name__, None)
                exchange(norm, fused_class(modules.HeadNorm, own_class(norm), options))
    if not found.replaced and not found.left:
        raise ValueError(
            f"patch.apply: model is {type(model).__name__} without any part that is known; expected "
            "SD3Transformer2DModel, FluxTransformer2DModel or QwenImageTransformer2DModel"
        )
    return found


def _note(found: Report, processor: Any) -> None:
    if processor.own_with:
        found.notes[own_class(processor).__name__] = f"its own runs with {processor.own_with}"


def revert(model: nn.Module) -> None:
    """Takes back what `apply` did; a model that was not patched stays as it is.

    >>> from diffusers import SD3Transformer2DModel
    >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    >>> model = SD3Transformer2DModel(num_layers=2, **sizes)
    >>> applied = apply(model)
    >>> revert(model)
    """
    for module in model.modules():
        if isinstance(module, Fused):
            exchange(module, own_class(module))
        processor = getattr(module, "processor", None)
        if isinstance(processor, Fused):
            exchange(processor, own_class(processor))


def report(model: nn.Module) -> Report:
    """What is fused in a model now, and which parts that are known are not."""
    found = Report()
    for module, known in _modules(model):
        why = _runs_its_own(module, known) if isinstance(module, Fused) else "not patched"
        found.count(own_class(module).__name__, why)
    for module, _ in _attentions(model):
        fused = isinstance(module.processor, Fused)
        why = _runs_its_own(module.processor, None) if fused else "not patched"
        found.count(own_class(module.processor).__name__, why)
        if fused:
            _note(found, module.processor)
        for norm in _norms(module):
            if isinstance(norm, Fused) and not fused:
                found.count(own_class(norm).__name__, None)
    return found
