"""The native CPU kernels: by the error rule, whatever the instruction set; the same bits, whatever the threads; and
what happens where they are not there."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import build, native
from rfkernels.bias import linear
from rfkernels.testing import assert_within_rule

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=f"{native.missing()}")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gated(x, branch, gate, shift, scale):
    return rfkernels.gated_adaln(x, branch, gate, shift, scale)


def eager_gated(x, branch, gate, shift, scale):
    h = x + gate[:, None] * branch
    return h, F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_qk_norm(q, k, q_weight, k_weight):
    return tuple(F.rms_norm(t, t.shape[-1:], w, 1e-6) for t, w in ((q, q_weight), (k, k_weight)))


def eager_mlp(x, w1, b1, w2, b2):
    return (F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),)


def qkv(b, s, h, d):
    q, k, _ = torch.randn(b, s, 3, h, d).unbind(2)
    return [q, k, torch.randn(d), torch.randn(d)]


CASES = {                                               # widths that fill no vector, one row, several ranges of tokens
    **{f"gated-{b}x{s}x{c}": (gated, eager_gated, lambda b=b, s=s, c=c: [
        torch.randn(b, s, c), torch.randn(b, s, c), *(torch.randn(b, c) for _ in range(3))
    ]) for b, s, c in ((1, 1, 5), (2, 70, 33), (3, 33, 384))},
    **{f"qk-{d}": (rfkernels.qk_norm, eager_qk_norm, lambda d=d: qkv(2, 37, 3, d)) for d in (7, 64)},
    "mlp": (lambda *a: (rfkernels.gelu_mlp(*a),), eager_mlp, lambda: [
        4 * torch.randn(3, 41, 20), torch.randn(50, 20), torch.randn(50), torch.randn(20, 50), torch.randn(20)
    ]),
}  # fmt: skip


def run(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outs = function(*leaves)
    torch.manual_seed(1)
    return [*outs, *torch.autograd.grad(outs, leaves, [torch.randn(o.shape).to(o.dtype) for o in outs])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_error_of_every_instruction_set(case, dtype, instructions):
    function, eager, make = CASES[case]
    tensors = [t.to(DTYPES[dtype]) for t in make()]
    with rfkernels.backend("native"):
        got = run(function, tensors)
    for i, three in enumerate(zip(got, run(eager, [t.double() for t in tensors]), run(eager, tensors), strict=True)):
        assert_within_rule(f"{case} {i}", *three)


def test_gelu_far_out(instructions):
    h = torch.linspace(-30, 30, 4096).view(16, 256)
    wide = h.double().requires_grad_()
    value = F.gelu(wide, approximate="tanh")
    (want,) = torch.autograd.grad(value.sum(), wide)
    a, dh, db = torch.ops.rfkernels.gelu_backward_native(h, torch.ones_like(h), True, True)
    torch.testing.assert_close(a.double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(db.double(), want.sum(0), rtol=1e-5, atol=1e-5)


def test_near_constant_rows_keep_their_statistics(instructions):
    """A mean that dwarfs the deviation: the statistics are of x - mean, and the mean is exact to its last bit."""
    x = 3000 + torch.randn(2, 5, 384).mul(0.01)
    with rfkernels.backend("native"):
        got = rfkernels.adaln(x)
    exact = F.layer_norm(x.double(), (384,), eps=1e-6)
    assert_within_rule("y", got, exact, F.layer_norm(x, (384,), eps=1e-6))
    with rfkernels.backend("native"):
        constant = rfkernels.adaln(torch.full((1, 2, 1152), 0.1))
    assert constant.abs().max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_whatever_the_threads(case):
    function, _, make = CASES[case]
    tensors, threads = make(), torch.get_num_threads()
    if case == "mlp":                                    # the products are PyTorch's
        h, da = torch.randn(2, 500, 96)
        function, tensors = lambda h, da: torch.ops.rfkernels.gelu_backward_native(h, da, True, True), None
        ways = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ways.append(function(h, da))
    else:
        ways = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with rfkernels.backend("native"):
                ways.append(run(function, tensors))
    torch.set_num_threads(threads)
    for other in ways[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ways[0], other, strict=True))


def test_infinities_and_nans_stay_what_they_are(instructions):
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0]).repeat(8).view(1, 1, 32)
    for dtype in (torch.bfloat16, torch.float16):
        with rfkernels.backend("native"):
            h = rfkernels.gated_residual(values.to(dtype), torch.zeros(1, 1, 32).to(dtype))
        torch.testing.assert_close(h.float(), values, equal_nan=True)


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "plain"))
def test_products_and_their_gradients(bias):
    """Large enough for the library's product that is faster on this CPU, and in a shape of its own."""
    x, w, b = torch.randn(2, 70, 128), torch.randn(96, 128), torch.randn(96)
    given = [x, w, b] if bias else [x, w]
    ours = lambda x, w, b=None: (linear(x, w, b, (3, 32), before="gated_adaln"),)  # noqa: E731
    theirs = lambda x, w, b=None: (F.linear(x, w, b).unflatten(-1, (3, 32)),)  # noqa: E731
    for i, three in enumerate(
        zip(run(ours, given), run(theirs, [t.double() for t in given]), run(theirs, given), strict=True)
    ):
        assert_within_rule(f"product {i}", *three)
    mlp = [x, torch.randn(256, 128) / 11, torch.randn(256), torch.randn(128, 256) / 16, torch.randn(128)]
    with torch.no_grad():
        assert_within_rule(
            "gelu", rfkernels.gelu_mlp(*mlp), eager_mlp(*(t.double() for t in mlp))[0], eager_mlp(*mlp)[0]
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_operators_pass_opcheck():
    v = torch.randn(2, 32, requires_grad=True)
    x, branch = (torch.randn(2, 3, 32).to(d).requires_grad_() for d in (torch.bfloat16, torch.float32))
    ops, rest = torch.ops.rfkernels, (True, "layer", 1e-6, torch.float32)
    torch.library.opcheck(ops.adaln_native.default, (x, v, None, *rest))
    torch.library.opcheck(ops.gated_adaln_native.default, (x, branch, v, v, v, *rest))
    torch.library.opcheck(ops.gated_residual_native.default, (x, branch, v))
    torch.library.opcheck(ops.qk_norm_native.default, (*qkv(1, 3, 2, 8), 1e-6))
    packed = torch.randn(1, 3, 3, 2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    torch.library.opcheck(ops.joint_layout_native.default, ([*packed, packed[0]], "3k,3x", 1e-6))


# --- building ---------------------------------------------------------------------------------------------------------


def asked(code, **environment):
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=given)


TELL = ["-c", "import torch, rfkernels; print(rfkernels.explain('adaln', torch.ones(1, 2, 8)))"]


def test_a_second_build_does_nothing(tmp_path, monkeypatch):
    path, _ = build.build()
    before = path.stat().st_mtime_ns
    assert build.build() == (path, False) and path.stat().st_mtime_ns == before
    monkeypatch.setenv("RFKERNELS_CACHE", str(tmp_path))
    assert build.built() is None, "another cache, another build"


def test_without_a_compiler_everything_goes_on(tmp_path):
    done = asked(["-m", "rfkernels.build"], RFKERNELS_CACHE=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 1 and "not built. no C++ compiler: no-such-compiler is not on the path" in done.stderr
    told = asked(TELL, RFKERNELS_CACHE=str(tmp_path)).stdout
    assert "adaln: library" in told and "not native: the native code is not built (python -m rfkernels.build)" in told


def test_what_does_not_load_is_a_line_and_no_crash(tmp_path):
    where = tmp_path / build.folder().name
    where.mkdir()
    (where / build.NAME).write_bytes(b"not a library")
    (where / build.NAME).with_suffix(".size").write_text("13")
    done = asked(TELL, RFKERNELS_CACHE=str(tmp_path))
    assert done.returncode == 0 and "not native: the native code does not load" in done.stdout
    (where / build.NAME).write_bytes(b"cut")
    assert "the native code is not built" in asked(TELL, RFKERNELS_CACHE=str(tmp_path)).stdout
    assert "RFKERNELS_NATIVE is 0" in asked(TELL, RFKERNELS_NATIVE="0").stdout


def test_importing_builds_and_loads_nothing(tmp_path):
    code = "import rfkernels; from rfkernels import native; print(native.entry)"
    done = asked(["-c", code], RFKERNELS_CACHE=str(tmp_path))
    assert done.stdout.split() == ["None"] and not list(tmp_path.iterdir())
