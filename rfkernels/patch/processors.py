"""The attention processors that diffusers' attentions are given: the projections as they are, then joint_attention on
the streams, which concatenates nothing and normalises q and k inside."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

import rfkernels
from rfkernels.joint_attention.stream import Rope, Stream
from rfkernels.patch.modules import watched
from rfkernels.patch.swap import Fused

Norms = tuple[nn.Module | None, nn.Module | None]


def weight_and_eps(norm: nn.Module | None) -> tuple[Tensor, float] | None:
    """Of an RMSNorm that joint_attention can do itself, or None."""
    if norm is None or type(norm).__name__ != "RMSNorm" or getattr(norm, "bias", None) is not None:
        return None
    weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
    return None if watched(norm) or weight is None or eps is None else (weight, eps)


class Processor(Fused):
    """What the processors of all models share."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    own_with: str | None = None
    """With what its own runs, whatever was asked for."""

    def elsewhere(self) -> bool:
        """Whether somebody asked for another attention: a backend, for this model or for all, context parallelism, or a
        mode that swaps PyTorch's own (perturbed attention)."""
        if self._attention_backend is not None or self._parallel_config is not None:
            return True
        return another_backend() or swapped()

    def attend(self, streams: list[Any]) -> tuple[Tensor | None, ...]:
        """streams: of each (q, k, v as [B, S, H, D] or one packed [B, S, 3, H, D], norms of q and k, Rope, queries)."""
        norms = [norm for _, pair, *_ in streams for norm in pair if norm is not None]
        known = [weight_and_eps(norm) for norm in norms]
        eps = {found[1] for found in known if found is not None}
        inside = self.options.qk_norm and all(known) and len(eps) == 1
        made = []
        for qkv, (q_norm, k_norm), rope, queries in streams:
            settings: dict[str, Any] = {"rope": rope, "queries": queries}
            if inside:
                settings["q_weight"], settings["k_weight"] = (n and n.weight for n in (q_norm, k_norm))
            if isinstance(qkv, Tensor) and inside:
                made.append(Stream.packed(qkv, **settings))
                continue
            q, k, v = qkv.unbind(2) if isinstance(qkv, Tensor) else qkv
            if not inside:
                q, k = (t if t is None or norm is None else norm(t) for t, norm in ((q, q_norm), (k, k_norm)))
            made.append(Stream(q, k, v.to(k.dtype), **settings))
        return rfkernels.joint_attention(made, eps=eps.pop() if inside else 1e-6)      # without norms it has no part


def heads_of(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim))


def own(attn: Any) -> Norms:
    return attn.norm_q, attn.norm_k


def added(attn: Any) -> Norms:
    return attn.norm_added_q, attn.norm_added_k


class JointAttnProcessor2_0(Processor):
    """SD3 and SD3.5, dual attention too. The last block drops its text, which therefore asks nothing in sampling, where
    nobody watches; in training it does, so that its query projection has a gradient (of zeros), as data parallelism
    expects."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        if swapped():                                                       # its own calls PyTorch's, and no dispatcher
            return super().__call__(                                         # type: ignore[misc]
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        projected = [project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)]
        dim = projected[1].shape[-1] // attn.heads                           # of heads that may have been pruned
        streams: list[Any] = [(tuple(heads_of(x, dim) for x in projected), own(attn), None, True)]
        if encoder_hidden_states is not None:
            parts = (attn, attn.add_q_proj, attn.norm_added_q)
            asks = not attn.context_pre_only or torch.is_grad_enabled() or any(watched(part) for part in parts if part)
            q = heads_of(attn.add_q_proj(encoder_hidden_states), dim) if asks else None
            k, v = (heads_of(project(encoder_hidden_states), dim) for project in (attn.add_k_proj, attn.add_v_proj))
            streams.append(((q, k, v), added(attn), None, asks))
        out: Any
        out, *context = self.attend(streams)
        text = None if not context or context[0] is None else context[0].flatten(2)
        if text is not None and not attn.context_pre_only:
            text = attn.to_add_out(text)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        return (out, text) if context else out


def another_backend() -> bool:
    """Whether diffusers' dispatcher has another default than PyTorch's attention: DIFFUSERS_ATTN_BACKEND, or inside its
    `attention_backend(...)`."""
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError:                                                     # a release without it
        return False
    return bool(_AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE)


def swapped() -> bool:
    """Whether a mode sees calls of PyTorch's functions, other than the one that says where tensors are made."""
    if torch.compiler.is_compiling():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ != "DeviceContext" for mode in modes)


class _Tables:
    """Rotary tables as joint_attention takes them, of those that a model gave last: every block asks for the same. One
    attribute, set at once: threads may draw with models of their own."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()
        """(references to both tables, what else decides, what was made of them)"""

    def __call__(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
        versions = [None if table.is_inference() else table._version for table in (cos, sin)]
        last, key = self._last, (*versions, torch.is_inference_mode_enabled())
        if not last or last[0]() is not cos or last[1]() is not sin or last[2] != key:
            made = cos[:, ::2].contiguous(), sin[:, ::2].contiguous()
            self._last = last = (weakref.ref(cos), weakref.ref(sin), key, made)
        found: tuple[Tensor, Tensor] = last[3]
        return found


_tables = _Tables()


class FluxAttnProcessor(Processor):
    """FLUX, double and single blocks. Its rotary tables hold every angle twice, text first."""

    own_with = "an attention mask"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if attention_mask is not None or self.elsewhere():
            return super().__call__(                                         # type: ignore[misc]
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        rope = text_rope = None
        if image_rotary_emb is not None:
            cos, sin = _tables(*image_rotary_emb)
            rope, text_rope = Rope(cos[text:], sin[text:]), Rope(cos[:text], sin[:text])
        streams: list[Any] = [(self.project(attn, hidden_states, ""), own(attn), rope, True)]
        if encoder_hidden_states is not None:
            context = self.project(attn, encoder_hidden_states, "added")
            streams.append((context, added(attn), text_rope, True))
        out, *others = (x.flatten(2) for x in self.attend(streams) if x is not None)
        if not others:
            return out
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(others[0])

    @staticmethod
    def project(attn: Any, x: Tensor, which: str) -> Any:
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if which else ("to_q", "to_k", "to_v")
        if attn.fused_projections:
            packed = (attn.to_added_qkv if which else attn.to_qkv)(x)
            return packed.unflatten(-1, (3, -1, attn.head_dim))
        return tuple(heads_of(getattr(attn, name)(x), attn.head_dim) for name in names)


class QwenDoubleStreamAttnProcessor2_0(Processor):
    """Qwen-Image. Its rotary tables are complex. With a text mask, which need not be a padded tail, its own runs."""

    own_with = "a text mask"

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_mask=None,
        image_rotary_emb=None,
    ):  # fmt: skip
        masked = encoder_hidden_states_mask is not None or attention_mask is not None
        if masked or self.elsewhere() or encoder_hidden_states is None:
            return super().__call__(                                         # type: ignore[misc]
                attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        dim = attn.inner_dim // attn.heads
        ropes: list[Rope | None] = [None, None]
        if image_rotary_emb is not None:
            ropes = [Rope(angles.real.contiguous(), angles.imag.contiguous()) for angles in image_rotary_emb]
        image = tuple(heads_of(project(hidden_states), dim) for project in (attn.to_q, attn.to_k, attn.to_v))
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = tuple(heads_of(project(encoder_hidden_states), dim) for project in projections)
        streams: list[Any] = [(image, own(attn), ropes[0], True), (text, added(attn), ropes[1], True)]
        out, context = (x.flatten(2) for x in self.attend(streams) if x is not None)
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out, attn.to_add_out(context)
