"""What a step keeps between forward and backward and the kernels it runs, traced on fake tensors without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from mmdit import MMDiT, adapters, backbones
from mmdit.adapters import LoraLinear
from mmdit.cost.counting import Kernel, Made, Trace, made_in, trace
from mmdit.cost.flops import TEXT_TOKENS
from train.config import Config, Parallel
from train.engine import parallel


def model_on_meta(config: Config) -> MMDiT:
    """The model of a run, its adapters attached."""
    with torch.device("meta"):
        model = MMDiT(config.model)
    if config.adapter.rank:
        adapters.attach(model, config.adapter)
    return model


def as_trained(call: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast to bf16: weights that FSDP gathered in bf16 meet fp32 positions, so the images' stream is fp32."""

    def under_autocast(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):                            # fake tensors are those of a CPU
            return call(*inputs)

    return under_autocast


def whole_model(config: Config, batch: int, pixels: int) -> Made:
    """A call of the model as it is trained, to be traced."""
    with made_in(torch.bfloat16):
        model = MMDiT(config.model)
        if config.adapter.rank:
            adapters.attach(model, config.adapter)
    c, side = config.model, pixels // (config.model.token_pixels // config.model.patch_size)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    context, pooled = normal(batch, TEXT_TOKENS, c.context_dim), normal(batch, c.pooled_dim)
    latents = normal(batch, c.in_channels, side, side)
    inputs = [latents, torch.rand(batch), context, pooled]
    if not c.takes_references:
        return as_trained(model), inputs, [*model.parameters()]
    edits = lambda *given: model(*given[:4], references=given[4:])  # noqa: E731
    inputs.append(normal(batch, c.reference_channels or c.in_channels, side, side))
    return as_trained(edits), inputs, [*model.parameters()]


def one_block(config: Config, index: int, batch: int, pixels: int) -> Made:
    """A call of a block as it is trained, to be traced."""
    with made_in(torch.bfloat16):
        block = backbones.block(config.model, index)
        if config.adapter.rank:
            _adapt(block, config, index)
    c, tokens = config.model, (pixels // config.model.token_pixels) ** 2
    leaf = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    texts = (c.text_split, TEXT_TOKENS - c.text_split) if c.text_split else (TEXT_TOKENS,)
    xs = [*(leaf(batch, n, c.width) for n in texts), leaf(batch, tokens, c.width, dtype=torch.float32)]
    vectors = [tuple(leaf(batch, c.width) for _ in range(n)) for n in block.vectors]
    seen = [[leaf(batch, tokens, c.width)]] if c.reference_tokens else []
    inputs = [*xs, *(v for half in vectors for v in half), *(tokens for part in seen for tokens in part)]
    return as_trained(lambda *_: block(xs, vectors, [None] * len(xs), *seen)), inputs, list(block.parameters())


def _adapt(block: nn.Module, config: Config, index: int) -> None:
    """A block by itself gets the adapters that it has in its model."""
    there = dict(adapters.layers(model_on_meta(config)))
    block.requires_grad_(False)
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear) and (found := there.get(f"blocks.{index}.{name}")) is not None:
            parent, _, own = name.rpartition(".")
            made = LoraLinear.of(layer, found.rank, found.alpha, found.parts, found.dropout)
            setattr(block.get_submodule(parent), own, made)


@lru_cache(maxsize=8)
def _traces(config: Config, batch: int, pixels: int) -> tuple[Trace, list[Trace]]:
    """Of the model, and of each of its blocks: those that take the same modulation vectors are alike."""
    of: dict[str, Trace] = {}
    kinds = [str(block.vectors) for block in model_on_meta(config).blocks]
    for i, kind in enumerate(kinds):
        if kind not in of:
            of[kind] = trace(partial(one_block, config, i, batch, pixels), backward=True)
    return trace(partial(whole_model, config, batch, pixels), backward=True), [of[kind] for kind in kinds]


def activations(config: Config, batch: int, pixels: int) -> tuple[int, list[Kernel]]:
    """(bytes kept between forward and backward, kernels of a step with what is computed again) of so many samples."""
    batch *= config.pictures
    kind, neutral = config.parallel.checkpointing, replace(config, parallel=Parallel())
    whole, blocks = _traces(neutral, batch, pixels)
    if kind == "none":
        return whole.kept, whole.kernels
    c, tokens = config.model, (pixels // config.model.token_pixels) ** 2
    inputs = batch * c.width * (2 * TEXT_TOKENS + 4 * tokens)                    # a block's: text bf16, images fp32
    kept, kernels = max(0, whole.kept - sum(block.kept for block in blocks)), list(whole.kernels)
    for block in blocks:
        forward = block.kernels[: block.forward]
        stay = [k for k in forward if kind == "selective" and _stays(k)]
        kept += inputs + sum(sum(k.writes.values()) for k in stay)
        kernels += [k for k in forward if k not in stay]
    return kept + max(block.kept for block in blocks), kernels


def _stays(kernel: Kernel) -> bool:
    """Whether selective checkpointing keeps what a kernel writes; a product's output is a matrix."""
    if kernel.op not in parallel.PRODUCTS:
        return parallel.kept(kernel.op)
    (_, _, rows, columns), *_ = kernel.writes
    return parallel.kept(kernel.op, kernel.flops // (2 * rows * columns), columns)
