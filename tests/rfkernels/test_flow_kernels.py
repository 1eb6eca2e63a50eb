"""rectified_flow's and weighted_mse's kernels in Triton's interpreter (on the device where there is one)."""

import pytest
import torch

import rfkernels
from rfkernels.testing import assert_within_rule, nan_filled, traffic
from rfkernels.triton_support import INSTALLED
from tests.rfkernels.paths import kernels

pytestmark = [pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"), pytest.mark.usefixtures("path")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = ((2, 4, 6, 5), (1, 16, 32, 32), (3, 1), (5, 2049))


def flow(x0, noise, t):
    t = t.to(x0.dtype if x0.dtype == torch.float64 else torch.float32).reshape(-1, *[1] * (x0.ndim - 1))
    return ((1 - t) * x0 + t * noise).to(x0.dtype), noise - x0


def mse(prediction, target, weight):
    error = (prediction.to(target.dtype if target.dtype == torch.float64 else torch.float32) - target).square()
    return (error.flatten(1).sum(1) * weight.to(error.dtype)).sum() / error.numel()


def fused(op, *args):
    with kernels(), nan_filled():
        return op(*args)


def gradients(call, inputs, grads):
    outs = call(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*outs, *torch.autograd.grad(outs, [t for t in inputs if t.requires_grad], grads)]


def leaves(*tensors, dtype=None):
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rectified_flow_agrees_with_fp64(shape, dtype):
    x0, noise = leaves(torch.randn(shape), torch.randn(shape), dtype=DTYPES[dtype])
    (t,) = leaves(torch.rand(shape[0]))
    grads = [torch.randn(shape).to(DEVICE, DTYPES[dtype]) for _ in range(2)]
    exact = gradients(flow, leaves(x0, noise, t, dtype=torch.float64), [g.double() for g in grads])
    eager = gradients(flow, [x0, noise, t], grads)
    got = gradients(lambda *a: fused(rfkernels.rectified_flow, *a), [x0, noise, t], grads)
    for name, a, b, c in zip(("z", "target", "dx0", "dnoise"), got, exact, eager, strict=False):
        assert_within_rule(name, a, b, c)
    # One number a sample, so eager's error is luck: a sum of n terms in fp32 is off by a few eps of their norm.
    terms = (grads[0].double() * (noise - x0).double()).flatten(1)
    assert ((got[4].double() - exact[4]).abs() <= 4 * torch.finfo(torch.float32).eps * terms.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_mse_agrees_with_fp64(shape, dtype):
    """The target stays fp32, as a trainer has it."""
    (prediction,), (target, weight) = leaves(torch.randn(shape), dtype=DTYPES[dtype]), leaves(
        torch.randn(shape), torch.rand(shape[0])
    )
    grad = [torch.tensor(3.0, device=DEVICE)]
    exact = gradients(mse, leaves(prediction, target, weight, dtype=torch.float64), [grad[0].double()])
    eager = gradients(mse, [prediction, target, weight], grad)
    got = gradients(lambda *a: fused(rfkernels.weighted_mse, *a), [prediction, target, weight], grad)
    for name, a, b, c in zip(("loss", "dprediction", "dtarget", "dweight"), got, exact, eager, strict=True):
        assert_within_rule(name, a, b, c)


def test_only_what_asks_has_a_gradient_and_is_kept():
    """Training asks for the prediction's only, and nothing of the noising."""
    from bench.saved_bytes import saved

    x0, noise, t = torch.randn(2, 64, device=DEVICE), torch.randn(2, 64, device=DEVICE), torch.rand(2, device=DEVICE)
    z, target = fused(rfkernels.rectified_flow, x0, noise, t)
    assert not z.requires_grad and not target.requires_grad
    x0.requires_grad_()
    kept = saved(lambda: fused(rfkernels.rectified_flow, x0, noise, t), [x0])
    assert kept == t.nbytes
    (dx0,) = torch.autograd.grad(fused(rfkernels.rectified_flow, x0, noise, t)[1].sum(), x0)
    assert (dx0 == -1).all()
    (prediction,) = leaves(torch.randn(2, 64))
    (found,) = torch.autograd.grad(fused(rfkernels.weighted_mse, prediction, target, t), prediction)
    torch.testing.assert_close(found, t[:, None] * (prediction - target) * 2 / 128)


def test_any_strides_and_expanded_gradients():
    base = torch.randn(3, 8, 6, 4, device=DEVICE)
    views = (base.to(memory_format=torch.channels_last), base[:, ::2], base.expand(3, 8, 6, 4).flip(1), base[1:])
    for view in views:
        x0, noise = view.detach().requires_grad_(), torch.randn_like(view)
        t = torch.rand(len(view), dtype=torch.float64, device=DEVICE)                    # read as fp32
        got = gradients(lambda *a: fused(rfkernels.rectified_flow, *a)[0].sum(), [x0, noise, t], None)
        want = gradients(lambda *a: flow(*a)[0].sum(), [x0, noise, t], None)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(fused(rfkernels.weighted_mse, x0, noise, t), mse(x0, noise, t))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter moves")
@pytest.mark.triton_only
def test_each_element_moves_once():
    from rfkernels.flow import launch

    x0, noise, t = torch.randn(2, 3000), torch.randn(2, 3000), torch.rand(2)
    with traffic() as moved:
        z, target = launch.rectified_flow(x0, noise, t)
    assert [moved.loaded(x0), moved.loaded(noise), moved.stored(z), moved.stored(target)] == [6000] * 4
    with traffic() as moved:
        launch.weighted_mse(x0, noise, t)
    assert [moved.loaded(x0), moved.loaded(noise)] == [6000] * 2
    with traffic() as moved:
        dp, _ = launch.weighted_mse_backward(torch.ones(()), x0, noise, t, False)
    assert [moved.loaded(x0), moved.loaded(noise), moved.stored(dp)] == [6000] * 3


def test_the_same_bits_when_repeated_and_a_sum_that_bf16_could_not_hold():
    prediction = torch.ones(2, 70_000, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.tensor([1.0, 3.0], device=DEVICE)
    assert fused(rfkernels.weighted_mse, prediction, torch.zeros_like(prediction), weight).item() == 2.0
    a, b = (fused(rfkernels.weighted_mse, torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)).to(DEVICE),
                  torch.zeros(3, 5000, device=DEVICE), torch.ones(3, device=DEVICE)) for _ in range(2))  # fmt: skip
    assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_operators_compile_and_are_registered_rightly():
    x0, noise, t = leaves(torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.rand(2))
    torch.library.opcheck(torch.ops.rfkernels.rectified_flow.default, (x0, noise, t))
    torch.library.opcheck(torch.ops.rfkernels.rectified_flow.default, (x0, noise, t.detach()))
    torch.library.opcheck(torch.ops.rfkernels.weighted_mse.default, (x0, noise, t))
    torch.library.opcheck(torch.ops.rfkernels.weighted_mse.default, (x0, noise.detach(), t.detach()))

    def loss(x0, noise, t):
        with kernels():
            z, target = rfkernels.rectified_flow(x0, noise, t)
            return rfkernels.weighted_mse(z.sin(), target, t)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, [x0, noise, t], None), gradients(loss, [x0, noise, t], None), strict=True):
        torch.testing.assert_close(a, b)
