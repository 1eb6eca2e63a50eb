"""Joint attention around a library's attention: norm and rotation into one joint layout, call, split.

The joint q, k and v are tensors of their own, [B, all tokens, H, D]: what no library's attention can do without. On a
GPU one kernel each writes them, norm and rotation included; elsewhere plain PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import bias, native
from rfkernels.joint_attention import join, launch
from rfkernels.joint_attention.layout import Parts, flatten, parse
from rfkernels.joint_attention.reference import key_mask, prepared
from rfkernels.joint_attention.stream import Stream
from rfkernels.launch_tables import table
from rfkernels.registration import Operator
from rfkernels.transforms import differentiable_once
from rfkernels.triton_support import device_name, interpreted, on, refuses_triton


def joint_attention(streams: tuple[Stream, ...], scale: float, eps: float) -> tuple[Tensor | None, ...]:
    asking = [s for s in streams if s.queries]
    if not asking:
        return (None,) * len(streams)
    q, k, v = joined(streams, asking, eps)
    q, k, v = differentiable_once("joint_attention", q, k, v)
    seen = key_mask(streams)
    out = core(q, seen)(q, k, v, seen, scale)
    if seen is not None:
        out = out.masked_fill(~seen.any(-1).unsqueeze(-1), 0)         # no key: zeros, whatever the library does
    parts = iter(out.split([s.shape[1] for s in asking], 1))
    return tuple(cut(next(parts), s) if s.queries else None for s in streams)


def cut(out: Tensor, stream: Stream) -> Tensor:
    valid = stream.valid()
    return out if valid is None else out * valid[:, :, None, None]


# --- The joint layout -------------------------------------------------------------------------------------------------


def joined(streams: tuple[Stream, ...], asking: list[Stream], eps: float) -> tuple[Tensor, ...]:
    """q of all asking streams and k, v of all, [B, tokens, H, D], normalised and rotated."""
    if refuses_fused(streams) is None:
        return tuple(_layout(*flatten(streams), eps))
    if refuses_native(streams) is None:
        made = native.direct("joint_layout", streams, eps)
        return tuple(_native_layout(*flatten(streams), eps) if made is None else made)
    q = together([ready(s.q, s.q_weight, s, eps) for s in asking if s.q is not None])
    k = together([ready(s.k, s.k_weight, s, eps) for s in streams])
    return q, k, together([s.v for s in streams])


def ready(x: Tensor, weight: Tensor | None, stream: Stream, eps: float) -> Tensor:
    """q or k normalised and rotated, by PyTorch's own RMSNorm where it takes the weight's dtype."""
    if weight is not None and weight.dtype == x.dtype:
        x, weight = F.rms_norm(x, x.shape[-1:], weight, eps), None
    return prepared(x, weight, stream.rope, eps)


def together(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def refuses_native(streams: tuple[Stream, ...]) -> str | None:
    """Why the native kernels cannot write the joint layout, or None."""
    first = streams[0]
    if len(streams) == 1 and first.q_weight is None and first.k_weight is None:
        return "nothing to write: one stream, as it is"
    if any(s.rope is not None for s in streams):
        return "the native kernels know no rotary embedding"
    return native.refuses(*(t for s in streams for t in (s.like, s.q_weight, s.k_weight)))


def refuses_fused(streams: tuple[Stream, ...]) -> str | None:
    """Why the kernels cannot write the joint layout, or None."""
    first = streams[0]
    if len(streams) == 1 and first.rope is None and first.q_weight is None and first.k_weight is None:
        return "nothing to write: one stream, as it is"
    for s in streams:
        if s.rope is not None and (s.rope.cos.requires_grad or s.rope.sin.requires_grad):
            return "the kernels have no gradient of rotary tables"
    if first.shape[3] % 2:
        return "the kernels take even head dimensions"
    tensors = [t for s in streams for t in (s.like, s.q_weight, s.k_weight)]
    return interpreted(first.like) or refuses_triton(*tensors) or launch.beyond_grid(first.shape)


def _places(streams: list[Parts]) -> list[tuple[int, slice, slice]]:
    """(stream, its tokens in the joint q, in the joint k and v)."""
    places, asked, seen = [], 0, 0
    for i, s in enumerate(streams):
        length = s.k.shape[1]
        asking = asked + length if s.asks else asked
        places.append((i, slice(asked, asking), slice(seen, seen + length)))
        asked, seen = asking, seen + length
    return places


def _empty_joint(streams: list[Parts]) -> list[Tensor]:
    """q, k, v."""
    batch, _, heads, dim = streams[0].k.shape
    *_, (_, asked, seen) = _places(streams)
    return [streams[0].k.new_empty((batch, n, heads, dim)) for n in (asked.stop, seen.stop, seen.stop)]


def _forward(tensors: list[Tensor], layout: str, eps: float) -> list[Tensor]:
    streams = parse(tensors, layout)
    q, k, v = joint = _empty_joint(streams)
    with on(q.device):
        if join.takes(streams, layout):
            return join.forward(streams, joint, eps)
        for i, asked, seen in _places(streams):
            s = streams[i]
            if s.asks and s.q is not None:
                launch.prepare(s.q, s.q_weight, s, eps, q[:, asked])
            launch.prepare(s.k, s.k_weight, s, eps, k[:, seen])
            v[:, seen].copy_(s.v)
    return [q, k, v]


def _backward(grads: list[Tensor], tensors: list[Tensor], layout: str, eps: float) -> list[Tensor]:
    streams = parse(tensors, layout)
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
    result: list[Tensor] = []
    with on(dq.device):
        if join.takes(streams, layout):
            gradients, sums = join.backward([dq, dk, dv], streams, eps)
            return [*(t for g, s in zip(gradients, streams, strict=True) for t in g.all(s)), *sums]
        for i, asked, seen in _places(streams):
            s, found = streams[i], launch.Gradients.empty(streams[i])
            if s.asks and s.q is not None and found.q is not None:
                dweight = launch.prepare_backward(dq[:, asked], s.q, found.q, s.q_weight, s, eps)
                if dweight is not None:
                    found.weights["q"] = dweight
            dweight = launch.prepare_backward(dk[:, seen], s.k, found.k, s.k_weight, s, eps)
            if dweight is not None:
                found.weights["k"] = dweight
            found.v.copy_(dv[:, seen])
            result += found.all(s)
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.settings = inputs
    ctx.bias = all(map(bias.wanted, (t for t in tensors if t.ndim == 5)))
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, call: Any, *grads: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    found = iter(call(list(grads), tensors, *ctx.settings))
    wanted = [t for s in parse(tensors, ctx.settings[0]) for t in s.differentiable()]
    gradients = [None if t is None else next(found) for t in wanted]
    packed = [g for g in gradients if g is not None and g.ndim == 5]
    for gradient, sums in zip(packed, found, strict=False):               # sums of those that `join` takes
        if ctx.bias:
            bias.give(gradient, sums)
    return gradients, None, None


def _fake_backward(grads: list[Tensor], tensors: list[Tensor], layout: str, eps: float) -> list[Tensor]:
    streams = parse(tensors, layout)
    wanted = [t for s in streams for t in s.differentiable()]
    sums = [s.k.new_empty((3, *s.k.shape[2:])) for s in streams] if join.takes(streams, layout) else []
    return [*(t.new_empty(t.shape) for t in wanted if t is not None), *sums]


def _fake_native_backward(grads: list[Tensor], tensors: list[Tensor], layout: str, eps: float) -> list[Tensor]:
    wanted = [t for s in parse(tensors, layout) for t in s.differentiable()]
    return [t.new_empty(t.shape) for t in wanted if t is not None]


def _operator(name: str, forward: Any, backward: Any, fake_backward: Any) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor[] tensors, str layout, float eps) -> Tensor[]",
        backward_schema="(Tensor[] grads, Tensor[] tensors, str layout, float eps) -> Tensor[]",
        forward=forward,
        backward=backward,
        fake_forward=lambda tensors, layout, eps: _empty_joint(parse(tensors, layout)),
        fake_backward=fake_backward,
        save=_save,
        differentiate=_differentiate,
        after_list=2,
    )


_layout = _operator("joint_layout", _forward, _backward, _fake_backward)
_native_layout = _operator("joint_layout_native", None, None, _fake_native_backward)


# --- The library's attention ------------------------------------------------------------------------------------------

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return sdpa(q, k, v, seen, scale)


def flash3(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


def flash4(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


NEVER = 1 << 62
HALF = (torch.bfloat16, torch.float16)
CORES: dict[str, Core] = {"sdpa": sdpa, "cudnn": cudnn, "flash3": flash3, "flash4": flash4}


def measured(device_type: str, index: int | None, dim: int) -> tuple[str, int, int]:
    """(core, tokens from which this path is the fastest with a backward, and without) by the launch table of a GPU,
    {"joint_attention": {"64": {"core": "cudnn", "library_from": 1024, "library_from_forward": 4096}}} for head
    dimension 64; ("sdpa", never, never) where nothing was measured."""
    name = device_name(torch.device(device_type) if index is None else torch.device(device_type, index))
    entry = table(name).get("joint_attention", {}).get(str(dim), {}) if name else {}
    return entry.get("core", "sdpa"), entry.get("library_from", NEVER), entry.get("library_from_forward", NEVER)


# What torch.compiler.assume_constant_result does; calling that imports torch._dynamo, which takes as long as torch.
measured._dynamo_marked_constant = True                                                             # type: ignore[attr-defined]


def core(q: Tensor, seen: Tensor | None) -> Core:
    """The fastest measured on this GPU; SDPA as PyTorch chooses where nothing was measured, and where others cannot:
    with lengths, which they do not take as a mask, and in more than 16 bits."""
    if seen is not None or q.dtype not in HALF:
        return sdpa
    return CORES[measured(q.device.type, q.device.index, q.shape[-1])[0]]


def faster(streams: tuple[Stream, ...]) -> str | None:
    """Why this path is faster than the kernels on this GPU, or None."""
    if any(s.lengths is not None for s in streams) or streams[0].like.dtype not in HALF:
        return None                                       # lengths would be a mask; neither was measured
    device, tokens = streams[0].like.device, sum(s.shape[1] for s in streams)
    _, with_backward, forward = measured(device.type, device.index, streams[0].shape[3])
    graph = torch.is_grad_enabled() and any(s.requires_grad for s in streams)
    first = with_backward if graph else forward
    if tokens < first:
        return None
    return f"measured on this GPU: a library is faster from {first} tokens, with{'' if graph else 'out'} a backward"
