"""How long a training step of `make demo` takes with the native code and without: python -m bench.demo_step

The model, batch and optimizer of the recipe; latents and text features are random. Both ways run in turns.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import interleaved
from mmdit import MMDiT
from rfkernels import native, rectified_flow, weighted_mse
from train import recipes

TEXT_TOKENS = 16


def step(name: str = "shapes", threads: int = 1) -> Callable[[], Tensor]:
    """A whole step: loss, gradients, AdamW."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    config = getattr(recipes, name)()
    c, batch = config.model, config.batch
    model = MMDiT(c)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    side = c.resolution // c.token_pixels * c.patch_size
    x0, noise = torch.randn(2, batch, c.in_channels, side, side)
    t, pooled = torch.rand(batch), torch.randn(batch, c.pooled_dim)
    context = torch.randn(batch, TEXT_TOKENS, c.context_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> Tensor:
        z, target = rectified_flow(x0, noise, t)
        loss = weighted_mse(model(z, t, context, pooled), target, torch.ones(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_step", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--recipe", default="shapes", help="whose step (default: shapes)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    asked = parser.parse_args()
    if reason := native.missing():
        raise SystemExit(f"bench.demo_step: {reason}")
    run = step(asked.recipe, asked.threads)

    def without(i: int) -> Tensor:
        with native.without():
            return run()

    samples = interleaved({"native": lambda i: run(), "without": without}, torch.device("cpu"))
    fast, slow = samples["native"], samples["without"]
    print(f"a step of {asked.recipe}, torch {torch.__version__}, {platform.machine()}, {asked.threads} thread(s)")
    print(f"without native code {slow.median * 1e3:7.1f} ms")
    print(f"with it             {fast.median * 1e3:7.1f} ms   {slow.over(fast):.2f} times as fast")


if __name__ == "__main__":
    main()
