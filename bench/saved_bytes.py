"""What an MM-DiT block keeps for its backward: python -m bench.saved_bytes

Counts distinct storages, in bytes per token and channel of the two streams, weights left out. Runs on the CPU; the
Triton rows run in Triton's interpreter and want TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

import rfkernels
from mmdit import presets
from mmdit.blocks import JointBlock
from mmdit.cost.counting import keeping
from rfkernels import dispatch
from rfkernels.triton_support import INSTALLED, INTERPRETED


def saved(run: Callable[[], object], weights: list[Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps while `run` builds its graph."""
    with keeping(weights) as kept:
        held = run()                           # kept alive, or a freed storage's address is used again
    del held
    return sum(kept.values())


def vectors(modulation: Tensor) -> list[tuple[Tensor, ...]]:
    """Of the text's half and of the image's, from [B, 12 * width]."""
    chunks = rfkernels.chunk_modulation(modulation, 12)
    return [chunks[:6], chunks[6:]]


def block_bytes(choose: dict[str, str], batch: int = 2, text: int = 77, image: int = 128) -> float:
    """Bytes per token and channel of one joint block in bf16, with `choose` naming backends of single ops."""
    config = presets.by_depth(2, heads=2)
    block = JointBlock(config, 0).bfloat16()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    xs = [torch.randn(batch, n, config.width, dtype=torch.bfloat16, requires_grad=True) for n in (text, image)]
    modulation = torch.randn(batch, 12 * config.width, dtype=torch.bfloat16, requires_grad=True)
    with ExitStack() as forced:
        for op, backend in choose.items():
            forced.enter_context(rfkernels.backend(backend, op))
        total = saved(lambda: block(xs, vectors(modulation), [None, None]), list(block.parameters()))
    return total / (batch * (text + image) * config.width)


def ways() -> dict[str, dict[str, str]]:
    """Which backend of which op is forced, by the row's name."""
    family = ("adaln", "gated_adaln", "gated_residual")
    rows = {
        "all ops as defined, op by op": dict.fromkeys(dispatch.ops(), "reference"),
        "attention on SDPA, the rest as defined": {**dict.fromkeys(family, "reference")},
        "attention on SDPA, adaLN on PyTorch's norm": {"gated_residual": "reference"},
    }
    if INSTALLED and INTERPRETED:
        rows["attention on SDPA, adaLN in Triton"] = dict.fromkeys(family, "triton")
        rows["attention and adaLN in Triton"] = dict.fromkeys((*family, "joint_attention"), "triton")
        rows["attention, adaLN and MLP in Triton"] = dict.fromkeys((*family, "joint_attention", "gelu_mlp"), "triton")
    return rows


def main() -> None:
    torch.manual_seed(0)
    print(f"joint block, bf16, width 128, 77 + 128 tokens, batch 2; torch {torch.__version__}")
    print("bytes kept for backward per token and channel, weights left out")
    for name, choose in ways().items():
        print(f"  {name:46s} {block_bytes(choose):6.1f}")


if __name__ == "__main__":
    main()
