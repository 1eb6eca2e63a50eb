"""What patching a model of diffusers changes in a block: python -m bench.patched

Kernels that a GPU would launch and bytes that are kept for the backward, counted on fake tensors at the sizes of the
released models, 1024 pixels, batch 1, bf16, forward + backward. An operator of PyTorch counts as one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import eager, tables
from mmdit.cost import counting
from mmdit.cost.counting import made_in
from rfkernels import patch

IMAGE, SD3_TEXT, FLUX_TEXT = 4096, 333, 512                   # tokens; SD3's text with T5 at 256


@contextmanager
def rms_norm_as_one() -> Iterator[None]:
    """torch.nn.RMSNorm as on a GPU: one operator each way."""
    before, F.rms_norm = F.rms_norm, eager.rms_norm_as_on_a_gpu
    try:
        yield
    finally:
        F.rms_norm = before


def sd3(dual: bool, width: int) -> Callable[[], tuple[nn.Module, list[Tensor]]]:
    def make() -> tuple[nn.Module, list[Tensor]]:
        from diffusers.models.attention import JointTransformerBlock

        block = JointTransformerBlock(width, width // 64, 64, qk_norm="rms_norm", use_dual_attention=dual)
        return block, [torch.randn(1, IMAGE, width), torch.randn(1, SD3_TEXT, width), torch.randn(1, width)]

    return make


def flux(single: bool) -> Callable[[], tuple[nn.Module, list[Tensor]]]:
    def make() -> tuple[nn.Module, list[Tensor]]:
        from diffusers.models.transformers import transformer_flux

        name = "FluxSingleTransformerBlock" if single else "FluxTransformerBlock"
        block = getattr(transformer_flux, name)(3072, 24, 128)
        return block, [torch.randn(1, IMAGE, 3072), torch.randn(1, FLUX_TEXT, 3072), torch.randn(1, 3072)]

    return make


BLOCKS = {
    "SD3.5 medium, dual attention": sd3(True, 1536),
    "SD3.5 large": sd3(False, 2432),
    "FLUX, double": flux(False),
    "FLUX, single": flux(True),
}


def count(make: Callable[[], tuple[nn.Module, list[Tensor]]], patched: bool) -> counting.Trace:
    def made() -> counting.Made:
        with made_in(torch.bfloat16):
            block, inputs = make()
        rotary: dict[str, Any] = {}
        if type(block).__name__.startswith("Flux"):
            rotary = {"image_rotary_emb": torch.rand(2, IMAGE + FLUX_TEXT, 128, dtype=torch.float32).unbind()}
        if patched:
            patch.apply(nn.Sequential(block))
        inputs = [t.to(torch.bfloat16).requires_grad_() for t in inputs]
        return lambda *args: block(*args, **rotary), inputs, list(block.parameters())

    with rms_norm_as_one():
        return counting.trace(made, backward=True)


def main() -> None:
    import diffusers

    print(f"one block, {IMAGE} image tokens, batch 1, bf16, forward + backward; diffusers {diffusers.__version__}, "
          f"torch {torch.__version__}")  # fmt: skip
    body = []
    for name, make in BLOCKS.items():
        plain, fused = count(make, False), count(make, True)
        launches, kept = (str(t.launches) for t in (plain, fused)), (tables.size(t.kept) for t in (plain, fused))
        body.append([name, *launches, *kept])
    head = ["block", "launches", "patched", "kept", "patched"]
    print(tables.markdown(head, body), end="")


if __name__ == "__main__":
    main()
