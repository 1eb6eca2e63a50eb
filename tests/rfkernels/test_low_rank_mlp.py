"""gelu_mlp of layers with low-rank parts, against fp64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

import rfkernels
from bench.saved_bytes import saved
from rfkernels.nn import LoraLinear

from .paths import path  # noqa: F401


def layers(which="both", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    made = []
    for name, sizes in (("fc1", (16, 64)), ("fc2", (64, 24))):
        base = nn.Linear(*sizes, dtype=dtype).requires_grad_(False)
        if which in ("both", name):
            base = LoraLinear.of(base, 3, alpha=2, **settings)
            base.reset_adapter()
            nn.init.normal_(base.lora_b, std=0.3)
        made.append(base)
    return made


def in_fp64(x, layers):
    """The output, and the tensors that it comes from."""
    wide = [x.detach().double().requires_grad_()]
    h = wide[0]
    for i, layer in enumerate(layers):
        out = h @ layer.weight.double().T + layer.bias.double()
        if isinstance(layer, LoraLinear):
            a, b = (t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b))
            wide += [a, b]
            out = out + 2 / 3 * (h @ a.T @ b.T)
        h = gelu(out, approximate="tanh") if i == 0 else out
    return h, wide


@pytest.mark.parametrize("which", ("both", "fc1", "fc2"))
def test_output_and_gradients(which):
    one, two = layers(which)
    x, dy = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 24)
    out = rfkernels.gelu_mlp(x, one, two)
    out.backward(dy)
    expected, wide = in_fp64(x, (one, two))
    expected.backward(dy.double())
    found = [x, *(p for layer in (one, two) for p in layer.parameters() if p.requires_grad)]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_the_pre_activation_alone_is_kept():
    one, two = layers()
    x = torch.randn(2, 500, 16, requires_grad=True)
    held = [*one.parameters(), *two.parameters()]
    fused = saved(lambda: rfkernels.gelu_mlp(x, one, two), held)
    called = saved(lambda: two(gelu(one(x), approximate="tanh")), held)
    assert called - fused >= x.shape[1] * 2 * 64 * 4                               # gelu(h), in fp32


@pytest.mark.parametrize("change", ("dropout", "hook", "trained base", "parts"))
def test_what_it_cannot_do_is_called(change, monkeypatch):
    from rfkernels.mlp import low_rank

    one, two = layers(dropout=0.5) if change == "dropout" else layers()
    if change == "hook":
        one.register_forward_hook(lambda *_: None)
    elif change == "trained base":
        two.weight.requires_grad_(True)
    elif change == "parts":
        one = LoraLinear(16, 64, rank=2, parts=(0, 1))
    assert not low_rank.takes(one, two)
    monkeypatch.setattr(low_rank, "gelu_mlp", None)
    rfkernels.gelu_mlp(torch.randn(3, 16), one, two).sum().backward()
    assert two.lora_b.grad is not None


def test_off_is_the_base_to_the_last_bit():
    one, two = layers()
    x = torch.randn(7, 16, requires_grad=True)
    base = [nn.Linear(layer.in_features, layer.out_features) for layer in (one, two)]
    for plain, layer in zip(base, (one, two), strict=True):
        plain.weight, plain.bias = layer.weight, layer.bias
    one.enabled = two.enabled = False
    assert torch.equal(rfkernels.gelu_mlp(x, one, two), rfkernels.gelu_mlp(x, *base))


def test_under_autocast_and_compiled():
    one, two = layers(dtype=torch.bfloat16)
    x = torch.randn(2, 5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = rfkernels.gelu_mlp(x, one, two)
        compiled = torch.compile(lambda x: rfkernels.gelu_mlp(x, one, two), backend="aot_eager", fullgraph=True)(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, compiled)
    out.float().sum().backward()
    assert one.lora_a.grad.dtype == torch.float32
    expected, _ = in_fp64(x, (one, two))
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)


def test_second_derivatives():
    one, two = layers()
    one, two = one.double(), two.double()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, a: rfkernels.gelu_mlp(x, one, two), (x, one.lora_a))


def test_a_base_in_bf16_with_factors_in_fp32():
    """Without autocast, as adapters are put on released weights."""
    one, two = layers(dtype=torch.bfloat16)
    x = torch.randn(2, 5, 16).bfloat16().requires_grad_()
    out = rfkernels.gelu_mlp(x, one, two)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and one.lora_a.grad.dtype == torch.float32
    expected, _ = in_fp64(x, (one, two))
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)
