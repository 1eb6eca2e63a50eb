"""What people have in their hands: shapes, strides, norms with parameters, modules on a device."""

import doctest
import inspect
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rfkernels
import rfkernels.nn as rnn
from rfkernels import Rope, Stream, native
from rfkernels.testing import assert_within_rule
from rfkernels.triton_support import INSTALLED

pytestmark = pytest.mark.usefixtures("on_device")
B, S, C = 3, 5, 32
SHAPES = ((B, C), (B, 1, C), (B, S, C), (1, S, C), (1, 1, C), (1, C), (C,))
NO_NATIVE = "tensors are on a GPU" if torch.cuda.is_available() else native.missing()
BACKENDS = (
    "reference", "library",
    pytest.param("native", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=str(NO_NATIVE))),
    pytest.param("triton", marks=pytest.mark.skipif(not INSTALLED, reason="no Triton")),
)  # fmt: skip


def wide(v):
    return v.unsqueeze(1) if v.ndim == 2 else v


# --- shapes and strides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulation_of_every_shape(shape, backend):
    x, branch = torch.randn(2, B, S, C)
    gate, shift, scale = (torch.randn(shape, requires_grad=True) for _ in range(3))
    h = x + wide(gate) * branch
    y = F.layer_norm(h, (C,), eps=1e-6) * (1 + wide(scale)) + wide(shift)
    with rfkernels.backend(backend):
        got = rfkernels.gated_adaln(x, branch, gate, shift, scale)
        grads = torch.randn_like(h), torch.randn_like(y)
        found = torch.autograd.grad(got, (gate, shift, scale), grads)
    torch.testing.assert_close(got, (h, y))
    for a, b in zip(found, torch.autograd.grad((h, y), (gate, shift, scale), grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ("shift", "scale", "gate", "all"))
def test_a_vector_that_is_not_there(missing, backend):
    x, branch = torch.randn(2, B, S, C).requires_grad_().unbind(0)
    vectors = {n: None if missing in (n, "all") else torch.randn(B, C) for n in ("gate", "shift", "scale")}
    gate, shift, scale = (0 if v is None else wide(v) for v in vectors.values())
    h = x + (1 if vectors["gate"] is None else gate) * branch
    y = F.rms_norm(h, (C,), eps=1e-6) * (1 + scale) + shift
    with rfkernels.backend(backend):
        got = rfkernels.gated_adaln(x, branch, *vectors.values(), norm="rms")
        grads = torch.randn_like(h), torch.randn_like(y)
        found = torch.autograd.grad(got, (x, branch), grads)
    torch.testing.assert_close(got, (h, y))
    for a, b in zip(found, torch.autograd.grad((h, y), (x, branch), grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((B, 4 * C), (B, 1, 4 * C), (1, 4 * C), (B, S, 4 * C)), ids=str)
def test_chunks_of_every_shape(shape, backend):
    x, m = torch.randn(B, S, C), torch.randn(shape, requires_grad=True)

    def loss(chunks):
        shift, scale, gate, unused = chunks
        assert unused.shape == (*shape[:-1], C)
        return rfkernels.gated_residual(x, rfkernels.adaln(x, shift, scale), gate).sin().sum()

    with rfkernels.backend(backend if backend != "library" else "reference"):
        (got,) = torch.autograd.grad(loss(rfkernels.chunk_modulation(m, 4)), m)
        (want,) = torch.autograd.grad(loss(m.chunk(4, -1)), m)
    torch.testing.assert_close(got, want)


def test_channels_that_lie_apart_are_copied_and_explain_says_so():
    x = torch.randn(B, C, S).transpose(1, 2).requires_grad_()
    v = torch.randn(C, B).t()
    got = rfkernels.adaln(x, v, v)
    want = F.layer_norm(x, (C,), eps=1e-6) * (1 + v[:, None]) + v[:, None]
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), x) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    told = rfkernels.explain("adaln", x, v, v)
    assert "x is copied first: it has stride 5 in its last dimension, not 1" in told and "shift is copied" in told
    assert "copied" not in rfkernels.explain("adaln", x.contiguous(), v.contiguous(), v.contiguous())
    q = torch.randn(2, 4, 16, 6).permute(0, 3, 1, 2).transpose(2, 3)                       # [B, S, D, H]: D, H swapped
    rfkernels.qk_norm(q, q, torch.ones(4), torch.ones(4))
    assert "streams[0].q was copied" in rfkernels.explain("joint_attention", [Stream(q, q, q)])
    torch.testing.assert_close(
        rfkernels.joint_attention([Stream(q, q, q)])[0], rfkernels.joint_attention([Stream(*[q.contiguous()] * 3)])[0]
    )


@pytest.mark.parametrize("shape", ((S, 8), (1, S, 8), (B, S, 8)), ids=str)
def test_rope_as_a_pair_of_tables(shape):
    q, k, v = torch.randn(3, B, S, 2, 16)
    angles = torch.randn(shape)
    got = rfkernels.joint_attention([Stream(q, k, v, rope=(angles.cos(), angles.sin()))])[0]
    full = angles.expand(B, S, 8).contiguous()
    torch.testing.assert_close(got, rfkernels.joint_attention([Stream(q, k, v, rope=Rope(full.cos(), full.sin()))])[0])
    phases = torch.polar(torch.ones(()), angles.expand(B, S, 8))[:, :, None]
    turned = (torch.view_as_complex(t.unflatten(-1, (8, 2))) * phases for t in (q, k))
    q, k = (torch.view_as_real(t).flatten(-2) for t in turned)
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", (torch.float32, torch.bfloat16))
def test_the_norm_comes_in_the_dtype_that_the_next_product_wants(wide, backend):
    x, branch, v = torch.randn(B, S, C).to(wide), torch.randn(B, S, C).bfloat16(), torch.randn(B, C)
    with rfkernels.backend(backend):
        assert rfkernels.adaln(x, v, v).dtype == wide
        assert rfkernels.adaln(x, v, v, dtype=torch.float16).dtype == torch.float16
        with torch.autocast(x.device.type, torch.bfloat16):
            assert rfkernels.adaln(x, v, v).dtype == torch.bfloat16
            h, y = rfkernels.gated_adaln(x, branch, None, v, v)
            assert (h.dtype, y.dtype) == (wide, torch.bfloat16)
            if backend not in ("triton", "native"):
                assert rfkernels.adaln(x.double(), v, v).dtype == torch.float64


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual, branch", itertools.product(FLOATS, FLOATS), ids=str)
def test_every_pair_of_dtypes(residual, branch, backend):
    """h has PyTorch's dtype, gradients their input's; vectors in the third dtype."""
    other = next(d for d in FLOATS if d not in (residual, branch))
    given = [torch.randn(B, S, C).to(residual), torch.randn(B, S, C).to(branch)]
    given += [torch.randn(B, C).to(d) for d in (branch, other, other)]

    def run(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outs = function(*leaves)
        torch.manual_seed(2)
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.randn(B, S, C).to(o.dtype) for o in outs])]

    def eager(x, branch, gate, shift, scale):
        h = x + gate[:, None] * branch
        return h, (F.layer_norm(h, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]).to(h.dtype)

    with rfkernels.backend(backend):
        got = run(rfkernels.gated_adaln, given)
    assert got[0].dtype == got[1].dtype == torch.promote_types(residual, branch)
    assert [g.dtype for g in got[2:]] == [t.dtype for t in given]
    exact = run(eager, [t.double() for t in given])
    for i, three in enumerate(zip(got, exact, run(eager, given), strict=True)):
        assert_within_rule(str(i), *three)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.fc1, self.fc2 = nn.Linear(C, 3 * C), nn.Linear(C, 64), nn.Linear(64, C)

    def forward(self, x, m):
        shift, scale, gate, shift2, scale2, gate2 = rfkernels.chunk_modulation(m, 6)
        y = rfkernels.adaln(x, shift, scale)
        (out,) = rfkernels.joint_attention([Stream.packed(self.qkv(y).unflatten(-1, (3, 2, 16)))])
        h, y = rfkernels.gated_adaln(x, out.flatten(2), gate, shift2, scale2)
        return rfkernels.gated_residual(h, rfkernels.gelu_mlp(y, self.fc1, self.fc2), gate2)


def test_exported_for_any_batch_and_length():
    block, x, m = Whole(), torch.randn(2, 5, C), torch.randn(2, 6 * C)
    batch, length = torch.export.Dim("batch", min=2, max=1024), torch.export.Dim("length", min=2)
    program = torch.export.export(block, (x, m), dynamic_shapes={"x": {0: batch, 1: length}, "m": {0: batch}})
    for given in ((x, m), (torch.randn(3, 7, C), torch.randn(3, 6 * C))):
        torch.testing.assert_close(program.module()(*given), block(*given))


@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[6:], ids=str)
def test_exported_with_every_vector(shape):
    """No size is tied to another that it only happens to be compared with."""

    class Norm(nn.Module):
        def forward(self, x, v):
            return rfkernels.adaln(x, v, weight=v)

    x, v = torch.randn(B, S, C), torch.randn(shape)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    sizes = zip(shape[:-1], (B, S), (batch, length), strict=False)
    own = {i: dim for i, (size, whole, dim) in enumerate(sizes) if size == whole}
    program = torch.export.export(Norm(), (x, v), dynamic_shapes={"x": {0: batch, 1: length}, "v": own})
    new = torch.randn([{B: C, S: C}.get(n, n) if i in own else n for i, n in enumerate(shape)])
    x = torch.randn(C, C, C)                                                    # batch = length = channels
    torch.testing.assert_close(program.module()(x, new), Norm()(x, new))


# --- norms with parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((C,), (B, C), (B, S, C)), ids=str)
def test_weight_and_bias_beside_modulation(shape, backend):
    x = torch.randn(B, S, C, requires_grad=True)
    shift, scale = (torch.randn(B, C, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape, requires_grad=True) for _ in range(2))
    given = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
    for names in (("weight",), ("bias",), ("weight", "bias"), ("shift", "weight"), ("scale", "weight"), tuple(given)):
        chosen = {n: given[n] for n in names}
        at = {n: wide(t) for n, t in chosen.items()}
        normed = F.layer_norm(x, (C,), eps=1e-5) * at.get("weight", 1) + at.get("bias", 0)
        want = normed * (1 + at.get("scale", 0)) + at.get("shift", 0)
        with rfkernels.backend(backend):
            got = rfkernels.adaln(x, eps=1e-5, **chosen)
            dy = torch.randn_like(x)
            found = torch.autograd.grad(got, (x, *chosen.values()), dy)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for a, b in zip(found, torch.autograd.grad(want, (x, *chosen.values()), dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_small_gamma_keeps_its_digits():
    x, gamma = torch.randn(1, 64, 256).bfloat16(), torch.full((1, 256), 0.01).bfloat16()
    exact = F.layer_norm(x.double(), (256,), eps=1e-5) * gamma.double()
    eager = F.layer_norm(x, (256,), eps=1e-5) * gamma
    got = rfkernels.adaln(x, weight=gamma, bias=torch.zeros(256).bfloat16(), eps=1e-5)
    assert (got - exact).norm() <= 2 * (eager - exact).norm() < 0.01 * exact.norm()


# --- the interpreter --------------------------------------------------------------------------------------------------

ASKED = """
import torch, rfkernels
from rfkernels import Stream
torch.manual_seed(0)
q, x, v = torch.randn(1, 5, 2, 16).bfloat16(), torch.randn(2, 3, 32).bfloat16(), torch.randn(2, 32).bfloat16()
z, w, p = torch.randn(1, 4, 4, 4).bfloat16(), torch.randn(16, 4, 2, 2).bfloat16(), torch.randn(4, 16)
calls = {"attention": lambda: rfkernels.joint_attention([Stream(q, q, q)])[0],
         "adaln": lambda: rfkernels.adaln(x, v, v), "patch": lambda: rfkernels.patch_embed(z, w, None, p)}
for name, call in calls.items():
    with rfkernels.backend("triton"):
        got = call().float()
    with rfkernels.backend("reference"):
        want = call().float()
    assert (got - want).norm() < 0.02 * want.norm(), name
"""


@pytest.mark.skipif(not INSTALLED, reason="no Triton")
def test_interpreted_bf16_is_right_without_being_asked_for():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


# --- modules ----------------------------------------------------------------------------------------------------------

GRID = {"resolution": 64, "max_height": 64, "max_width": 64}
MODULES = {
    "AdaLN": lambda **k: rnn.AdaLN(C, **k),
    "GatedAdaLN": lambda **k: rnn.GatedAdaLN(C, norm="rms", **k),
    "Modulation": lambda **k: rnn.Modulation(8, C, (6, 2), **k),
    "StreamAttention": lambda **k: rnn.StreamAttention(C, 2, **k),
    "JointAttention": lambda **k: rnn.JointAttention((C, C), 2, **k),
    "Mlp": lambda **k: rnn.Mlp(C, **k),
    "PatchEmbed": lambda **k: rnn.PatchEmbed(4, C, **GRID, **k),
    "PatchUnembed": lambda **k: rnn.PatchUnembed(C, 4, **k),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_made_where_and_as_asked(name):
    made = MODULES[name](device="meta", dtype=torch.bfloat16)
    parameters = list(made.parameters())
    assert parameters and all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters)
    assert all(b.is_meta and b.dtype == torch.float32 for b in made.buffers()), "position tables stay fp32"
    assert all(p.dtype == torch.float32 and not p.is_meta for p in MODULES[name]().parameters())


def test_errors_name_the_callers_class():
    class Mine(rnn.JointAttention):
        pass

    class Own(rnn.PatchEmbed):
        pass

    for message, call in {
        "Mine: heads is 0": lambda: Mine((C, C), 0),
        "Mine: dims is empty": lambda: Mine((), 2),
        "Mine: xs has 1 entries; expected 2": lambda: Mine((C, C), 2)([torch.randn(1, 2, C)]),
        "Own: latent has 9 x 2 patches": lambda: Own(4, C, **GRID)(torch.randn(1, 4, 18, 4)),
        "Mlp: dim is 0": lambda: rnn.Mlp(0),
        "PatchUnembed: out_channels is -1": lambda: rnn.PatchUnembed(C, -1),
        "Modulation: width is 0": lambda: rnn.Modulation(8, 0, (6,)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_examples_in_docstrings_run():
    assert {*MODULES, "LoraLinear"} == set(rnn.__all__)                     # whose factors are fp32 whatever is asked
    for name in rnn.__all__:
        module = getattr(rnn, name)
        names = {**vars(rnn), "torch": torch, "rfkernels": rfkernels}
        found = doctest.DocTestFinder(recurse=False).find(module, name, globs=names)
        assert found[0].examples, name
        assert not doctest.DocTestRunner().run(found[0]).failed


def test_examples_of_the_ops_run():
    """Every public function has one."""
    ops = [name for name in rfkernels.__all__ if inspect.isfunction(getattr(rfkernels, name))]
    assert {"adaln", "joint_attention", "backend", "explain"} <= set(ops)
    names = {**vars(rfkernels), "torch": torch, "rfkernels": rfkernels}
    for name in ops:
        (found,) = doctest.DocTestFinder(recurse=False).find(getattr(rfkernels, name), name, globs=names)
        assert found.examples, name
        assert not doctest.DocTestRunner().run(found).failed


def test_affine_norms_as_modules():
    x, v = torch.randn(2, 3, C), torch.randn(2, C)
    for norm, theirs in (("layer", nn.LayerNorm(C, eps=1e-6)), ("rms", nn.RMSNorm(C, eps=1e-6))):
        module = rnn.AdaLN(C, norm=norm)
        for p in module.parameters():
            nn.init.normal_(p)
        theirs.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), theirs(x))
        torch.testing.assert_close(module(x, v, v), theirs(x) * (1 + v[:, None]) + v[:, None])
    assert list(rnn.AdaLN().parameters()) == [] and "32, norm='rms'" in repr(module)
