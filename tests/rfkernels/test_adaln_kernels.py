"""The Triton kernels of the adaLN family: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch

import rfkernels
from rfkernels import launch_tables, native
from rfkernels.adaln import launch, reference
from rfkernels.testing import assert_within_rule, nan_filled, traffic
from tests.rfkernels.paths import kernels, operator, path

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytestmark = pytest.mark.usefixtures("path")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (960, 1152, 1536, 1920, 2432, 3072)
NORMS = ("layer", "rms")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {"sample": lambda b, s, c: (b, c), "token": lambda b, s, c: (b, s, c), "shared": lambda b, s, c: (c,)}
FUNCTIONS = {
    "adaln": (("x", "shift", "scale"), lambda norm: lambda *a: (rfkernels.adaln(*a, norm=norm),)),
    "gated_adaln": (
        ("x", "branch", "gate", "shift", "scale"),
        lambda norm: lambda *a: rfkernels.gated_adaln(*a, norm=norm),
    ),
    "gated_residual": (("x", "branch", "gate"), lambda norm: lambda *a: (rfkernels.gated_residual(*a),)),
}


def tensors(op, b, s, c, dtype, modulation="sample", vector_dtype=None):
    names = FUNCTIONS[op][0]
    shape = {"x": (b, s, c), "branch": (b, s, c)}
    make = lambda n: torch.randn(shape.get(n) or SHAPES[modulation](b, s, c), device=DEVICE)  # noqa: E731
    kinds = {n: dtype if n in shape else vector_dtype or dtype for n in names}
    return [make(n).to(kinds[n]) for n in names]


def run(function, inputs, grads, backend):
    leaves = [t.detach().requires_grad_() for t in inputs]
    with rfkernels.backend(backend), nan_filled():
        outputs = function(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, grads)
    return [*outputs, *gradients]


def check(op, inputs, norm="layer", grads=None, zero=0.0):
    """Outputs and all gradients under the error rule, gradients or off by `zero`; bitwise the same when repeated."""
    names, function = FUNCTIONS[op][0], FUNCTIONS[op][1](norm)
    grads = grads or [torch.randn_like(inputs[0]) for _ in range(2 if op == "gated_adaln" else 1)]
    got = run(function, inputs, grads, path())
    again = run(function, inputs, grads, path())
    exact = run(function, [t.double() for t in inputs], [g.double() for g in grads], "reference")
    eager = run(eager_version(op, norm), inputs, grads, "reference")
    labels = ["h", "y"][-len(grads):] + [f"d{n}" for n in names]
    for label, a, b, c, d in zip(labels, got, again, exact, eager, strict=True):
        assert torch.equal(a, b), f"{label} differs when repeated"
        if not (zero and label.startswith("d") and (a.double() - c).abs().max() <= zero):
            assert_within_rule(f"{op} {label}", a, c, d)


def eager_version(op, norm):
    """The op as a careful user writes it, in the inputs' dtype."""

    def wide(v):
        return v.unsqueeze(1) if v.ndim == 2 else v

    def norm_and_modulate(x, shift, scale):
        c = x.shape[-1:]
        normed = torch.nn.functional.layer_norm(x, c, eps=1e-6) if norm == "layer" else torch.nn.functional.rms_norm(
            x, c, eps=1e-6
        )
        return (normed * (1 + wide(scale)) + wide(shift)).to(x.dtype)

    def residual(x, branch, gate):
        return x + wide(gate) * branch

    if op == "adaln":
        return lambda *a: (norm_and_modulate(*a),)
    if op == "gated_residual":
        return lambda *a: (residual(*a),)

    def both(x, branch, gate, shift, scale):
        h = residual(x, branch, gate)
        return h, norm_and_modulate(h, shift, scale)

    return both


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_widths_of_the_models(op, width):
    check(op, tensors(op, 2, 3, width, torch.bfloat16))


@pytest.mark.parametrize("width", (1, 7, 100))
@pytest.mark.parametrize("op", FUNCTIONS)
def test_odd_widths(op, width):
    # A norm of one channel has no gradient; fused multiply-add leaves rounding times rstd, on an H100 8.8e-5.
    check(op, tensors(op, 2, 3, width, torch.float32), zero=5e-4 if (DEVICE, width) == ("cuda", 1) else 0.0)


@pytest.mark.parametrize("length", (1, 154, 257))
@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("op", FUNCTIONS)
def test_lengths_and_batches(op, length, batch):
    check(op, tensors(op, batch, length, 64, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modulation", SHAPES)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_dtypes_norms_and_modulations(op, modulation, norm, dtype):
    if op == "gated_residual" and norm == "rms":
        pytest.skip("gated_residual has no norm")
    check(op, tensors(op, 2, 5, 96, DTYPES[dtype], modulation), norm)


def test_modulations_of_different_kinds_and_dtypes_mix():
    x, branch, gate, shift, scale = tensors("gated_adaln", 2, 5, 96, torch.bfloat16, vector_dtype=torch.float32)
    gate = gate.bfloat16()
    check("gated_adaln", [x, branch, gate[0].clone(), shift, scale.unsqueeze(1).repeat(1, 5, 1)])
    check("gated_adaln", [x, branch, gate, shift[0].clone(), scale])


def test_views_of_packed_projections_are_read_in_place():
    packed = torch.randn(2, 6 * 64, device=DEVICE, dtype=torch.bfloat16)
    x, branch = torch.randn(2, 5, 2, 64, device=DEVICE, dtype=torch.bfloat16).unbind(2)
    shift, scale, gate = packed.chunk(6, dim=-1)[:3]
    check("gated_adaln", [x.transpose(0, 1).contiguous().transpose(0, 1), branch, gate, shift, scale])


def test_chunks_of_a_modulation_get_their_gradients_in_place():
    """The gradients of all six vectors land in one tensor: no concatenation, no copy, and the same values."""
    x, branch = torch.randn(2, 3, 5, 64, device=DEVICE)
    m = torch.randn(3, 6 * 64, device=DEVICE, requires_grad=True)

    def block(vectors):
        shift, scale, gate, shift2, scale2, gate2 = vectors
        h, y = rfkernels.gated_adaln(x, branch + rfkernels.adaln(x, shift, scale), gate, shift2, scale2)
        return rfkernels.gated_residual(h, y, gate2).square().sum()

    with kernels():
        (want,) = torch.autograd.grad(block(m.chunk(6, dim=-1)), m)
        loss = block(rfkernels.chunk_modulation(m, 6))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (got,) = torch.autograd.grad(loss, m)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    called = {event.name for event in profile.events()}
    assert not {"aten::cat", "aten::split_backward"} & called


@pytest.mark.filterwarnings("ignore:The .grad attribute")       # compile's own, on inputs that are not leaves
@pytest.mark.triton_only
def test_operators_do_not_return_parts_of_one_tensor():
    """A compiled region gets chunks from outside; the gradients it returns must still be tensors of their own."""
    x = torch.randn(3, 5, 64, device=DEVICE)
    m = torch.randn(3, 2 * 64, device=DEVICE, requires_grad=True)
    shift, scale = rfkernels.chunk_modulation(m, 2)
    compiled = torch.compile(lambda *a: rfkernels.adaln(*a).square().sum(), fullgraph=True, backend="aot_eager")
    with kernels():
        (want,) = torch.autograd.grad(rfkernels.adaln(x, *m.chunk(2, -1)).square().sum(), m)
        (got,) = torch.autograd.grad(compiled(x, shift, scale), m)
        y, statistics = launch.adaln(x, shift, scale, True, "layer", 1e-6, x.dtype)
        _, dshift, dscale = torch.ops.rfkernels.adaln_backward(y, x, shift, scale, statistics, True, "layer", 1e-6)
    torch.testing.assert_close(got, want)
    assert dshift.untyped_storage().data_ptr() != dscale.untyped_storage().data_ptr()


def test_chunks_that_are_used_twice_or_never():
    x = torch.randn(3, 5, 64, device=DEVICE)
    m = torch.randn(3, 3 * 64, device=DEVICE, requires_grad=True)

    def loss(vectors):
        shift, scale, _ = vectors
        return (rfkernels.adaln(rfkernels.adaln(x, shift, scale), shift, scale) * shift[:, None]).square().sum()

    with kernels():
        (want,) = torch.autograd.grad(loss(m.chunk(3, -1)), m)
        out = loss(rfkernels.chunk_modulation(m, 3))
        (got,) = torch.autograd.grad(out, m, retain_graph=True)
        (again,) = torch.autograd.grad(out, m)
        parts = rfkernels.chunk_modulation(m, 3)
        out = loss(parts)
        (of_part,) = torch.autograd.grad(out, parts[0], retain_graph=True)
        kept = of_part.clone()
        out.backward()
    torch.testing.assert_close(got, want)
    assert torch.equal(of_part, kept), "a later backward does not write into what an earlier one returned"
    torch.testing.assert_close(m.grad, want)
    assert torch.equal(got, again) and got.data_ptr() != again.data_ptr(), "each backward has a tensor of its own"
    with pytest.raises(ValueError, match=r"modulation has shape \[3, 192\]; expected .* with count = 5"):
        rfkernels.chunk_modulation(m, 5)


def test_expanded_and_transposed_inputs():
    x, branch, gate, shift, scale = tensors("gated_adaln", 2, 5, 64, torch.float32)
    check("gated_adaln", [x[:1].expand(2, 5, 64), branch[:, :1].expand(2, 5, 64), gate[:1].expand(2, 64), shift, scale])
    vectors = [v[:1].expand(5, 64) for v in (gate, shift, scale)]
    check("gated_adaln", [x.transpose(0, 1), branch.transpose(0, 1), *vectors])


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.triton_only
def test_one_launch_forward_and_two_backward(op, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launches, call = [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: (launches.append(1), call(self, *a, **k))[1])
    leaves = [t.requires_grad_() for t in tensors(op, 2, 5, 64, torch.bfloat16)]
    with kernels():
        out = FUNCTIONS[op][1]("layer")(*leaves)
        assert len(launches) == 1
        torch.autograd.grad(sum(o.sum() for o in out), leaves)
    assert len(launches) == 3


def test_expanded_and_transposed_gradients():
    inputs = tensors("adaln", 2, 5, 64, torch.float32)
    one = torch.randn((), device=DEVICE)
    check("adaln", inputs, grads=[one.expand(2, 5, 64)])
    check("adaln", inputs, grads=[torch.randn(2, 1, 64, device=DEVICE).expand(2, 5, 64)])
    check("adaln", inputs, grads=[torch.randn(64, 5, 2, device=DEVICE).permute(2, 1, 0)])


def test_a_gradient_parallel_to_the_output_cancels():
    """dy parallel to y gives dx near zero: what a backward from rounded statistics gets wrong."""
    x, _, _ = tensors("adaln", 2, 5, 1536, torch.float32)
    zero = torch.zeros(2, 1536, device=DEVICE)
    y = reference.adaln(x, zero, zero, True, "layer", 1e-6, x.dtype)
    check("adaln", [x, zero, zero], grads=[y])


@pytest.mark.parametrize("norm", NORMS)
def test_near_constant_rows(norm):
    x = 300 + 1e-2 * torch.randn(2, 3, 960, device=DEVICE)
    x[0] = 5.0
    _, shift, scale = tensors("adaln", 2, 3, 960, torch.float32)
    check("adaln", [x, shift, scale], norm)


def test_saves_one_activation():
    x, shift, scale = (t.requires_grad_() for t in tensors("adaln", 2, 5, 64, torch.bfloat16))
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with kernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rfkernels.adaln(x, shift, scale)
    statistics = 2 * 4 * 2 * 5
    assert sum(saved.values()) == 2 * (x.numel() + shift.numel() + scale.numel()) + statistics


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize("width", (96, 1152))
@pytest.mark.triton_only
def test_every_byte_is_moved_once(width):
    """bf16 bytes per element: adaln 4 forward and 6 backward, gated_adaln 8 and 12."""
    residual, branch, gate, shift, scale = tensors("gated_adaln", 2, 5, width, torch.bfloat16)
    dy, dh = torch.randn_like(residual), torch.randn_like(residual)
    n = residual.numel()
    with kernels():
        with traffic() as moved:
            y, statistics = launch.adaln(residual, shift, scale, True, "layer", 1e-6, residual.dtype)
        assert [moved.loaded(residual), moved.stored(y), moved.loaded(y)] == [n, n, 0]
        with traffic() as moved:
            dx, dshift, _ = launch.adaln_backward(dy, residual, shift, scale, statistics, True, "layer", 1e-6)
        assert [moved.loaded(dy), moved.loaded(residual), moved.stored(dx)] == [n, n, n]
        assert moved.stored(dshift) == dshift.numel()
        with traffic() as moved:
            vectors = (gate, shift, scale)
            h, y, statistics = launch.gated_adaln(residual, branch, *vectors, True, "layer", 1e-6, residual.dtype)
        assert [moved.loaded(residual), moved.loaded(branch), moved.stored(h), moved.stored(y)] == [n] * 4
        assert moved.loaded(h) == moved.loaded(y) == 0
        with traffic() as moved:
            inputs = (dh, dy, h, branch, gate, shift, scale, statistics)
            dresidual, dbranch, *_ = launch.gated_adaln_backward(*inputs, True, "layer", 1e-6, residual.dtype, False)
        assert [moved.loaded(t) for t in (dh, dy, h, branch)] == [n] * 4
        assert [moved.stored(t) for t in (dresidual, dbranch)] == [n] * 2


@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:The .grad attribute")       # opcheck's own
def test_operators_pass_opcheck(op):
    inputs = [t.requires_grad_() for t in tensors(op, 2, 3, 32, torch.float32)]
    extra = () if op == "gated_residual" else (True, "layer", 1e-6, torch.bfloat16)
    torch.library.opcheck(getattr(torch.ops.rfkernels, operator(op)).default, (*inputs, *extra))
    inputs = [inputs[0], *(t.detach().bfloat16().requires_grad_() for t in inputs[1:])]
    inputs[2] = None                                                   # the shift or the gate
    torch.library.opcheck(getattr(torch.ops.rfkernels, operator(op)).default, (*inputs, *extra))


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("op", FUNCTIONS)
def test_compiles_whole_and_its_gradients_are_eagers(op, batch):
    """Two chained ops, also at batch 1, where a compiler's own fusion of this pattern has given wrong gradients."""
    _, make = FUNCTIONS[op]
    inputs = [t.requires_grad_() for t in tensors(op, batch, 5, 32, torch.float32)]

    def twice(x, *rest):
        once = make("layer")(x, *rest)[-1]
        return sum(out.square().sum() for out in make("layer")(once, *rest))

    with kernels():
        want = torch.autograd.grad(twice(*inputs), inputs)
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor_gives_eagers_gradients_at_batch_1(cxx):
    """Chained modulated norms at local batch 1: the pattern of pytorch issue 193061."""
    inputs = [t.requires_grad_() for t in tensors("gated_adaln", 1, 5, 32, torch.float32)]

    def chained(x, branch, *rest):
        h, y = rfkernels.gated_adaln(x, branch, *rest)
        h, y = rfkernels.gated_adaln(h, y, *rest)
        return h.square().sum() + y.sin().sum()

    with kernels():
        want = torch.autograd.grad(chained(*inputs), inputs)
        got = torch.autograd.grad(torch.compile(chained, fullgraph=True)(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_recompilations_do_not_grow_with_length_or_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with kernels():
        compiled = torch.compile(lambda *a: rfkernels.adaln(*a), fullgraph=True, backend=counter)
        counts = []
        for batch, length in ((2, 3), (2, 5), (3, 7), (4, 9), (5, 2), (6, 11), (7, 130)):
            compiled(*tensors("adaln", batch, length, 32, torch.float32))
            counts.append(counter.frame_count)
    assert counts[-1] == counts[2] <= 3, "the first shape, a dynamic length, a dynamic batch, and no more"


@pytest.mark.same_kernel
@pytest.mark.parametrize("selective", (False, True))
def test_inside_activation_checkpointing(selective):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    inputs = [t.requires_grad_() for t in tensors("adaln", 2, 5, 32, torch.float32)]
    seen, fused = [], getattr(torch.ops.rfkernels, operator("adaln")).default

    def policy(context, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op == fused else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    with kernels():
        want = torch.autograd.grad(rfkernels.adaln(*inputs).sin().sum(), inputs)
        out = checkpoint(lambda *a: rfkernels.adaln(*a).sin(), *inputs, use_reentrant=False, **options)
        got = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert not selective or fused in seen, "the policy sees the operator"


def test_empty_inputs():
    x, shift, scale = (t.requires_grad_() for t in tensors("adaln", 2, 0, 32, torch.float32))
    with kernels():
        y = rfkernels.adaln(x, shift, scale)
        grads = torch.autograd.grad(y.sum(), (x, shift, scale))
    assert y.shape == (2, 0, 32) and not grads[1].any() and not grads[2].any()


@pytest.mark.triton_only
def test_dispatch_takes_the_kernels_on_a_gpu_and_says_why_not_elsewhere():
    x, shift, scale = tensors("adaln", 2, 3, 32, torch.float32)
    told = rfkernels.explain(rfkernels.adaln, x, shift, scale)
    here = "library" if native.missing() else "native"
    assert told.startswith(f"adaln: {'triton' if DEVICE == 'cuda' else here}"), told
    assert "fp32, bf16 and fp16, not torch.float64" in rfkernels.explain("adaln", x.double(), shift, scale)
    with kernels(), pytest.raises(RuntimeError, match=r"not torch.float64"):
        rfkernels.adaln(x.double(), shift, scale)


@pytest.mark.triton_only
def test_launch_settings_come_from_the_gpus_table_or_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_tables, "__file__", str(tmp_path / "x.py"))
    (tmp_path / "nvidia_h200.json").write_text('{"adaln_fwd": {"1536": {"lanes": 64, "warps": 8}}}')
    launch_tables.table.cache_clear()
    settings = launch_tables.row_launch("adaln_fwd", 1536, "NVIDIA H200")
    assert (settings.lanes, settings.warps, settings.rows, settings.chunk, settings.chunks(1536)) == (64, 8, 4, 512, 3)
    assert launch_tables.row_launch("adaln_fwd", 1152, "NVIDIA H200") == launch_tables.row_launch("adaln_fwd", 1152)
    assert launch_tables.row_launch("adaln_fwd", 1152).chunk * 9 == 1152, "exact"
    launch_tables.table.cache_clear()


@pytest.mark.triton_only
def test_the_reference_is_what_is_stored_then_normed():
    """h is rounded before its norm, so that the backward can start from the stored h."""
    x, branch, gate, shift, scale = tensors("gated_adaln", 2, 3, 64, torch.bfloat16)
    h, y = reference.gated_adaln(x, branch, gate, shift, scale, True, "layer", 1e-6, x.dtype)
    assert torch.equal(y, reference.adaln(h, shift, scale, True, "layer", 1e-6, x.dtype))
