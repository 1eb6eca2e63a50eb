"""qk_norm's kernels in Triton's interpreter (on the device where there is one), forward and backward."""

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels.testing import assert_within_rule, nan_filled, traffic
from rfkernels.triton_support import INSTALLED
from tests.rfkernels.paths import kernels

pytestmark = [pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"), pytest.mark.usefixtures("path")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")


def plain(q, k, q_weight, k_weight):
    return [F.rms_norm(x, x.shape[-1:], w, 1e-6) for x, w in ((q, q_weight), (k, k_weight))]


def fused(*args):
    with kernels():
        return rfkernels.qk_norm(*args)


def gradients(call, inputs, grads):
    out = call(*inputs)
    return [*out, *torch.autograd.grad(out, inputs, grads)]


def leaves(q, k, dtype):
    weights = [torch.rand(q.shape[-1], device=DEVICE).to(dtype) + 0.5 for _ in range(2)]
    return [t.detach().clone().to(dtype).requires_grad_() for t in (q, k)] + [w.requires_grad_() for w in weights]


SHAPES = (
    ((2, 5, 3, 64), (2, 5, 3, 64)), ((1, 1, 1, 16), (1, 1, 1, 16)), ((2, 70, 2, 64), (2, 9, 1, 64)),
    ((1, 33, 2, 40), (1, 33, 2, 40)), ((1, 3, 1, 128), (1, 20, 2, 128)), ((2, 3, 2, 8), (2, 0, 2, 8)),
)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("q_shape, k_shape", SHAPES)
def test_agrees_with_fp64(q_shape, k_shape, dtype):
    q, k = (3 * torch.randn(s, device=DEVICE) for s in (q_shape, k_shape))
    inputs = leaves(q, k, dtype)
    grads = [torch.randn(s, device=DEVICE).to(dtype) for s in (q_shape, k_shape)]
    exact = gradients(plain, [t.detach().double().requires_grad_() for t in inputs], [g.double() for g in grads])
    eager = gradients(plain, inputs, grads)
    with nan_filled():
        got = gradients(fused, inputs, grads)
    for name, a, b, c in zip(NAMES, got, exact, eager, strict=True):
        assert_within_rule(name, a, b, c)


def test_reads_a_packed_projection_in_place_and_expanded_gradients():
    packed = torch.randn(2, 7, 3, 2, 64, device=DEVICE, requires_grad=True)
    weights = [torch.rand(64, device=DEVICE, requires_grad=True) for _ in range(2)]

    def call(packed, *weights, op=fused):
        q, k, _ = packed.unbind(2)
        q, k = op(q, k, *weights)
        return q.transpose(1, 2).sum() + (k * 2).sum(), q

    inputs = [packed, *weights]
    got = torch.autograd.grad(call(*inputs)[0], inputs)
    want = torch.autograd.grad(call(*inputs, op=plain)[0], inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter moves")
@pytest.mark.triton_only
def test_moves_each_activation_once_in_one_launch():
    from rfkernels.qk_norm.launch import qk_norm, qk_norm_backward

    q, k, dq, dk = torch.randn(4, 2, 70, 2, 64)
    w = torch.rand(64)
    with traffic() as moved:
        outs = qk_norm(q, k, w, w, 1e-6)
    assert [moved.loaded(t) for t in (q, k)] == [moved.stored(t) for t in outs] == [q.numel()] * 2
    with traffic() as moved:
        found = qk_norm_backward(dq, dk, q, k, w, w, 1e-6)
    assert [moved.loaded(t) for t in (q, k, dq, dk)] == [q.numel()] * 4
    assert [moved.stored(t) for t in found[:2]] == [q.numel()] * 2


def test_the_same_bits_when_repeated_and_nothing_but_inputs_kept():
    from bench.saved_bytes import saved

    inputs = leaves(*torch.randn(2, 2, 70, 2, 64, device=DEVICE), torch.bfloat16)
    grads = [torch.randn(2, 70, 2, 64, device=DEVICE).bfloat16() for _ in range(2)]
    first, again = (gradients(fused, inputs, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert saved(lambda: fused(*inputs), inputs) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_operator_compiles_and_is_registered_rightly():
    inputs = leaves(*torch.randn(2, 2, 5, 2, 16, device=DEVICE), torch.float32)
    torch.library.opcheck(torch.ops.rfkernels.qk_norm.default, (*inputs, 1e-6))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    grads = [torch.randn(2, 5, 2, 16, device=DEVICE) for _ in range(2)]
    for a, b in zip(gradients(compiled, inputs, grads), gradients(fused, inputs, grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ("every second", "column", "one number for all"))
def test_norm_weights_of_any_strides(layout):
    make = {
        "every second": lambda: torch.randn(64)[::2],
        "column": lambda: torch.randn(32, 3)[:, 1],
        "one number for all": lambda: torch.full((1,), 2.0).expand(32),
    }[layout]
    q, k = torch.randn(2, 2, 5, 3, 32, device=DEVICE)
    inputs = [t.detach().requires_grad_() for t in (q, k, make().to(DEVICE), make().to(DEVICE))]
    grads = [torch.randn_like(q) for _ in range(2)]
    with rfkernels.backend("reference"):
        want = gradients(rfkernels.qk_norm, inputs, grads)
    torch.testing.assert_close(gradients(fused, inputs, grads), want, rtol=1e-4, atol=1e-5)


@pytest.mark.triton_only
def test_more_rows_than_32_bits_number_are_refused():
    q = torch.empty(1, 2**31 // 4, 4, 8, device="meta")
    with kernels(), pytest.raises(RuntimeError, match="fewer than 2147418112 rows, not 2147483648"):
        rfkernels.qk_norm(q, q[:, :1], q.new_empty(8), q.new_empty(8))
