"""Steps that never wait for the device: the same as clipping and stepping one after the other."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train.engine.parallel import World
from train.engine.stepping import Stepper, Taken, gradient_norm

ALONE = World(torch.device("cpu"))


def made(device="cpu", clip=0.5):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, device=device), torch.nn.Linear(5, 2, device=device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.99), eps=1e-15, fused=True)
    return model, optimizer, Stepper(model, optimizer, clip, ALONE)


def backward(model, scale=1.0):
    x = torch.arange(12.0, device=model[0].weight.device).view(2, 6)
    loss = scale * model(x).square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("clip", (0.0, 0.5, 1e9))
def test_a_step_is_clipping_then_adamw(clip):
    model, _, stepper = made(clip=clip)
    want, plain, _ = made()
    plain.param_groups[0]["fused"] = False
    norms = []
    for step in range(4):
        stepper(Taken(step, 1e-2, 0.0), backward(model, 3.0**step))
        backward(want, 3.0**step)
        norms.append(float(torch.nn.utils.clip_grad_norm_(want.parameters(), clip or torch.inf)))
        plain.param_groups[0]["lr"] = 1e-2
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(want.parameters()), rtol=1e-4, atol=1e-6)
    read = list(stepper.read())
    assert [taken.step for taken, *_ in read] == [0, 1, 2, 3] and not list(stepper.read())
    assert [norm for _, _, norm, _ in read] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("what", ("loss", "gradient"))
def test_a_step_that_is_not_finite_changes_nothing(what):
    model, optimizer, stepper = made()
    stepper(Taken(0, 1e-2, 0.0), backward(model))
    before = [p.detach().clone() for p in model.parameters()]
    state = [value.clone() for s in optimizer.state.values() for value in s.values()]
    loss = backward(model)
    if what == "gradient":
        model[0].weight.grad[0, 0] = torch.nan
    stepper(Taken(1, 1e-2, 0.0), loss * torch.inf if what == "loss" else loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [value for s in optimizer.state.values() for value in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_host_never_waits():
    """On tensors that only pretend to be on a GPU, whoever asks for a value gets an error."""
    with FakeTensorMode():
        model, _, stepper = made("cuda")
        for step in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            stepper(Taken(step, 1e-2, 0.0), torch.ones((), device="cuda"))
        with pytest.raises(RuntimeError):
            list(stepper.read())


def test_the_norm_of_gradients_of_16_bits_has_32():
    layer = torch.nn.Linear(64, 64).bfloat16()
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([p.grad.double().flatten() for p in layer.parameters()]).norm()
    norm = gradient_norm(layer)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(expected.item(), rel=1e-5)
