"""The joint copy of packed projections in one kernel, and its backward, against the definition in fp64."""

import pytest
import torch

import rfkernels
from rfkernels import bias, nn
from rfkernels.joint_attention import join, library
from rfkernels.joint_attention.layout import flatten, parse
from rfkernels.testing import nan_filled
from tests.rfkernels.attention_cases import DEVICE, Case

pytest.importorskip("triton", reason="Triton is not installed on this platform")

CASES = {
    "text-and-image": Case((5, 37), batch=3, heads=6, dim=16),
    "one-head-of-40": Case((3, 7), heads=1, dim=40),
    "no-norm": Case((9, 20), batch=2, heads=8, dim=8, q_norm=False, k_norm=False),
    "one-stream": Case((33,), batch=2, heads=3),
    "four-streams": Case((1, 2, 3, 40), batch=2, heads=4, dim=24),
    "nothing-in-one": Case((0, 7), batch=2),
}


def joined(case, dtype):
    """(joint q, k, v and gradients of them, what the backward gives)"""
    tensors, layout = flatten(case.streams(dtype)[0])
    streams = parse([t.detach() for t in tensors], layout)
    assert join.takes(streams, layout)
    batch, total = case.batch, sum(case.sizes)
    shape = (batch, total, case.heads, case.dim)
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    grads = [g.to(DEVICE, dtype) for g in grads]
    with nan_filled():
        joint = join.forward(streams, [torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(3)], 1e-6)
        return joint, grads, join.backward(grads, streams, 1e-6)


def defined(case, grads):
    """The same in fp64, by PyTorch's own norm, concatenation and autograd."""
    streams, leaves = case.streams(torch.float64)
    asking = [s for s in streams if s.queries]
    ready = [library.together([library.ready(getattr(s, n), getattr(s, f"{n}_weight"), s, 1e-6) for s in asking])
             for n in "qk"]  # fmt: skip
    joint = [*ready, library.together([s.v for s in streams])]
    return joint, iter(torch.autograd.grad(joint, leaves, [g.double() for g in grads]))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", CASES)
def test_is_the_definition_both_ways(name, dtype, tolerance):
    case = CASES[name]
    joint, grads, (found, sums) = joined(case, dtype)
    want, gradients = defined(case, grads)
    for got, exact in zip(joint, want, strict=True):
        torch.testing.assert_close(got.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    for g, total in zip(found, sums, strict=True):
        exact = next(gradients)
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(g.activations[0].double(), exact, rtol=tolerance, atol=tolerance * scale)
        many = tolerance * scale * max(1, exact.shape[0] * exact.shape[1]) ** 0.5           # of a sum, rounded before
        torch.testing.assert_close(total.double(), exact.sum((0, 1)), rtol=tolerance, atol=many)
        for kind in g.weights:
            exact = next(gradients)
            torch.testing.assert_close(g.weights[kind].double(), exact, rtol=tolerance,
                                       atol=tolerance * max(1.0, float(exact.abs().max())))  # fmt: skip


def test_the_same_bits_when_repeated():
    first, second = (joined(CASES["text-and-image"], torch.bfloat16)[2] for _ in range(2))
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a.activations[0], b.activations[0]) and torch.equal(a.weights["k"], b.weights["k"])
    assert all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize(
    "case",
    (Case((3, 7), silent=(0,)), Case((3, 7), lengths=((2,), (7,))), Case((3, 7), rope=("i", "h")),
     Case((3, 7), packed=False), Case((3, 7), q_norm=(True, False))),
    ids=("silent", "lengths", "rope", "separate", "half-normed"),
)  # fmt: skip
def test_other_streams_are_left_to_the_kernels_that_know_them(case):
    tensors, layout = flatten(case.streams(torch.float32)[0])
    assert not join.takes(parse(tensors, layout), layout)


def test_biases_of_the_projections_take_the_sums(monkeypatch):
    """A block's attention on the library's path: gradients as in fp64, and nobody sums rows again."""
    given = []
    give = bias.give
    monkeypatch.setattr(bias, "give", lambda gradient, sums: (given.append(sums.shape), give(gradient, sums)))
    monkeypatch.setattr(library, "interpreted", lambda *args: None)
    torch.manual_seed(1)
    module = nn.JointAttention((32, 32), heads=4).to(DEVICE)
    xs = [torch.randn(2, n, 32, device=DEVICE) for n in (5, 9)]

    def gradients(module, xs, backend):
        with rfkernels.backend(backend, "joint_attention"):
            outs = module(xs)
        return torch.autograd.grad(sum(o.sin().sum() for o in outs), list(module.parameters()))

    # On a CPU no sums are asked for unless somebody says that kernels will give them.
    with rfkernels.backend("library", "joint_attention"):
        monkeypatch.setattr(bias, "_sums", lambda op, *args: op == "joint_attention")
        monkeypatch.setattr("rfkernels.native.direct", lambda *args: None)
        got = gradients(module, xs, "library")
    assert given == [(3, 4, 8), (3, 4, 8)]
    exact = gradients(module.double(), [x.double() for x in xs], "reference")
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
