"""gelu_mlp on layers: one that is more than its weights is called as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import rfkernels
from rfkernels.layers import plain

pytestmark = pytest.mark.usefixtures("on_device")
C = 32


class LoRA(nn.Linear):
    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a, self.b = nn.Linear(C, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.b(self.a(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Quantised(torch.Tensor):
    """A weight that stands for others, as of torchao."""

    def __tensor_flatten__(self):
        return [], None


def adapted(fc):
    return LoRA(fc)


def hooked(fc):
    fc.register_forward_hook(lambda module, args, out: 2 * out)
    return fc


def parametrised(fc):
    parametrize.register_parametrization(fc, "weight", Doubled())
    return fc


def replaced(fc):
    fc.forward = lambda x: F.linear(x, 3 * fc.weight, fc.bias)
    return fc


@pytest.mark.parametrize("change", (None, adapted, hooked, parametrised, replaced))
def test_layers_are_called_if_they_are_more_than_their_weights(change, taken):
    x, fc1, fc2 = torch.randn(2, 3, C), nn.Linear(C, 64), nn.Linear(64, C)
    if change is not None:
        fc1 = change(fc1)
    got = rfkernels.gelu_mlp(x, fc1, fc2)
    assert taken == ({"gelu_mlp": 1} if change is None else {}), "the fused path, only where it is the same"
    assert torch.equal(got, rfkernels.gelu_mlp(x, fc2=fc2, fc1=fc1))
    assert ("called as they are" in rfkernels.explain("gelu_mlp", x, fc1, fc2)) == (change is not None)
    torch.testing.assert_close(got, fc2(F.gelu(fc1(x), approximate="tanh")))
    got.sum().backward()
    assert all(p.grad is not None for p in fc1.parameters() if p.requires_grad)


def test_a_quantised_weight_is_not_read():
    fc = nn.Linear(C, C)
    assert plain(fc) and plain(copy.deepcopy(fc))
    fc.weight = nn.Parameter(fc.weight.detach().as_subclass(Quantised))
    assert not plain(fc)


def test_peft_adapters_are_trained():
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(C, 64), nn.Linear(64, C)

        def forward(self, x):
            return rfkernels.gelu_mlp(x, self.fc1, self.fc2)

    config = peft.LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)
    model, x = peft.inject_adapter_in_model(config, Model()), torch.randn(2, C)
    torch.testing.assert_close(model(x), model.fc2(F.gelu(model.fc1(x), approximate="tanh")))
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)
