"""gelu_mlp's kernel in Triton's interpreter (on the device where there is one), forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels.testing import assert_within_rule, nan_filled, traffic
from rfkernels.triton_support import INSTALLED
from tests.rfkernels.paths import kernels

pytestmark = [pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"), pytest.mark.usefixtures("path")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(shape, hidden, out, dtype, bias=True):
    c = shape[-1]
    sizes = [shape, (hidden, c), (hidden,), (out, hidden), (out,)]
    tensors = [(2 * torch.randn(s) / max(1, s[-1] ** 0.5 if len(s) == 2 else 1)).to(DEVICE, dtype) for s in sizes]
    return [t.requires_grad_() if bias or t.ndim != 1 else None for t in tensors]


def plain(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def gradients(call, inputs, grad):
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    out = call(*inputs)
    return [out, *torch.autograd.grad(out, wanted, grad)]


def fused(*args):
    with kernels():
        return rfkernels.gelu_mlp(*args)


CASES = (
    ((2, 5, 16), 64, 16), ((1, 1, 8), 24, 12), ((3, 40, 24), 300, 24), ((7, 16), 257, 8), ((2, 3, 4, 16), 32, 16),
)  # fmt: skip


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "plain"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("shape, hidden, out", CASES)
def test_agrees_with_fp64(shape, hidden, out, dtype, bias):
    inputs = made(shape, hidden, out, dtype, bias)
    grad = torch.randn(*shape[:-1], out, device=DEVICE).to(dtype)
    exact = gradients(plain, [t if t is None else t.detach().double().requires_grad_() for t in inputs], grad.double())
    eager = gradients(plain, inputs, grad)
    with nan_filled():
        got = gradients(fused, inputs, grad)
    for name, a, b, c in zip(("y", "dx", "dw1", "db1", "dw2", "db2"), got, exact, eager, strict=False):
        assert_within_rule(name, a, b, c)


def test_gelu_itself_far_out():
    """The kernel's sigmoid form against fp64 autograd, from where GELU is 0 to where it is the identity."""
    from rfkernels.mlp.launch import gelu_backward

    h = torch.linspace(-30, 30, 4096, device=DEVICE).view(16, 256)
    wide = h.double().requires_grad_()
    value = F.gelu(wide, approximate="tanh")
    (want,) = torch.autograd.grad(value.sum(), wide)
    a, dh, db = gelu_backward(h, torch.ones_like(h), True, True)
    torch.testing.assert_close(a.double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(db.double(), want.sum(0), rtol=1e-5, atol=1e-5)


def test_keeps_the_pre_activation_only():
    from bench.saved_bytes import saved

    inputs = made((2, 8, 16), 64, 16, torch.bfloat16)
    kept = {call: saved(lambda call=call: call(*inputs), [inputs[1], inputs[2], inputs[3]]) for call in (plain, fused)}
    x, h = 2 * 16 * 16, 2 * 16 * 64
    assert kept == {plain: x + 2 * h, fused: x + h}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter moves")
@pytest.mark.triton_only
def test_moves_each_activation_once():
    from rfkernels.mlp.launch import gelu_backward

    h, da = torch.randn(40, 300), torch.randn(40, 300)
    with traffic() as moved:
        a, dh, _ = gelu_backward(h, da, True, True)
    assert moved.loaded(h) == moved.loaded(da) == moved.stored(a) == moved.stored(dh) == h.numel()


@pytest.mark.same_kernel
@pytest.mark.parametrize("frozen", range(5))
def test_only_the_gradients_that_are_wanted(frozen):
    """A frozen weight, as under LoRA, costs no product; the others stay as they were."""
    inputs = made((2, 5, 16), 32, 16, torch.float32)
    grad = torch.randn(2, 5, 16, device=DEVICE)
    want = gradients(fused, inputs, grad)
    inputs[frozen] = inputs[frozen].detach()
    got = gradients(fused, inputs, grad)
    del want[frozen + 1]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    inputs = [t.detach() for t in inputs]
    inputs[4].requires_grad_()
    assert gradients(fused, inputs, grad)[1].shape == (16,)


def test_the_same_bits_when_repeated_and_expanded_gradients():
    inputs = made((3, 40, 24), 300, 24, torch.bfloat16)
    first = gradients(lambda *a: fused(*a).sum(), inputs, None)
    again = gradients(lambda *a: fused(*a).sum(), inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty_input_and_no_gradient():
    inputs = made((0, 5, 16), 32, 16, torch.float32)
    assert all((g == 0).all() for g in gradients(fused, inputs, torch.zeros(0, 5, 16, device=DEVICE))[2:])
    inputs = made((2, 5, 16), 32, 16, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs), plain(*inputs))


def test_autocast_casts_like_linear():
    inputs = made((2, 5, 16), 64, 16, torch.float32)
    grad = torch.randn(2, 5, 16, device=DEVICE).bfloat16()
    exact = gradients(plain, [t.detach().double().requires_grad_() for t in inputs], grad.double())
    with torch.autocast(DEVICE, torch.bfloat16):
        eager, got = (gradients(call, inputs, grad) for call in (plain, fused))
    for name, a, b, c in zip(("y", "dx", "dw1", "db1", "dw2", "db2"), got, exact, eager, strict=True):
        assert_within_rule(name, a, b, c)


def test_several_dtypes_are_refused_by_name():
    inputs = made((2, 5, 16), 64, 16, torch.float32)
    with pytest.raises(RuntimeError, match="several dtypes"):
        fused(inputs[0].bfloat16(), *inputs[1:])


def test_compiles_whole_and_checkpoints():
    from torch.utils.checkpoint import checkpoint

    inputs = made((2, 5, 16), 64, 16, torch.float32)
    grad = torch.randn(2, 5, 16, device=DEVICE)
    want = gradients(fused, inputs, grad)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for call in (compiled, lambda *args: checkpoint(fused, *args, use_reentrant=False)):
        for a, b in zip(gradients(call, inputs, grad), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_operator_is_registered_rightly():
    h, da = torch.randn(2, 7, 40, device=DEVICE)
    for value, bias in ((True, True), (False, False)):
        torch.library.opcheck(torch.ops.rfkernels.gelu_backward.default, (h, da, value, bias))
