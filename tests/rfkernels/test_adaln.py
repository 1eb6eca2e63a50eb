import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels.adaln import launch
from rfkernels.launch_tables import RowLaunch
from rfkernels.triton_support import INSTALLED

NORMS = ("layer", "rms")
MODULATIONS = {"per-sample": (2, 24), "per-token": (2, 5, 24), "shared": (24,)}


def inputs(modulation, dtype=torch.float64):
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    return x, *(torch.randn(MODULATIONS[modulation], dtype=dtype, requires_grad=True) for _ in range(3))


def expected(x, shift, scale, norm):
    """The same in other words: torch's own norms, and an explicit broadcast."""
    c = x.shape[-1]
    normed = F.layer_norm(x, (c,), eps=1e-6) if norm == "layer" else F.rms_norm(x, (c,), eps=1e-6)
    wide = (v[:, None, :].expand_as(x) if v.ndim == 2 else v for v in (shift, scale))
    shift, scale = wide
    return normed + normed * scale + shift


@pytest.mark.parametrize("backend", ("reference", "library"))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_values_and_gradients(backend, norm, modulation):
    x, shift, scale, _ = inputs(modulation)
    with rfkernels.backend(backend):
        y = rfkernels.adaln(x, shift, scale, norm=norm)
    want = expected(x, shift, scale, norm)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, shift, scale), dy)
    for a, b in zip(got, torch.autograd.grad(want, (x, shift, scale), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_of_the_reference(norm):
    x, shift, scale, gate = inputs("per-sample")
    branch = torch.randn_like(x, requires_grad=True)
    with rfkernels.backend("reference"):
        torch.autograd.gradcheck(
            lambda *a: rfkernels.gated_adaln(*a, norm=norm), (x, branch, gate, shift, scale), fast_mode=True
        )


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_gated_adaln_is_residual_then_norm(modulation):
    x, shift, scale, gate = inputs(modulation)
    branch = torch.randn_like(x)
    h, y = rfkernels.gated_adaln(x, branch, gate, shift, scale)
    wide = gate[:, None] if gate.ndim == 2 else gate
    torch.testing.assert_close(h, x + wide * branch)
    torch.testing.assert_close(h, rfkernels.gated_residual(x, branch, gate))
    torch.testing.assert_close(y, expected(h, shift, scale, "layer"))


@pytest.mark.parametrize("backend", ("reference", "library"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_once(backend, dtype):
    x, shift, scale, _ = (v.detach().to(dtype) for v in inputs("per-sample"))
    x = x * 100 + 3000 if dtype == torch.bfloat16 else x            # a mean that dwarfs the deviation
    with rfkernels.backend(backend):
        y = rfkernels.adaln(x, shift, scale)
    want = expected(x.double(), shift.double(), scale.double(), "layer")
    ulp = torch.finfo(dtype).eps * want.abs().clamp_min(1e-3)
    assert y.dtype == dtype
    assert ((y.double() - want).abs() <= ulp).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_the_operator_passes_opcheck():
    for modulation in MODULATIONS:
        for norm in NORMS:
            x, shift, scale, _ = inputs(modulation, torch.float32)
            given = (x, shift, scale, True, norm, 1e-6, torch.float32)
            torch.library.opcheck(torch.ops.rfkernels.adaln_library.default, given)


def test_compiles_without_a_graph_break():
    x, shift, scale, _ = inputs("per-sample")

    def f(x, shift, scale):
        return rfkernels.adaln(x, shift, scale).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, shift, scale), f(x, shift, scale))
    compiled(x, shift, scale).backward()
    want = torch.autograd.grad(f(x, shift, scale), x)[0]
    torch.testing.assert_close(x.grad, want)


def test_views_are_read_in_place():
    packed = torch.randn(2, 6 * 24)
    shift, scale = packed.chunk(6, dim=-1)[:2]
    x = torch.randn(5, 2, 24).transpose(0, 1)
    torch.testing.assert_close(
        rfkernels.adaln(x, shift, scale), rfkernels.adaln(x.contiguous(), shift.contiguous(), scale.contiguous())
    )


def test_saves_one_activation():
    x, shift, scale, _ = inputs("per-sample", torch.float32)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rfkernels.adaln(x, shift, scale)
    assert sum(saved.values()) <= x.numel() + shift.numel() + scale.numel() + 2 * x.shape[0] * x.shape[1]


@pytest.mark.parametrize("batch", (1, 2, 31, 32, 33, 64, 100, 264, 300))
def test_programs_of_a_backward_are_one_wave(batch, monkeypatch):
    """A program more than the multiprocessors hold at a time would run alone after all others."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    x = torch.empty((batch, 1024, 64), device="meta")
    programs = batch * launch.Sums(x, RowLaunch(32, 1), (x[:, 0],), in_chunks=False).splits
    assert programs <= max(batch, 264) and (batch > 132 or programs > 132)


@pytest.mark.skipif(not INSTALLED, reason="Triton is not installed on this platform")
@pytest.mark.usefixtures("on_device")
def test_statistics_are_those_of_the_sum_as_it_is_stored():
    """In bf16: the backward reads that sum, and so does whoever norms it again. Of the sum before rounding they are off
    by up to 9e-4 here."""
    residual, branch, gate, shift, scale = (torch.randn(2, *s).bfloat16() for s in [(5, 96)] * 2 + [(96,)] * 3)
    h, _, statistics = launch.gated_adaln(residual, branch, gate, shift, scale, True, "layer", 1e-6, torch.bfloat16)
    exact = h.double()
    want = torch.stack([exact.mean(2), (exact.var(2, unbiased=False) + 1e-6).rsqrt()])
    torch.testing.assert_close(statistics.double().view_as(want), want, rtol=2e-6, atol=2e-7)
