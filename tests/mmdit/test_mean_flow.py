"""A MeanFlow step (Geng et al. 2025, algorithm 1): du/dt by one jvp through the model, then a gradient step."""

import contextlib

import pytest
import torch
from torch.func import jvp

import rfkernels
from mmdit import MMDiT, presets
from rfkernels.triton_support import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels run on CPU tensors in the interpreter only")
KERNELS = ("adaln", "gated_adaln", "gated_residual", "gelu_mlp", "patch_embed", "patch_unembed", "qk_norm")


def step(model, latent, noise, t, r, context, pooled):
    """(u, du/dt, loss). u(z, r, t) is the average velocity from r to t; r enters with the pooled text."""
    at = t[:, None, None, None]
    z, v = (1 - at) * latent + at * noise, noise - latent

    def u(z, t, r):
        return model(z, t, context, pooled + r[:, None])

    out, change = jvp(u, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    target = v - (t - r)[:, None, None, None] * change
    return out, change, (out - target.detach()).square().mean()


@pytest.mark.parametrize("kernels", (False, pytest.param(True, marks=interpreted)))
def test_its_tangent_and_gradient_are_the_definitions(kernels):
    config = presets.tiny(depth=2, dual_attention=(0,))
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latent, noise = torch.randn(2, 2, config.in_channels, 8, 8)
    t, r = torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.1])
    given = (latent, noise, t, r, torch.randn(2, 5, config.context_dim), torch.randn(2, config.pooled_dim))

    def both(backend):
        with backend:
            out, change, loss = step(model, *given)
            return out, change, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    want = both(rfkernels.backend("reference"))
    got = both(rfkernels.backend("triton", *KERNELS) if kernels else contextlib.nullcontext())
    assert want[1].abs().max() > 1, "du/dt is something"
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_du_dt_is_a_finite_difference():
    config = presets.tiny(depth=2)
    model = MMDiT(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    latent, noise = torch.randn(2, 1, config.in_channels, 8, 8, dtype=torch.float64)
    context, pooled = torch.randn(1, 5, config.context_dim).double(), torch.randn(1, config.pooled_dim).double()
    r = torch.tensor([0.25], dtype=torch.float64)

    def u(z, r):
        return model(z, torch.tensor([0.5]), context, pooled + r[:, None])

    _, change = jvp(u, (latent, r), (noise, torch.ones_like(r)))
    ahead, behind = (u(latent + s * noise, r + s) for s in (1e-6, -1e-6))
    torch.testing.assert_close(change, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)
