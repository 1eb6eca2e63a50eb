"""The ops and the block at SD3's shapes, and every way to compute them that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfkernels
from bench import eager
from bench.environment import excluded, importable
from mmdit import presets
from mmdit.blocks import JointBlock
from mmdit.cost.counting import made_in
from mmdit.cost.flops import TEXT_TOKENS
from rfkernels import Stream
from rfkernels.triton_support import INTERPRETED

Op = Callable[..., tuple[Tensor, ...]]
HEAD_DIM = 64


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make` gives fresh inputs, which all take gradients; contenders take them in that order. A
    contender with `weights` takes gradients for those as well, and makes them when it first runs."""

    name: str
    make: Callable[[], list[Tensor]]
    contenders: dict[str, Op]
    """"ours" and "eager", which a careful user writes, among them."""
    forward_bytes: int = 0
    """The least to move: each activation once; 0 if the case is more than one kernel's work."""
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    counted: dict[str, Op] = field(default_factory=dict)
    """What stands for a contender when kernels are counted by shapes, where PyTorch would show it otherwise."""


def compiled(op: Op) -> dict[str, Op]:
    """By torch.compile; on a CPU by its default alone, and not where kernels are interpreted."""
    if not torch.cuda.is_available():
        if INTERPRETED or "compile" in excluded():
            return {}
        return {"compile": torch.compile(op, fullgraph=True, dynamic=False)}
    autotuned = torch.compile(op, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    found = {"compile": torch.compile(op, fullgraph=True, dynamic=False), "max-autotune": autotuned}
    return {name: contender for name, contender in found.items() if name not in excluded()}


# --- adaLN family -----------------------------------------------------------------------------------------------------


def eager_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (eager.adaln(x, shift, scale),)


def eager_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor]:
    return (eager.gated_residual(residual, branch, gate),)


def eager_gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    h = eager.gated_residual(residual, branch, gate)
    return h, eager.adaln(h, shift, scale)


def modulated(norm: Callable[[Tensor], Tensor]) -> dict[str, Op]:
    """The family around a library's layer norm, which knows nothing of modulation."""

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),)

    def gated_adaln(residual: Tensor, branch: Tensor, gate: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        h = eager.gated_residual(residual, branch, gate)
        return h, *adaln(h, *vectors)

    return {"adaln": adaln, "gated_adaln": gated_adaln}


def affine(x: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of ones and a bias of zeros: some libraries have no layer norm without them."""
    return x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])


def liger(x: Tensor) -> Tensor:
    out: Tensor = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply(x, *affine(x), 1e-6)
    return out


def apex(x: Tensor) -> Tensor:
    """NVIDIA's; the package of that name on PyPI is another."""
    module = import_module("apex.normalization.fused_layer_norm")
    out: Tensor = module.fused_layer_norm(x, (x.shape[-1],), 1e-6, True)
    return out


def norms() -> dict[str, Callable[[Tensor], Tensor]]:
    """Layer norms of libraries that are here and run on a GPU."""
    found = {"liger": ("liger_kernel.ops", liger), "apex": ("apex.normalization.fused_layer_norm", apex)}
    usable = torch.cuda.is_available()
    return {name: norm for name, (module, norm) in found.items() if usable and importable(module)}


FAMILY: dict[str, tuple[int, int, Op, Op, int, int]] = {
    # activations, vectors, ours, eager, tensors that a forward and a backward must move
    "adaln": (1, 2, lambda *a: (rfkernels.adaln(*a),), eager_adaln, 2, 3),
    "gated_adaln": (2, 3, lambda *a: rfkernels.gated_adaln(*a), eager_gated_adaln, 4, 6),
    "gated_residual": (2, 1, lambda *a: (rfkernels.gated_residual(*a),), eager_gated_residual, 3, 3),
}


def modulation_cases(batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for op, (activations, vectors, ours, plain, forward, backward) in FAMILY.items():
        def make(activations: int = activations, vectors: int = vectors) -> list[Tensor]:
            shapes = [(batch, tokens, width)] * activations + [(batch, width)] * vectors
            return [torch.randn(s, device=device, dtype=dtype) for s in shapes]

        one = batch * tokens * width * dtype.itemsize
        contenders = {"ours": ours, "eager": plain, **compiled(plain)}
        contenders |= {name: ways[op] for name, norm in norms().items() if op in (ways := modulated(norm))}
        yield Case(f"{op}-{width}-B{batch}-S{tokens}", make, contenders, forward * one, backward * one)


# --- joint attention --------------------------------------------------------------------------------------------------


def ours_attention(text: Tensor, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    streams = [Stream.packed(text, *weights[:2]), Stream.packed(image, *weights[2:])]
    return tuple(out for out in rfkernels.joint_attention(streams) if out is not None)


def by_library(*inputs: Tensor) -> tuple[Tensor, ...]:
    """A joint copy by our kernels, then the attention that PyTorch takes."""
    with rfkernels.backend("library"):
        return ours_attention(*inputs)


def around(core: Callable[[Tensor, Tensor, Tensor], Tensor], norm: eager.Norm = F.rms_norm) -> Op:
    def attention(text: Tensor, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(eager.joint(core, [text, image], [weights[:2], weights[2:]], norm))    # type: ignore[list-item]

    return attention


def sdpa_by(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return eager.sdpa(q, k, v)

    return attend


def flash(module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = import_module(module).flash_attn_func(q, k, v)     # here, so that a broken one is left out by name
        return out[0] if isinstance(out, tuple) else out

    return attend


LIBRARIES = {"flash-attn": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


def attention_contenders() -> dict[str, Op]:
    found: dict[str, Op] = {"ours": ours_attention, "eager": around(eager.sdpa)}
    if torch.cuda.is_available():
        found["ours, library"] = by_library
        found |= {"flash2": around(sdpa_by("FLASH_ATTENTION")), "cudnn": around(sdpa_by("CUDNN_ATTENTION"))}
        found |= {name: around(flash(module)) for name, module in LIBRARIES.items() if importable(module)}
        found |= {f"{name}+cudnn": op for name, op in compiled(found["cudnn"]).items() if name == "compile"}
        found |= compiled(found["eager"])
    return {name: op for name, op in found.items() if name not in excluded()}


def attention_case(batch: int, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> Case:
    def make() -> list[Tensor]:
        qkvs = [torch.randn(batch, n, 3, heads, HEAD_DIM, device=device, dtype=dtype) for n in (TEXT_TOKENS, tokens)]
        return [*qkvs, *torch.ones(4, HEAD_DIM, device=device, dtype=dtype).unbind()]

    length = TEXT_TOKENS + tokens
    one = batch * length * heads * HEAD_DIM * dtype.itemsize
    flops = 4 * batch * heads * length**2 * HEAD_DIM
    return Case(
        f"joint_attention-H{heads}-B{batch}-S{TEXT_TOKENS}+{tokens}", make, attention_contenders(), 4 * one, 8 * one,
        flops, 5 * flops // 2, {"eager": around(eager.sdpa, eager.rms_norm_as_on_a_gpu)},
    )  # fmt: skip


# --- the other ops ----------------------------------------------------------------------------------------------------


def eager_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor]:
    return (F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),)


def eager_qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(q, q.shape[-1:], q_weight, 1e-6), F.rms_norm(k, k.shape[-1:], k_weight, 1e-6)


def eager_patch_embed(latent: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> tuple[Tensor]:
    return (F.conv2d(latent, weight, bias, stride=2).flatten(2).transpose(1, 2) + positions.to(latent.dtype),)


def eager_patch_unembed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    side = int(x.shape[1] ** 0.5)
    cells = F.linear(x, weight, bias).unflatten(2, (2, 2, -1)).unflatten(1, (side, side))     # [B, h, w, p, p, C]
    return (cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3),)


def ours_patch_unembed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    side = 2 * int(x.shape[1] ** 0.5)
    return (rfkernels.patch_unembed(x, weight, bias, height=side, width=side),)


def eager_flow(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.view(-1, 1, 1, 1)
    return ((1 - t) * x0 + t * noise).to(x0.dtype), noise - x0


def eager_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (((prediction.float() - target.float()).square() * weight.view(-1, 1, 1, 1)).mean(),)


def other_cases(batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    side, heads = 2 * int(tokens**0.5), width // HEAD_DIM
    x, latent, head = (batch, tokens, width), (batch, 16, side, side), (batch, tokens, heads, HEAD_DIM)
    one, small = batch * tokens * width * dtype.itemsize, batch * 16 * side * side * dtype.itemsize
    product = 2 * batch * tokens * width
    # name: inputs (of them fp32), ours, eager, bytes and FLOPs of a forward and of a backward
    table: dict[str, tuple[list[tuple[int, ...]], int, Op, Op, int, int, int, int]] = {
        "qk_norm": ([head, head, (HEAD_DIM,), (HEAD_DIM,)], 0, rfkernels.qk_norm, eager_qk_norm,
                    4 * one, 6 * one, 0, 0),
        "gelu_mlp": ([x, (4 * width, width), (4 * width,), (width, 4 * width), (width,)], 0,
                     lambda *a: (rfkernels.gelu_mlp(*a),), eager_mlp, 0, 0, 8 * width * product, 16 * width * product),
        "patch_embed": ([latent, (width, 16, 2, 2), (width,), (tokens, width)], 1,
                        lambda *a: (rfkernels.patch_embed(*a),), eager_patch_embed, one + small, one + 2 * small,
                        64 * product, 128 * product),
        "patch_unembed": ([x, (64, width), (64,)], 0, ours_patch_unembed, eager_patch_unembed, one + small,
                          2 * one + small, 64 * product, 128 * product),
        "rectified_flow": ([latent, latent, (batch,)], 1, rfkernels.rectified_flow, eager_flow,
                           4 * small, 6 * small, 0, 0),
        "weighted_mse": ([latent, latent, (batch,)], 1, lambda *a: (rfkernels.weighted_mse(*a),), eager_mse,
                         2 * small, 4 * small, 0, 0),
    }  # fmt: skip
    for op, (shapes, wide, ours, plain, *counts) in table.items():
        def make(shapes: list[tuple[int, ...]] = shapes, wide: int = wide) -> list[Tensor]:
            dtypes = [dtype] * (len(shapes) - wide) + [torch.float32] * wide
            return [torch.rand(s, device=device).to(d) for s, d in zip(shapes, dtypes, strict=True)]

        contenders = {"ours": ours, "eager": plain, **compiled(plain)}
        yield Case(f"{op}-{width}-B{batch}-S{tokens}", make, contenders, *counts)


# --- the block --------------------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    """A joint block of the paper's series whose weights are made when they are first asked for."""

    depth: int
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def block(self) -> JointBlock:
        with self.device, made_in(self.dtype):
            made = JointBlock(presets.by_depth(self.depth), 0)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.03)
        return made


@dataclass
class BlockOp:
    """One way to run a block, (text, image, modulation) -> (text, image); all ways of a case share their weights."""

    shared: _Weights
    build: Callable[[JointBlock], nn.Module] = lambda block: block
    chunk: Callable[[Tensor, int], Sequence[Tensor]] = rfkernels.chunk_modulation
    """Of the modulation into vectors."""
    compile: dict[str, Any] | None = None

    @cached_property
    def module(self) -> nn.Module:
        made = self.build(self.shared.block)
        if self.compile is not None:
            made.compile(fullgraph=True, dynamic=False, **self.compile)
        return made

    @property
    def weights(self) -> list[Tensor]:
        return list(self.shared.block.parameters())

    def vectors(self, modulation: Tensor) -> list[tuple[Tensor, ...]]:
        chunks = tuple(self.chunk(modulation, 12))
        return [chunks[:6], chunks[6:]]

    def __call__(self, text: Tensor, image: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module([text, image], self.vectors(modulation), [None, None]))

    def free(self) -> None:
        """Lets go of the weights until the next call."""
        self.__dict__.pop("module", None)
        self.shared.__dict__.pop("block", None)


def block_case(batch: int, tokens: int, depth: int, device: torch.device, dtype: torch.dtype) -> Case:
    config, shared = presets.by_depth(depth), _Weights(depth, device, dtype)

    def make() -> list[Tensor]:
        shapes = [(batch, TEXT_TOKENS, config.width), (batch, tokens, config.width), (batch, 12 * config.width)]
        return [torch.randn(s, device=device, dtype=dtype) for s in shapes]

    plain = partial(BlockOp, shared, chunk=partial(torch.chunk, dim=-1))
    found: dict[str, Op] = {"ours": BlockOp(shared), "eager": plain(eager.Block)}
    if torch.cuda.is_available():
        found["ours, compiled"] = BlockOp(shared, eager.twin, compile={})
        found["compile"] = plain(eager.Block, compile={})
        if "max-autotune" not in excluded():
            found["max-autotune"] = plain(eager.Block, compile={"mode": "max-autotune-no-cudagraphs"})
    forward = 2 * 12 * config.width**2 * batch * (TEXT_TOKENS + tokens)              # qkv, proj, fc1, fc2
    forward += 4 * batch * config.width * (TEXT_TOKENS + tokens) ** 2
    counted: dict[str, Op] = {"eager": plain(partial(eager.Block, norm=eager.rms_norm_as_on_a_gpu))}
    return Case(
        f"block-{config.width}-B{batch}-S{TEXT_TOKENS}+{tokens}", make, found,
        forward_flops=forward, backward_flops=2 * forward, counted=counted,
    )  # fmt: skip


# --- Shapes -----------------------------------------------------------------------------------------------------------


SHAPES = ((256, 64), (1024, 16), (4096, 4), (256, 1))
"""Image tokens of 256, 512 and 1024 pixels, at batches that fill a GPU, and the first at 1."""


def cases(device: torch.device) -> list[Case]:
    """On a GPU d = 24 and 38 at every shape; on a CPU d = 6, once, in fp32 and bf16."""
    if device.type != "cuda":
        return [
            replace(case, name=f"{case.name}{suffix}")
            for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16))
            for case in (
                *modulation_cases(2, 256, 384, device, dtype), attention_case(2, 256, 6, device, dtype),
                *other_cases(2, 256, 384, device, dtype), block_case(2, 256, 6, device, dtype),
            )
        ]  # fmt: skip
    found: list[Case] = []
    for depth in (24, 38):
        for tokens, batch in SHAPES:
            found += modulation_cases(batch, tokens, 64 * depth, device, torch.bfloat16)
            found.append(attention_case(batch, tokens, depth, device, torch.bfloat16))
            found += other_cases(batch, tokens, 64 * depth, device, torch.bfloat16)
            found.append(block_case(batch, tokens, depth, device, torch.bfloat16))
    return found


def left_out(device: torch.device) -> dict[str, str]:
    """What this machine cannot run, and why."""
    found = {}
    if device.type != "cuda":
        found["d = 24 and 38 at 256, 512 and 1024 pixels, in bf16"] = "no GPU"
        found["max-autotune, SDPA by backend"] = "no GPU to compile and run for"
        found["times of the Triton kernels, device bandwidth, memory peaks, MFU"] = "no GPU"
    wanted = {**LIBRARIES, "liger": "liger_kernel.ops", "apex": "apex.normalization.fused_layer_norm"}
    for name, module in {**wanted, "diffusers": "diffusers"}.items():
        if not importable(module):
            found[name] = f"{module} is not installed"
        elif device.type != "cuda" and name in wanted:
            found[name] = "installed, but there is no GPU"
    return found
