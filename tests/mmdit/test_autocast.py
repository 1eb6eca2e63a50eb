"""The model under autocast: an fp32 residual stream, as a careful eager model has it."""

import contextlib

import pytest
import torch

import rfkernels
from bench import eager
from mmdit import MMDiT, presets
from rfkernels.triton_support import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on CPU tensors in the interpreter only")
KERNELS = ("adaln", "gated_adaln", "gated_residual", "gelu_mlp", "patch_embed", "patch_unembed", "joint_attention")


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")                        # eager's
@pytest.mark.parametrize("kernels", (False, pytest.param(True, marks=interpreted)))
def test_its_error_is_eagers(kernels):
    config = presets.tiny(depth=3 if kernels else 24)
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    latent, context = torch.randn(2, config.in_channels, 8, 8), torch.randn(2, 5, config.context_dim)
    given = (latent, torch.rand(2), context, torch.randn(2, config.pooled_dim))

    def run(made, autocast=True, backend=None):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), backend or contextlib.nullcontext():
            out = made(*given)
            tokens = made.patch_embed(latent)
        (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in made.parameters()]
        gradient = torch.cat([g.flatten().double() for g in grads])
        return out.double(), gradient, tokens.dtype

    exact = run(eager.model(model), autocast=False)
    careful = run(eager.model(model))
    ours = run(model, backend=rfkernels.backend("triton", *KERNELS) if kernels else None)
    assert ours[2] == torch.float32, "the stream starts in the dtype of the positions"
    for got, plain, want in zip(ours[:2], careful[:2], exact[:2], strict=True):
        assert (got - want).norm() <= 1.5 * (plain - want).norm()
