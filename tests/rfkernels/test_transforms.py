"""Function transforms, forward mode and second derivatives: values by the kernels, derivatives of any kind right."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rfkernels
from rfkernels import Stream
from rfkernels.testing import assert_within_rule
from rfkernels.triton_support import INSTALLED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, S, C, H, D = 2, 3, 8, 2, 8


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def attend(q, k, v, weight):
    return rfkernels.joint_attention([Stream(q, k, v, weight, weight), Stream(k, q, v)])[0]


OPS = {
    "adaln": (rfkernels.adaln, lambda: [r(B, S, C), r(B, C), r(B, C)]),
    "adaln-shared": (lambda x, v, w: rfkernels.adaln(x, v, w, norm="rms"), lambda: [r(B, S, C), r(C), r(B, S, C)]),
    "adaln-affine": (lambda x, v, w: rfkernels.adaln(x, v, None, weight=w), lambda: [r(B, S, C), r(B, 1, C), r(C)]),
    "gated_residual": (rfkernels.gated_residual, lambda: [r(B, S, C), r(B, S, C), r(B, C)]),
    "gated_adaln": (rfkernels.gated_adaln, lambda: [r(B, S, C), r(B, S, C), r(B, C), r(B, C), r(B, C)]),
    "qk_norm": (rfkernels.qk_norm, lambda: [r(B, S, H, D), r(B, S, H, D), r(D), r(D)]),
    "gelu_mlp": (rfkernels.gelu_mlp, lambda: [r(B, S, C), r(16, C), r(16), r(C, 16), r(C)]),
    "rectified_flow": (rfkernels.rectified_flow, lambda: [r(B, 3, 4), r(B, 3, 4), torch.rand(B).double()]),
    "weighted_mse": (rfkernels.weighted_mse, lambda: [r(B, 3, 4), r(B, 3, 4), torch.rand(B).double()]),
    "patch_embed": (rfkernels.patch_embed, lambda: [r(B, 3, 4, 6), r(C, 3, 2, 2), r(C), r(6, C)]),
    "patch_unembed": (
        lambda x, w, b: rfkernels.patch_unembed(x, w, b, height=4, width=6), lambda: [r(B, 6, C), r(12, C), r(12)]
    ),
    "joint_attention": (attend, lambda: [r(B, S, H, D), r(B, S, H, D), r(B, S, H, D), r(D)]),
    "chunk_modulation": (
        lambda x, m: rfkernels.adaln(x, *rfkernels.chunk_modulation(m, 2)), lambda: [r(B, S, C), r(B, 2 * C)]
    ),
}  # fmt: skip
KERNELS = [name for name in OPS if name != "joint_attention"]


def scalar(function):
    """A scalar of all outputs that is curved in each."""

    def of(*args):
        outputs = function(*args)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return sum((o.double().sin() * (1 + i)).sum() for i, o in enumerate(outputs))

    return of


def flat(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def tangents(function, args, directions):
    return flat(jvp(function, tuple(args), tuple(directions))[1])


@pytest.mark.parametrize("op", OPS)
def test_tangents_are_finite_differences(op):
    function, make = OPS[op]
    args, step = make(), 1e-6
    directions = [torch.randn_like(a) for a in args]
    got = tangents(function, args, directions)
    ahead, behind = (
        flat(function(*(a + sign * step * d for a, d in zip(args, directions, strict=True)))) for sign in (1, -1)
    )
    with forward_ad.dual_level():
        duals = flat(function(*map(forward_ad.make_dual, args, directions)))
        plain = [forward_ad.unpack_dual(o).tangent for o in duals]
    for t, p, a, b in zip(got, plain, ahead, behind, strict=True):
        torch.testing.assert_close(t, (a - b) / (2 * step), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t, p)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_finite_differences(op):
    function, make = OPS[op]
    if op == "joint_attention":
        with rfkernels.backend("reference"):
            torch.autograd.gradgradcheck(function, [a.requires_grad_() for a in make()], fast_mode=True)
        return
    torch.autograd.gradgradcheck(function, [a.requires_grad_() for a in make()], fast_mode=True)


@pytest.mark.parametrize("op", OPS)
def test_transforms_nest(op):
    """Each against the definition under plain autograd."""
    function, make = OPS[op]
    args, f = make(), scalar(function)
    directions = [torch.randn_like(a) for a in args]
    every = tuple(range(len(args)))

    def expected(of, *at):
        leaves = [a.detach().requires_grad_() for a in at]
        with rfkernels.backend("reference"):
            return torch.autograd.grad(of(*leaves), leaves)

    want = expected(f, *args)
    for a, b in zip(grad(f, every)(*args), want, strict=True):
        torch.testing.assert_close(a, b)
    rows = [torch.stack([a, a + 1, a * 2]) for a in args]
    for i, got in enumerate(zip(*vmap(grad(f, every))(*rows), strict=True)):
        for a, b in zip(got, expected(f, *(row[i] for row in rows)), strict=True):
            torch.testing.assert_close(a, b)
    along = lambda *at: jvp(f, at, tuple(directions))[1]  # noqa: E731
    through = lambda *at: sum((g * d).sum() for g, d in zip(grad(f, every)(*at), directions, strict=True))  # noqa: E731
    torch.testing.assert_close(along(*args), through(*args))
    with rfkernels.backend("reference"):
        twice = grad(through, every)(*args)
    for way in (along, through):              # reverse over forward, reverse over reverse; then forward over reverse
        for a, b in zip(grad(way, every)(*args), twice, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(jvp(grad(f, every), tuple(args), tuple(directions))[1], twice, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not INSTALLED, reason="no Triton")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("op", KERNELS)
def test_the_kernels_give_the_values(op, dtype):
    """fp32 and bf16 on the kernels: primal, tangent, gradient and that of its square, by the error rule."""
    function, make = OPS[op]
    wide = [a.to(DEVICE) for a in make()]
    if op != "rectified_flow" and op != "weighted_mse":
        args = [a.to(dtype) for a in wide]
    else:
        args = [*(a.to(dtype) for a in wide[:2]), wide[2].float()]
    wide = [a.double() for a in args]
    f, every = scalar(function), tuple(range(len(args)))
    directions = [torch.randn_like(a) for a in args]

    def all_of(at):
        along = tuple(d.to(a.dtype) for d, a in zip(directions, at, strict=True))
        primal, tangent = jvp(function, tuple(at), along)
        first = grad(f, every)(*at)
        leaves = [a.detach().requires_grad_() for a in at]
        gradients = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        penalty = sum((g.double().square()).sum() for g in gradients)
        return [*flat(primal), *flat(tangent), *first, *torch.autograd.grad(penalty, leaves)]

    with rfkernels.backend("reference"):
        exact, eager = all_of(wide), all_of(args)
    with rfkernels.backend("triton"):
        got = all_of(args)
    for i, (a, b, c) in enumerate(zip(got, exact, eager, strict=True)):
        # Eager is the definition itself, on tensors so small that its largest error is luck: 5.2 times it was seen.
        assert_within_rule(f"{op} {i}", a, b, c, factor=8.0)


@pytest.mark.parametrize("op", ("adaln", "gated_adaln", "qk_norm", "gelu_mlp", "gated_residual"))
def test_forward_mode_in_forward_mode(op):
    function, make = OPS[op]
    args, f = make(), scalar(function)
    first, second = ([torch.randn_like(a) for a in args] for _ in range(2))
    along = lambda g, d: lambda *at: jvp(g, at, tuple(d))[1]  # noqa: E731
    every = tuple(range(len(args)))
    got = along(along(f, first), second)(*args)
    through = lambda *at: sum((g * d).sum() for g, d in zip(grad(f, every)(*at), first, strict=True))  # noqa: E731
    torch.testing.assert_close(got, along(through, second)(*args))
    around = along(lambda *at: sum(g.sum() for g in grad(along(f, first), every)(*at)), second)
    with rfkernels.backend("reference"):
        want = along(along(f, first), second)(*args), around(*args)
    torch.testing.assert_close((got, around(*args)), want)


@pytest.mark.parametrize("backend", ("default", *["triton"] * INSTALLED))
def test_batches_of_gradients_and_of_nothing(backend):
    x, v = torch.randn(B, S, C, device=DEVICE, requires_grad=True), torch.randn(B, C, device=DEVICE)
    with rfkernels.backend("triton") if backend == "triton" else contextlib.nullcontext():
        y = rfkernels.adaln(x, v, v)
        rows = torch.randn(3, B, S, C, device=DEVICE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                  # vmap tells which ops it loops over
            (got,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            torch.testing.assert_close(got[i], torch.autograd.grad(y, x, rows[i], retain_graph=True)[0])
        nothing = vmap(rfkernels.adaln, (0, None))(torch.randn(0, B, S, C, device=DEVICE), v)
        assert nothing.shape == (0, B, S, C)
        whole = torch.func.functionalize(lambda x: rfkernels.adaln(x, v, v))(x.detach())
        torch.testing.assert_close(whole, y)


def test_matrices_of_derivatives():
    x, shift, scale = r(1, 2, 4), r(4), r(4)
    f = lambda x: rfkernels.adaln(x, shift, scale)  # noqa: E731
    definition = lambda x: F.layer_norm(x, (4,), eps=1e-6) * (1 + scale) + shift  # noqa: E731
    torch.testing.assert_close(jacfwd(f)(x), jacrev(definition)(x))
    torch.testing.assert_close(jacrev(f)(x), jacrev(definition)(x))
    torch.testing.assert_close(jacfwd(jacfwd(f))(x), jacrev(jacrev(definition))(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # vmap tells which ops it loops over
        got, want = (hessian(lambda x, f=f: f(x).sin().sum())(x) for f in (f, definition))
    torch.testing.assert_close(got, want)


def test_compiled_transforms():
    x, t, shift, scale = r(B, S, C), r(B, S, C), r(B, C), r(B, C)
    for way in (
        lambda x: jvp(lambda x: rfkernels.adaln(x, shift, scale), (x,), (t,))[1],
        lambda x: grad(lambda x: rfkernels.gated_adaln(x, t, shift, shift, scale)[1].sin().sum())(x),
        lambda x: vjp(lambda x: attend(*[x.unflatten(-1, (1, C))] * 3, scale[0]), x)[1](t.unsqueeze(2))[0],
    ):
        torch.testing.assert_close(torch.compile(way, backend="aot_eager", fullgraph=True)(x), way(x))


def test_without_a_rule_the_error_names_the_op_and_what_to_do():
    q = [r(1, 3, 2, 8).requires_grad_() for _ in range(3)]
    message = r"joint_attention has no second derivative here; use rfkernels\.backend\('reference'\)"
    (g,) = torch.autograd.grad(rfkernels.joint_attention([Stream(*q)])[0].sin().sum(), q[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        g.sum().backward()
    if INSTALLED:
        q = [t.detach().float().to(DEVICE).requires_grad_() for t in q]
        with rfkernels.backend("triton"):
            (g,) = torch.autograd.grad(rfkernels.joint_attention([Stream(*q)])[0].sin().sum(), q[:1], create_graph=True)
            with pytest.raises(RuntimeError, match=message):
                g.sum().backward()
            with pytest.raises(RuntimeError, match="no rule for function transforms and forward mode"):
                jvp(lambda x: rfkernels.joint_attention([Stream(x, x, x)])[0], (q[0].detach(),), (q[0].detach(),))
