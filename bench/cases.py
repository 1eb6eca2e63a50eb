"""The ops at SD3's shapes, and every way to compute them that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rfkernels
from bench.environment import importable
from rfkernels import Stream

Op = Callable[..., tuple[Tensor, ...]]
TEXT = 154
HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make` gives fresh inputs, which all take gradients; contenders take them in that order."""

    name: str
    make: Callable[[], list[Tensor]]
    contenders: dict[str, Op]
    """"ours" and "eager", which a careful user writes, among them."""
    forward_bytes: int
    """The least to move: each activation once."""
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


def compiled(op: Op) -> dict[str, Op]:
    """By torch.compile, where there is a GPU to compile for."""
    if not torch.cuda.is_available():
        return {}
    autotuned = torch.compile(op, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return {"compile": torch.compile(op, fullgraph=True, dynamic=False), "max-autotune": autotuned}


# --- adaLN family -----------------------------------------------------------------------------------------------------


def eager_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),)


def eager_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor]:
    return (residual + gate.unsqueeze(1) * branch,)


def eager_gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    (h,) = eager_gated_residual(residual, branch, gate)
    return h, *eager_adaln(h, shift, scale)


FAMILY: dict[str, tuple[int, int, Op, Op, int, int]] = {
    # activations, vectors, ours, eager, tensors that a forward and a backward must move
    "adaln": (1, 2, lambda *a: (rfkernels.adaln(*a),), eager_adaln, 2, 3),
    "gated_adaln": (2, 3, lambda *a: rfkernels.gated_adaln(*a), eager_gated_adaln, 4, 6),
    "gated_residual": (2, 1, lambda *a: (rfkernels.gated_residual(*a),), eager_gated_residual, 3, 3),
}


def modulation_cases(batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for op, (activations, vectors, ours, eager, forward, backward) in FAMILY.items():
        def make(activations: int = activations, vectors: int = vectors) -> list[Tensor]:
            shapes = [(batch, tokens, width)] * activations + [(batch, width)] * vectors
            return [torch.randn(s, device=device, dtype=dtype) for s in shapes]

        one = batch * tokens * width * dtype.itemsize
        contenders = {"ours": ours, "eager": eager, **compiled(eager)}
        yield Case(f"{op}-{width}-B{batch}-S{tokens}", make, contenders, forward * one, backward * one)


# --- joint attention --------------------------------------------------------------------------------------------------


def ours_attention(text: Tensor, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    streams = [Stream.packed(text, *weights[:2]), Stream.packed(image, *weights[2:])]
    return tuple(out for out in rfkernels.joint_attention(streams) if out is not None)


def around(core: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Op:
    """A library's attention with what it needs around it: norms, concatenation, split. core takes [B, S, H, D]."""

    def attention(text: Tensor, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parts = []
        for qkv, (q_weight, k_weight) in ((text, weights[:2]), (image, weights[2:])):
            q, k, v = qkv.unbind(2)
            normed = (F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
            parts.append((*normed, v))
        out = core(*(torch.cat(both, 1) for both in zip(*parts, strict=True)))
        return out.split([text.shape[1], image.shape[1]], 1)

    return attention


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def sdpa_by(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa(q, k, v)

    return attend


def flash(module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from importlib import import_module

    function = import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def attention_contenders() -> dict[str, Op]:
    found: dict[str, Op] = {"ours": ours_attention, "eager": around(sdpa)}
    if torch.cuda.is_available():
        found |= {"flash2": around(sdpa_by("FLASH_ATTENTION")), "cudnn": around(sdpa_by("CUDNN_ATTENTION"))}
        modules = {"flash-attn": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
        found |= {name: around(flash(module)) for name, module in modules.items() if importable(module)}
        found |= {f"{name}+cudnn": op for name, op in compiled(found["cudnn"]).items() if name == "compile"}
        found |= compiled(found["eager"])
    return found


def attention_case(batch: int, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> Case:
    def make() -> list[Tensor]:
        qkvs = [torch.randn(batch, n, 3, heads, HEAD_DIM, device=device, dtype=dtype) for n in (TEXT, tokens)]
        return [*qkvs, *torch.ones(4, HEAD_DIM, device=device, dtype=dtype).unbind()]

    length = TEXT + tokens
    one = batch * length * heads * HEAD_DIM * dtype.itemsize
    flops = 4 * batch * heads * length**2 * HEAD_DIM
    name = f"joint_attention-H{heads}-B{batch}-S{TEXT}+{tokens}"
    return Case(name, make, attention_contenders(), 4 * one, 8 * one, flops, 5 * flops // 2)


# --- Shapes -----------------------------------------------------------------------------------------------------------


def cases(device: torch.device) -> list[Case]:
    """On a GPU d = 24 and 38 at 256, 512 and 1024 pixels, at batches that fill it and at 1; on a CPU d = 6, once."""
    if device.type != "cuda":
        small = [*modulation_cases(2, 256, 384, device, torch.float32)]
        return [*small, attention_case(2, 256, 6, device, torch.float32)]
    found = []
    for depth in (24, 38):
        for tokens, batch in ((256, 64), (1024, 16), (4096, 4), (256, 1)):
            found += [*modulation_cases(batch, tokens, 64 * depth, device, torch.bfloat16)]
            found.append(attention_case(batch, tokens, depth, device, torch.bfloat16))
    return found
