"""The native path against the same call without native code, where the two could part: second derivatives, batches of
gradients, modes, tracing, odd sizes and layouts, arguments that do not fit."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rfkernels
from rfkernels import Stream, native
from rfkernels.bias import linear
from rfkernels.joint_attention.library import joined

pytestmark = pytest.mark.skipif(
    bool(native.missing()) or torch.cuda.is_available(), reason=f"{native.missing() or 'tensors are on a GPU'}"
)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def attend(q, w):
    return tuple(rfkernels.joint_attention([Stream(q, q, q, w, w), Stream(q, q, q)]))


def flat(made):
    return made if isinstance(made, tuple) else (made,)


CALLS = {
    "adaln": (lambda x, v: rfkernels.adaln(x, v, v), lambda: [leaf(2, 3, 8), leaf(2, 8)]),
    "gated_adaln": (rfkernels.gated_adaln, lambda: [leaf(2, 3, 8), leaf(2, 3, 8), *(leaf(2, 8) for _ in range(3))]),
    "gated_residual": (rfkernels.gated_residual, lambda: [leaf(2, 3, 8), leaf(2, 3, 8), leaf(2, 8)]),
    "qk_norm": (rfkernels.qk_norm, lambda: [leaf(2, 3, 2, 8), leaf(2, 3, 2, 8), leaf(8), leaf(8)]),
    "gelu_mlp": (rfkernels.gelu_mlp, lambda: [leaf(2, 3, 8), leaf(16, 8), leaf(16), leaf(8, 16), leaf(8)]),
    "linear": (lambda x, w, b: linear(x, w, b, before="gated_adaln"), lambda: [leaf(2, 3, 8), leaf(16, 8), leaf(16)]),
    "rectified_flow": (rfkernels.rectified_flow, lambda: [leaf(2, 3, 4), leaf(2, 3, 4), leaf(2)]),
    "rectified_flow-1d": (rfkernels.rectified_flow, lambda: [leaf(3), leaf(3), leaf(3)]),
    "weighted_mse": (rfkernels.weighted_mse, lambda: [leaf(2, 3, 4), leaf(2, 3, 4), leaf(2)]),
    "weighted_mse-1d": (rfkernels.weighted_mse, lambda: [leaf(3), leaf(3), leaf(3)]),
    "patch_embed": (rfkernels.patch_embed, lambda: [leaf(2, 3, 4, 6), leaf(8, 3, 2, 2), leaf(8), leaf(6, 8)]),
    "patch_embed-one-channel": (
        rfkernels.patch_embed, lambda: [leaf(1, 1, 4, 6), leaf(8, 1, 2, 2), leaf(8), leaf(6, 8)]
    ),
    "patch_unembed": (
        lambda x, w, b: rfkernels.patch_unembed(x, w, b, height=4, width=6),
        lambda: [leaf(2, 6, 8), leaf(12, 8), leaf(12)],
    ),
    "joint_attention": (attend, lambda: [leaf(2, 5, 3, 8), leaf(8)]),
}  # fmt: skip


def both(run):
    ways = []
    for way in (contextlib.nullcontext, native.without):
        with way():
            ways.append(run())
    for a, b in zip(*ways, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and (a - b).norm() <= 1e-4 * b.norm() + 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name):
    call, make = CALLS[name]
    leaves = make()

    def run():
        outs = flat(call(*leaves))
        return [*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves)]

    both(run)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "joint_attention"])
def test_second_derivatives(name):
    call, make = CALLS[name]
    leaves = make()

    def run():
        outs = flat(call(*leaves))
        first = torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves, allow_unused=True, materialize_grads=True)

    both(run)


def test_a_second_derivative_of_attention_raises_even_beside_another_term():
    q, w = CALLS["joint_attention"][1]()
    (g,) = torch.autograd.grad(sum(o.square().sum() for o in attend(q, w)), q, create_graph=True)
    with pytest.raises(RuntimeError, match="joint_attention has no second derivative"):
        (g.square().sum() + q.sum()).backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")       # PyTorch's own, of operators without a rule
@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith(("weighted", "joint"))])
def test_batches_of_gradients(name):
    call, make = CALLS[name]
    leaves = make()
    many = [torch.randn(3, *o.shape) for o in flat(call(*leaves))]
    both(lambda: torch.autograd.grad(flat(call(*leaves)), leaves, many, is_grads_batched=True))


def test_batches_of_gradients_of_the_joint_layout():
    q, w = CALLS["joint_attention"][1]()

    def run():
        streams = (Stream(q, q, q, w, w), Stream(q, q, q))
        outs = joined(streams, list(streams), 1e-6)
        grads = [torch.randn(3, *o.shape, generator=torch.Generator().manual_seed(1)) for o in outs]
        return torch.autograd.grad(outs, [q, w], grads, is_grads_batched=True)

    both(run)


@pytest.mark.parametrize("name", ("adaln", "gated_adaln", "gated_residual", "qk_norm", "gelu_mlp"))
def test_modes_around_a_backward_alone(name):
    call, make = CALLS[name]
    leaves = make()

    def run():
        outs = flat(call(*leaves))
        with FlopCounterMode(display=False):
            return torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves)

    both(run)


def test_products_of_a_backward_are_counted():
    x, w, b = leaf(512, 512), leaf(512, 512), leaf(512)
    y = linear(x, w, b, before="gated_adaln")
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2 * 2 * 512**3


@pytest.mark.filterwarnings("ignore")                                     # the tracer's own
@pytest.mark.parametrize("name", ("adaln", "gated_residual", "rectified_flow", "patch_unembed"))
def test_traced(name):
    call, make = CALLS[name]
    traced = torch.jit.trace(lambda *a: call(*a), tuple(t.detach() for t in make()), check_trace=False)
    given = [t.detach() for t in make()]
    for a, b in zip(flat(traced(*given)), flat(call(*given)), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_backward_under_autocast():
    leaves = CALLS["gelu_mlp"][1]()

    def run():
        y = rfkernels.gelu_mlp(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(y.float().sum(), leaves)

    ways = []
    for way in (contextlib.nullcontext, native.without):
        with way():
            ways.append(run())
    for a, b in zip(*ways, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_layers_whose_weights_are_no_parameters():
    fc1, fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
    for name in ("weight", "bias"):
        value = getattr(fc1, name).detach() * 1
        delattr(fc1, name)
        setattr(fc1, name, value)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(rfkernels.gelu_mlp(x, fc1, fc2), fc2(F.gelu(fc1(x), approximate="tanh")))


def test_queries_by_truth():
    q, kv = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 3, 3, 8)
    outs = rfkernels.joint_attention([Stream(q, q, q, queries=1), Stream.packed(kv, queries=0)])
    assert outs[0].shape == q.shape and outs[1] is None


@pytest.mark.parametrize("size", (10**30, 2**32))
def test_integers_that_no_size_is(size):
    x, latent = torch.randn(1, 1, 8), torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="patch_unembed: "):
        rfkernels.patch_unembed(x, torch.randn(8, 8), None, height=size, width=size, patch_size=size)
    with pytest.raises(ValueError, match="patch_embed: "):
        rfkernels.patch_embed(latent, torch.randn(8, 2, 2, 2), None, torch.randn(4, 8), patch_size=size)
    with pytest.raises(ValueError, match="chunk_modulation: "):
        rfkernels.chunk_modulation(torch.randn(2, 12, requires_grad=True), size)


def test_no_silent_definition_where_native_is_forced():
    with rfkernels.backend("native"), pytest.raises(RuntimeError, match=r"fp32, bf16 and fp16, not torch\.float64"):
        rfkernels.rectified_flow(*torch.randn(2, 2, 3).double(), torch.rand(2))


def test_times_of_fp64_are_read_as_fp32():
    x0, noise, t = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, dtype=torch.float64, requires_grad=True)
    both(lambda: [*rfkernels.rectified_flow(x0, noise, t), *torch.autograd.grad(
        rfkernels.rectified_flow(x0, noise, t)[0].sum(), t)])  # fmt: skip


def test_gelu_of_anything_finite():
    h = torch.tensor([[1e13, -1e13, 1e30, -1e30, 9.0, -9.0, 0.0, 200.0]])
    leaf = h.double().requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh").sum(), leaf)
    _, dh, _ = torch.ops.rfkernels.gelu_backward_native(h, torch.ones_like(h), False, False)
    torch.testing.assert_close(dh.double(), want.nan_to_num(0), rtol=1e-4, atol=1e-6)


def test_products_of_matrices_that_are_parts_of_others():
    wide = torch.randn(256, 512)
    x, w = torch.randn(64, 256), wide[:, ::2]
    torch.testing.assert_close(linear(x, w, None, before="gated_adaln"), F.linear(x, w), rtol=1e-4, atol=1e-4)
