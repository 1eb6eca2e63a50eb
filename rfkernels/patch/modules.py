"""The forwards that diffusers' modules are given: the same submodules, called in the same order, fused ops between.

Submodules are called, never read around, so LoRA layers, hooks and quantised linears keep working; where a fused op
needs the weights themselves (`gelu_mlp`) and they are not plain, the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

import rfkernels
from rfkernels.autocast import autocast_dtype
from rfkernels.layers import plain
from rfkernels.patch.swap import Fused


def eager_dtype(*tensors: Tensor) -> torch.dtype | None:
    """Of a modulated norm, the dtype that PyTorch would give; None for the op's own choice."""
    if autocast_dtype(tensors[0].device.type):
        return None                                       # a linear layer follows, for which autocast would cast
    return reduce(torch.promote_types, [t.dtype for t in tensors])


def watched(module: nn.Module) -> bool:
    """Whether somebody hooked a module, or gave it a forward of its own: then it has to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def modulated(normal: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As diffusers writes it."""
    return normal * (1 + scale[:, None]) + shift[:, None]


def stands_for(norm: Any) -> bool:
    """Whether adaln may stand for a norm, now: it may have been hooked, or replaced by another."""
    return plain_norm(norm) is None and not watched(norm)


def modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if not stands_for(norm):
        return modulated(norm(x), shift, scale)
    return rfkernels.adaln(x, shift, scale, eps=norm.eps, dtype=eager_dtype(x, shift, scale))


def add_gated_and_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor, norm: Any, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    if not stands_for(norm):
        h = rfkernels.gated_residual(residual, branch, gate)
        return h, modulated(norm(h), shift, scale)
    dtype = eager_dtype(residual, branch, gate, shift, scale)
    return rfkernels.gated_adaln(residual, branch, gate, shift, scale, eps=norm.eps, dtype=dtype)


def plain_norm(norm: nn.Module) -> str | None:
    """Why a layer norm is not the one inside adaln, or None."""
    if type(norm) is not nn.LayerNorm:
        return f"its norm is a {type(norm).__name__}"
    return "its norm has a weight" if norm.elementwise_affine else None


# --- norm of queries or keys, where attention itself is left ---------------------------------------------------------


class HeadNorm(Fused):
    """RMSNorm over the head dimension of one of q and k, [B, S, H, D] or [B, H, S, D]."""

    def forward(self: Any, x):
        weight = self.weight
        if x.ndim != 4 or x.dtype != weight.dtype or x.stride(-1) != 1:
            return super().forward(x)                                         # type: ignore[misc]
        nothing = x.new_empty(x.shape[0], 0, *x.shape[2:])                    # the other of the two
        return rfkernels.qk_norm(x, nothing, weight, weight.detach(), eps=self.eps)[0]


# --- norms with their modulation --------------------------------------------------------------------------------------


class AdaLayerNormZero(Fused):
    def forward(self: Any, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = rfkernels.chunk_modulation(self.linear(self.silu(emb)), 6)
        return modulate(self.norm, x, shift, scale), *rest


class AdaLayerNormZeroX(Fused):
    def forward(self: Any, hidden_states, emb=None):
        parts = rfkernels.chunk_modulation(self.linear(self.silu(emb)), 9)
        if not stands_for(self.norm):
            normal = self.norm(hidden_states)                                # called once, as its own does
            y, second = (modulated(normal, parts[i], parts[i + 1]) for i in (0, 6))
        else:
            y, second = (modulate(self.norm, hidden_states, parts[i], parts[i + 1]) for i in (0, 6))
        return y, *parts[2:6], second, parts[8]


class AdaLayerNormZeroSingle(Fused):
    def forward(self: Any, x, emb=None):
        shift, scale, gate = rfkernels.chunk_modulation(self.linear(self.silu(emb)), 3)
        return modulate(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(Fused):
    def forward(self: Any, x, conditioning_embedding):
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = rfkernels.chunk_modulation(emb, 2)                    # in this order
        return modulate(self.norm, x, shift, scale)


# --- blocks: residual, gate and the next norm in one ------------------------------------------------------------------


def second_half(
    x: Tensor, branch: Tensor, m: tuple[Tensor, ...], norm: Any, mlp: Callable[[Tensor], Tensor]
) -> Tensor:
    """x after attention's branch and the MLP. m: gate; shift, scale, gate of the MLP."""
    gate, shift, scale, gate_mlp = m
    h, y = add_gated_and_modulate(x, branch, gate, norm, shift, scale)
    return rfkernels.gated_residual(h, mlp(y), gate_mlp)


def clip(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class JointTransformerBlock(Fused):
    """SD3 and SD3.5."""

    def forward(self: Any, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        kwargs = joint_attention_kwargs or {}
        y, *m = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            context = self.norm1_context(encoder_hidden_states, temb)
        else:
            context, *c = self.norm1_context(encoder_hidden_states, emb=temb)
        branch, context_branch = self.attn(hidden_states=y, encoder_hidden_states=context, **kwargs)
        if self.use_dual_attention:
            hidden_states = rfkernels.gated_residual(hidden_states, branch, m[0])
            branch, m[0] = self.attn2(hidden_states=m[4], **kwargs), m[5]
        hidden_states = second_half(hidden_states, branch, tuple(m[:4]), self.norm2, chunked(self, self.ff))
        if self.context_pre_only:
            return None, hidden_states
        mlp = chunked(self, self.ff_context)
        return second_half(encoder_hidden_states, context_branch, tuple(c), self.norm2_context, mlp), hidden_states


def chunked(block: Any, ff: nn.Module) -> Callable[[Tensor], Tensor]:
    """The MLP in pieces, if set_chunk_feed_forward asked for them."""
    if block._chunk_size is None:
        return ff
    from diffusers.models.attention import _chunked_feed_forward

    return lambda y: _chunked_feed_forward(ff, y, block._chunk_dim, block._chunk_size)


class SD3SingleTransformerBlock(Fused):
    def forward(self: Any, hidden_states, temb):
        y, *m = self.norm1(hidden_states, emb=temb)
        branch = self.attn(hidden_states=y, encoder_hidden_states=None)
        return second_half(hidden_states, branch, tuple(m), self.norm2, self.ff)


class FluxTransformerBlock(Fused):
    def forward(
        self: Any, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        y, *m = self.norm1(hidden_states, emb=temb)
        context, *c = self.norm1_context(encoder_hidden_states, emb=temb)
        branch, context_branch, *adapter = self.attn(
            hidden_states=y, encoder_hidden_states=context, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )  # fmt: skip
        hidden_states = second_half(hidden_states, branch, tuple(m), self.norm2, self.ff)
        if adapter:
            hidden_states = hidden_states + adapter[0]
        context = second_half(encoder_hidden_states, context_branch, tuple(c), self.norm2_context, self.ff_context)
        return clip(context), hidden_states


class FluxSingleTransformerBlock(Fused):
    def forward(
        self: Any, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        y, gate = self.norm(x, emb=temb)
        hidden = self.act_mlp(self.proj_mlp(y))
        attended = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = clip(rfkernels.gated_residual(x, self.proj_out(torch.cat([attended, hidden], dim=2)), gate))
        return x[:, :text], x[:, text:]


class QwenImageTransformerBlock(Fused):
    def forward(
        self: Any, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
        joint_attention_kwargs=None, modulate_index=None,
    ):  # fmt: skip
        if self.zero_cond_t or modulate_index is not None:                   # two modulations by token: its own forward
            return super().forward(                                          # type: ignore[misc]
                hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb,
                joint_attention_kwargs, modulate_index,
            )  # fmt: skip
        image, text = (rfkernels.chunk_modulation(module(temb), 6) for module in (self.img_mod, self.txt_mod))
        branch, text_branch = self.attn(
            hidden_states=modulate(self.img_norm1, hidden_states, image[0], image[1]),
            encoder_hidden_states=modulate(self.txt_norm1, encoder_hidden_states, text[0], text[1]),
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )  # fmt: skip
        hidden_states = second_half(hidden_states, branch, image[2:], self.img_norm2, self.img_mlp)
        context = second_half(encoder_hidden_states, text_branch, text[2:], self.txt_norm2, self.txt_mlp)
        return clip(context), clip(hidden_states)


# --- the MLP ----------------------------------------------------------------------------------------------------------


class FeedForward(Fused):
    def forward(self: Any, hidden_states, *args, **kwargs):
        if args or kwargs or other_mlp(self.net) or layers_called(self.net):
            return super().forward(hidden_states, *args, **kwargs)           # type: ignore[misc]
        return rfkernels.gelu_mlp(hidden_states, self.net[0].proj, self.net[2])


def other_mlp(net: Any) -> str | None:
    """Why the parts of an MLP are not a linear layer, GELU by tanh, dropout and a linear layer, or None."""
    if len(net) != 3:
        return "it has a final dropout" if len(net) == 4 and type(net[3]) is nn.Dropout else f"it has {len(net)} parts"
    first, dropout = net[0], net[1]
    if type(first).__name__ != "GELU" or getattr(first, "approximate", None) != "tanh":
        return f"its activation is {type(first).__name__}"
    return None if type(dropout) is nn.Dropout else f"where dropout stands it has a {type(dropout).__name__}"


def layers_called(net: Any) -> bool:
    """Whether its parts have to be called now: dropout acts, somebody watches, or a layer is more than its weights."""
    first, dropout, last = net
    dropped = dropout.training and dropout.p > 0
    return dropped or watched(first) or watched(dropout) or not (plain(first.proj) and plain(last))
